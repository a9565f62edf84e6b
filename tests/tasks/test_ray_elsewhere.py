"""A run in an object store by nodes of a Ray cluster that have no disk in common: each has a cache of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import AUTHENTICATION, RayNodes
from s3_server import S3Server
from sharded_runs import SECTIONS, config
from torture.runs import fingerprint, start

from flows import ppo
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.store.address import CACHE
from rlhf_core.store.opening import reading, writing
from rlhf_core.verification.run import verify_run
from tasks.session.session import open_session
from tasks.shards import stages as shards

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets and processes


@pytest.fixture(scope="module")
def machines(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all caches; that of this machine is ``0``."""
    folder = tmp_path_factory.mktemp("machines")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment, **AUTHENTICATION, CACHE: str(folder / "0")}.items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def nodes(machines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A head that computes nothing, and two nodes; what takes the place of one has nothing either."""
    there = RayNodes(
        2, tmp_path_factory.mktemp("nodes"), environment=lambda number: {CACHE: str(machines / str(number))}
    )
    yield there
    there.close()


@pytest.fixture(scope="module")
def alone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the run by one process, on a disk."""
    open_session.cache_clear()
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    start(config(tiny, 0, SECTIONS["lora"]), run_dir)
    return fingerprint(run_dir)


def by_nodes(tiny: Any, nodes: RayNodes, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the run; this process computes no shard."""

    def refuse(*_arguments: Any) -> Any:
        raise AssertionError("a part did not come")

    monkeypatch.setattr(shards, "_compute", refuse)
    whole = config(tiny, None, SECTIONS["lora"])
    execution = {"engine": "ray", "num_shards": 3, "ray": {"address": nodes.address, "patience_s": 120.0}}
    open_session.cache_clear()
    with writing(url) as folder:
        start(whole.model_validate(whole.model_dump() | {"execution": execution}), folder)


def check(url: str, s3: S3Server, wanted: str) -> None:
    assert not any(name.startswith("shards/") for name in s3.names(url))
    assert fingerprint(reading(url)) == wanted
    assert verify_run(reading(url)).damage == []


def copies(machines: Path) -> list[str]:
    return sorted(path.relative_to(machines).parts[0] for path in machines.glob("*/*/run/run.json"))


def test_the_run_is_the_one_of_one_process_on_a_disk(
    alone: str, nodes: RayNodes, machines: Path, tiny: Any, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3.new_bucket()}/run"
    by_nodes(tiny, nodes, url, monkeypatch)
    assert copies(machines) == ["0", "2", "3"]
    check(url, s3, alone)


def test_a_node_that_dies_takes_nothing_with_it(
    alone: str, nodes: RayNodes, tiny: Any, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, killed = f"s3://{s3.new_bucket()}/run", threading.Event()
    without_a_kill = ppo.train_iteration

    def kill(run: RunFolder, iteration: int) -> None:
        """The older node, while answers are given."""
        while not any("/02_rollouts." in name for name in s3.names(url) if name.startswith("shards/")):
            time.sleep(0.05)
        is_under_way = run.manifest("generate", iteration) is None
        nodes.replace_one()
        if is_under_way:
            killed.set()

    def train_iteration(run_dir: str, iteration: int, *before: Any) -> Any:
        if iteration == 1:
            nodes.settle()
            threading.Thread(target=kill, args=(RunFolder.open(Path(run_dir)), iteration), daemon=True).start()
        return without_a_kill(run_dir, iteration, *before)

    monkeypatch.setattr(ppo, "train_iteration", train_iteration)
    by_nodes(tiny, nodes, url, monkeypatch)
    assert killed.is_set()
    check(url, s3, alone)
