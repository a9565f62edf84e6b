"""Actors of a Ray cluster of two nodes: what they do, what happens when a node dies, and what a person is told.

The cluster is real: each node is processes of its own on this machine. It is begun once, for all tests here, which are
slow but for what needs none: in the test command the battery's row ``ray_nodes`` runs one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from chores import die, die_once, fail, note
from processes import until
from ray_nodes import AUTHENTICATION, RayNodes
from s3_server import S3Server
from sharded_runs import SECTIONS, config
from torture.runs import fingerprint, start

import tasks.shards.workers
from rlhf_core.contracts.config_io import config_digest
from rlhf_core.contracts.errors import NumericalError, UserError, WorkerError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import machine_identity, run_identity
from rlhf_core.preflight import preflight
from rlhf_core.store.address import CACHE
from rlhf_core.verification.run import verify_run
from tasks.ray.workers import RayWorkers, _Worker
from tasks.session.session import open_session
from tasks.shards.stages import SHARDED
from tasks.shards.workers import using_workers, workers

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and processes to the collector


ROOM_FOR_OTHERS: dict[str, Any] = {stage: {"num_cpus": 0.5} for stage in SHARDED}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """The head and another node, a CPU each."""
    there = RayNodes(1, tmp_path_factory.mktemp("nodes"), head_cpus=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AUTHENTICATION.items():
            patch.setenv(name, value)
        yield there
    there.close()


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    open_session.cache_clear()
    yield
    open_session.cache_clear()


def on_ray(tiny: Any, address: str, case: str = "separate critic", num_workers: int | None = None, **ray: Any) -> Any:
    execution = {"engine": "ray", "num_shards": 3, "num_workers": num_workers}
    given = execution | {"ray": {"address": address, "patience_s": 60.0, **ray}}
    whole = config(tiny, None, SECTIONS[case])
    return whole.model_validate(whole.model_dump() | {"execution": given})


@pytest.fixture(scope="module")
def two(nodes: RayNodes, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayWorkers]:
    """Workers for several runs: to begin one takes longer than a run."""
    given = on_ray(tiny, nodes.address, num_workers=2, **ROOM_FOR_OTHERS)
    there = RayWorkers(new_run(given, tmp_path_factory.mktemp("of workers") / "run"))
    with using_workers(there):
        assert workers() is there
        yield there


@pytest.fixture
def shared(two: RayWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asks for Ray gets these workers."""

    @contextlib.contextmanager
    def those(run: RunFolder) -> Iterator[None]:
        monkeypatch.setattr(tasks.shards.workers, "_current", two if run.config.execution.engine == "ray" else None)
        yield

    monkeypatch.setattr("flows.ppo.shard_workers", those)


def new_run(config: Any, path: Path) -> RunFolder:
    return RunFolder.create(path, config, run_identity(config, preflight(config).prompt_set))


@pytest.mark.slow
def test_calls_are_done_on_both_nodes_without_prefect(two: RayWorkers, tmp_path: Path) -> None:
    assert two.count == 2
    did: set[tuple[str, ...]] = set()

    def both_have_begun() -> bool:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda n: two.call("generate", "a note", note, tmp_path / str(n)), range(2)))
        did.update(tuple((tmp_path / str(n)).read_text().split()) for n in range(2))
        return len({node for node, _, _ in did}) == 2

    until(both_have_begun, 60)
    assert os.getpid() not in {int(pid) for _, pid, _ in did}
    assert {has_prefect for _, _, has_prefect in did} == {"False"}


