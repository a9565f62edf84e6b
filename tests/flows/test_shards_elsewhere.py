"""A run in an object store whose shards are computed on another machine: a process that has another cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from s3_server import S3Server
from sharded_runs import SECTIONS, config
from torture.runs import fingerprint, start_or_go_on

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.store.address import CACHE
from rlhf_core.store.helping import share
from rlhf_core.store.opening import reading, writing
from rlhf_core.verification.run import verify_run
from tasks.session.session import open_session
from tasks.shards import stages as shards
from tasks.shards.local_workers import LocalWorkers
from tasks.shards.workers import using_workers

EVERYTHING: dict[str, Any] = {"execution": {"overlap": True}, "artifacts": {"keep_iterations": 1}, "num_iterations": 3}


@pytest.fixture(scope="module")
def elsewhere(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorkers]:
    """A worker of another machine. This one has its own cache."""
    machines = tmp_path_factory.mktemp("machines")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3.environment.items():
            environment.setenv(name, value)
        environment.setenv(CACHE, str(machines / "other"))
        there = LocalWorkers(1)
        environment.setenv(CACHE, str(machines / "this"))
        yield there
        there.close()


@pytest.fixture
def computes_nothing_here(elsewhere: LocalWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a run in a store are computed there, or not at all."""

    @contextlib.contextmanager
    def those(run: RunFolder) -> Iterator[None]:
        share(run.path)
        with monkeypatch.context() as open_still:
            open_still.setattr(elsewhere, "close", lambda: None)
            with using_workers(elsewhere):
                yield

    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("a part did not come")

    monkeypatch.setattr("flows.ppo.shard_workers", those)
    monkeypatch.setattr(shards.ShardedStages, "compute_part", refuse)


def tree(tiny: Any, changes: dict[str, Any]) -> Any:
    given = config(tiny, 0, SECTIONS["lora"], num_shards=2).model_dump()
    for name, section in changes.items():
        given[name] = given[name] | section if isinstance(section, dict) else section
    return build_config(given)


@pytest.fixture(scope="module")
def alone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], str]:
    """The fingerprint of a run of this process alone, on a disk."""

    def run(changes: dict[str, Any]) -> str:
        open_session.cache_clear()
        run_dir = tmp_path_factory.mktemp("alone") / "run"
        start_or_go_on(tree(tiny, changes), run_dir)
        return fingerprint(run_dir)

    return run


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow, id="plain"), pytest.param(EVERYTHING, id="overlapping, archived")],
)
def test_it_is_the_run_of_one_process_on_a_disk(
    changes: dict[str, Any],
    alone: Callable[[dict[str, Any]], str],
    tiny: Any,
    s3: S3Server,
    request: pytest.FixtureRequest,
) -> None:
    wanted, url = alone(changes), f"s3://{s3.new_bucket()}/run"
    request.getfixturevalue("computes_nothing_here")
    open_session.cache_clear()
    with writing(url) as folder:
        start_or_go_on(tree(tiny, changes), folder)
    assert fingerprint(reading(url)) == wanted
    assert verify_run(reading(url)).damage == []
    assert not any(name.startswith("shards/") for name in s3.names(url))
    bucket = url.split("/")[2]  # where a process that was killed before it had dropped them leaves some
    s3.client().put_object(Bucket=bucket, Key="run/shards/000002/02_rollouts.0-of-2.json", Body=b"{}")
    with writing(url) as folder:
        start_or_go_on(tree(tiny, changes), folder)
    assert not any(name.startswith("shards/") for name in s3.names(url))
