"""Stages by shards: the same run whoever computes them, however often a worker dies."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sharded_runs import SECTIONS, config
from torture.runs import fingerprint, go_on, start

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config_io import build_config, config_digest
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.shards import SHARDS, Shard, part_path
from rlhf_core.verification.run import verify_run
from tasks.session.session import open_session
from tasks.shards import stages as shards
from tasks.shards import workers
from tasks.shards.local_workers import LocalWorkers
from tasks.shards.stages import ShardedStages


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    open_session.cache_clear()
    yield
    open_session.cache_clear()


@pytest.fixture(scope="module")
def two() -> Iterator[LocalWorkers]:
    """Two workers for several runs: to begin one takes longer than a run."""
    there = LocalWorkers(2)
    with workers.using_workers(there):
        yield there


@pytest.fixture
def shared(two: LocalWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that asks for workers gets these."""

    @contextlib.contextmanager
    def those(run: RunFolder) -> Iterator[None]:
        monkeypatch.setattr(workers, "_current", two if run.config.execution.num_workers else None)
        yield

    monkeypatch.setattr("flows.ppo.shard_workers", those)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("case", SECTIONS)
def test_the_run_is_the_same_whatever_the_number_of_workers(case: str, tiny: Any, tmp_path: Path) -> None:
    prints: dict[int, str] = {}
    for num_workers in (0, 2):
        run_dir = tmp_path / str(num_workers)
        start(config(tiny, num_workers, SECTIONS[case]), run_dir)
        prints[num_workers] = fingerprint(run_dir)
        assert not any((run_dir / SHARDS).rglob("*.arrow")), "what was merged is dropped"
        assert verify_run(run_dir).damage == []
    assert len(set(prints.values())) == 1


def test_shards_agree_with_the_whole_to_the_last_bits(tiny: Any, tmp_path: Path) -> None:
    """Sums over another number of rows are rounded differently, and nothing else differs."""
    for name, number in (("whole", 1), ("shards", 3)):
        start(config(tiny, 0 if number > 1 else None, num_shards=number), tmp_path / name)
    tables = {
        name: [
            read_artifact(tmp_path / name, RunFolder.open(tmp_path / name).manifests(0)[stage].artifact)
            for stage in ("generate", "score_rewards", "reference_logprobs")
        ]
        for name in ("whole", "shards")
    }
    whole, parts = tables["whole"][0], tables["shards"][0]
    assert whole["sample_id"].to_pylist() == parts["sample_id"].to_pylist()
    assert whole["response_tokens"].to_pylist() == parts["response_tokens"].to_pylist()
    for column in ("logprobs", "values"):
        flat = [table[column].combine_chunks().flatten().to_pylist() for table in (whole, parts)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4)
    for mine, theirs in zip(tables["whole"][1:], tables["shards"][1:], strict=True):
        assert mine["sample_id"].to_pylist() == theirs["sample_id"].to_pylist()
    metrics = [RunFolder.open(tmp_path / name).manifests(0) for name in ("whole", "shards")]
    for stage in ("generate", "score_rewards"):
        assert metrics[0][stage].metrics == pytest.approx(dict(metrics[1][stage].metrics), abs=1e-4)


def test_only_numbers_of_shards_and_threads_are_part_of_what_a_run_is(tiny: Any) -> None:
    digests = {config_digest(config(tiny, n)) for n in (0, 1, 2, None)}
    assert len(digests) == 1
    assert config_digest(config(tiny, 2, num_shards=2)) not in digests


@pytest.mark.usefixtures("shared")
def test_one_worker_comes_to_the_same(tiny: Any, tmp_path: Path, two: LocalWorkers) -> None:
    """As two do: one of them is kept away."""
    start(config(tiny, 0), tmp_path / "none")
    away = two._idle.get()
    try:
        start(config(tiny, 1), tmp_path / "one")
    finally:
        two._idle.put(away)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "none")


def test_a_worker_killed_in_each_iteration_changes_nothing(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    start(config(tiny, 0), tmp_path / "undisturbed")
    stop = threading.Event()

    def kill() -> None:
        """Whoever is at work on the first shard of scores of an iteration, once each."""
        killed: set[str] = set()
        while not stop.wait(0.002):
            there = workers.workers()
            iterations = sorted((tmp_path / "killed" / SHARDS).glob("[0-9]*"))
            if not isinstance(there, LocalWorkers) or not iterations or iterations[-1].name in killed:
                continue
            if len(pids := there.process_ids()) == 2:
                killed.add(iterations[-1].name)
                os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        start(config(tiny, 2), tmp_path / "killed")
    finally:
        stop.set()
        killer.join()
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "undisturbed")
    assert "a worker died computing" in caplog.text


def test_parts_of_a_stopped_run_are_taken_over_and_damaged_ones_computed_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config(tiny, 0), tmp_path / "undisturbed")
    expected = fingerprint(tmp_path / "undisturbed")
    run_dir = tmp_path / "stopped"

    def stop(work: ShardedStages, iteration: int, refs: Any) -> Any:
        """After two of three shards of the second iteration's responses."""
        if iteration != 1:
            return joined(work, iteration, refs)
        prompts = work.session.run.manifests(1)["sample_prompts"].artifact
        for number in (0, 1):
            shards.compute_part("generate", str(run_dir), 1, Shard(number, 3), [prompts])
        raise KeyboardInterrupt

    joined = ShardedStages.generate
    monkeypatch.setattr(ShardedStages, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        start(config(tiny, 0), run_dir)
    monkeypatch.undo()
    taken, damaged = (part_path(run_dir, "generate", 1, Shard(number, 3)) for number in (0, 1))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    computed: list[tuple[str, int, str]] = []
    compute = ShardedStages.compute_part

    def noted(work: ShardedStages, stage: str, iteration: int, shard: Shard, refs: Any) -> Any:
        computed.append((stage, iteration, str(shard)))
        return compute(work, stage, iteration, shard, refs)

    monkeypatch.setattr(ShardedStages, "compute_part", noted)
    assert taken.is_file()
    go_on(run_dir)
    assert [c for c in computed if c[:2] == ("generate", 1)] == [("generate", 1, "1-of-3"), ("generate", 1, "2-of-3")]
    assert fingerprint(run_dir) == expected


def test_a_mistake_in_a_shard_is_the_sentence_that_it_was(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_reward.py").write_text("def nan(responses, **_):\n    return [float('nan')] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    component = {"kind": "function", "function": "bad_reward:nan", "name": "bad"}
    given = config(tiny, 2).model_dump() | {"reward": {"components": [component]}}
    with pytest.raises(NumericalError, match="reward component bad gave nan"):
        start(build_config(given), tmp_path / "run")


@pytest.mark.usefixtures("shared")
def test_through_prefect_each_shard_is_a_task_run(tiny: Any, tmp_path: Path, prefect_server: None) -> None:
    from prefect.client.orchestration import get_client

    from flows.ppo import train

    start(config(tiny, 0), tmp_path / "bare")
    train(config(tiny, 2), str(tmp_path / "run"))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "bare")
    with get_client(sync_client=True) as client:
        names = {run.name for run in client.read_task_runs(limit=200)}
    assert {f"{stage}-{i}-shard-{n}" for stage in shards.SHARDED for i in range(3) for n in range(3)} <= names