@pytest.mark.slow
def test_what_a_call_raises_is_raised_here(two: RayWorkers) -> None:
    with pytest.raises(NumericalError, match="i000000-p000001-s0 is not finite"):
        two.call("score_rewards", "scores", fail, NumericalError("i000000-p000001-s0 is not finite"))
    with pytest.raises(UserError, match="first\nsecond"):
        two.call("score_rewards", "scores", fail, UserError("first", "second"))
    with pytest.raises(OSError, match="No space"):
        two.call("score_rewards", "scores", fail, OSError(28, "No space left on device"))


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_call_done_again(
    two: RayWorkers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two.call("generate", "generate of iteration 7, shard 1 of 2", die_once, tmp_path / "once")
    assert (tmp_path / "once").read_text() == "done"
    assert "a Ray worker died computing generate of iteration 7, shard 1 of 2" in caplog.text
    with pytest.raises(WorkerError, match="3 Ray workers in a row died computing scores"):
        two.call("score_rewards", "scores", die)
    two.call("generate", "a note", note, tmp_path / "after")
    assert (tmp_path / "after").exists()


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("case", ["separate critic", "lora"])
@pytest.mark.slow
def test_the_run_is_the_one_of_this_process_alone(case: str, nodes: RayNodes, tiny: Any, tmp_path: Path) -> None:
    alone, by_ray = config(tiny, 0, SECTIONS[case]), on_ray(tiny, nodes.address, case)
    assert config_digest(alone) == config_digest(by_ray), "the engine is no part of what a run is"
    start(alone, tmp_path / "alone")
    start(by_ray, tmp_path / "ray")
    assert fingerprint(tmp_path / "ray") == fingerprint(tmp_path / "alone")
    assert verify_run(tmp_path / "ray").damage == []


def test_a_node_that_would_compute_something_else_says_so(tiny: Any, tmp_path: Path) -> None:
    run = new_run(on_ray(tiny, "auto"), tmp_path / "run")
    here = machine_identity(run.config)
    _Worker().ready(str(run.path), here, run.config)
    other = here | {"versions": here["versions"] | {"torch": "1.13.1"}}
    with pytest.raises(WorkerError, match=r"differs from the machine of the run.*versions\.torch: 1\.13\.1 -> 2"):
        _Worker().ready(str(run.path), other, run.config)
    with pytest.raises(
        WorkerError, match=r"does not see the run folder .*gone: put it on storage that all nodes share"
    ):
        _Worker().ready(str(tmp_path / "gone"), here, run.config)


def test_a_node_that_does_not_reach_a_run_in_a_store_says_so(
    tiny: Any, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(on_ray(tiny, "auto"), tmp_path / "run")
    here = machine_identity(run.config)
    for name, value in {**s3.environment, CACHE: str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3.new_bucket()}/run"
    with pytest.raises(WorkerError, match=f"the Ray node .* does not reach the run: {url} is not a run: it has no run"):
        _Worker().ready(url, here, run.config)
    s3.client().put_object(Bucket=url.split("/")[2], Key="run/run.json", Body=(run.path / "run.json").read_bytes())
    _Worker().ready(url, here, run.config)
    monkeypatch.setitem(sys.modules, "botocore.config", None)
    with pytest.raises(WorkerError, match=r'does not reach the run: .* needs boto3, .* pip install "rlhf-flow\[s3\]"'):
        _Worker().ready(url, here, run.config)


@pytest.mark.slow
def test_what_keeps_a_worker_from_its_work_is_for_who_waits(
    two: RayWorkers, nodes: RayNodes, tiny: Any, tmp_path: Path
) -> None:
    run = new_run(on_ray(tiny, nodes.address, num_workers=1, generate={"num_cpus": 0.5}), tmp_path / "run")
    (tmp_path / "run" / "run.json").rename(tmp_path / "elsewhere")
    there = RayWorkers(run)
    for _ in range(2):
        with pytest.raises(WorkerError, match="does not see the run folder"):
            there.call("generate", "a note", note, tmp_path / "note")


@pytest.mark.slow
def test_needs_are_met_or_refused(two: RayWorkers, nodes: RayNodes, tiny: Any, tmp_path: Path) -> None:
    shelf = on_ray(tiny, nodes.address, generate={"custom": {"shelf": 1.0}, "num_cpus": 0.0})
    there = RayWorkers(new_run(shelf, tmp_path / "shelf"))
    assert there.count == 3, "one with a shelf to generate, two with a CPU for the others"
    there.call("generate", "a note", note, tmp_path / "note")
    a_gpu = on_ray(tiny, nodes.address, score_rewards={"num_gpus": 1.0})
    with pytest.raises(
        UserError, match=r"execution\.ray\.score_rewards asks for CPU 1, GPU 1, and the Ray cluster has CPU 2, shelf 1"
    ):
        RayWorkers(new_run(a_gpu, tmp_path / "gpu"))


@pytest.mark.slow
def test_who_waits_for_a_node_in_vain_is_told(two: RayWorkers, nodes: RayNodes, tiny: Any, tmp_path: Path) -> None:
    whole = on_ray(tiny, nodes.address, num_workers=1, generate={"labels": {"zone": "moon"}}, patience_s=2.0)
    told = pytest.raises(
        WorkerError, match=r"no node .*patience_s 2 s: it needs CPU 1, zone=moon, and the cluster has CPU 2"
    )
    there = RayWorkers(new_run(whole, tmp_path / "run"))
    with told:
        there.call("generate", "a note", note, tmp_path / "note")


def test_ray_is_optional(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r'pip install "rlhf-flow\[ray\]"'):
        RayWorkers(new_run(on_ray(tiny, "auto"), tmp_path / "run"))


@pytest.mark.slow
def test_a_cluster_that_is_not_there(tiny: Any, tmp_path: Path) -> None:
    """In a process that has joined none: who has joined one stays there."""
    script = (
        "from tasks.ray.workers import _connected\n"
        "from rlhf_core.contracts.errors import UserError\n"
        "try: _connected('127.0.0.1:9')\n"
        "except UserError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "execution.ray.address '127.0.0.1:9' is no Ray cluster that this process can join" in told.stdout
