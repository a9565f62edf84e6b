"""Stages that overlap: the next prompts are answered while the policy moves, by the policy as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from sharded_runs import SECTIONS, config
from torture.runs import fingerprint, go_on, start

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.shards import SHARDS, Shard, part_path
from rlhf_core.verification.run import verify_run
from tasks.lifecycle.repair import repair_run
from tasks.replay.iteration import replay_iteration
from tasks.replay.what_if import ask_what_if
from tasks.session.policy_state import PolicyState
from tasks.session.session import open_session
from tasks.shards import workers
from tasks.shards.stages import ShardedStages


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    open_session.cache_clear()
    yield
    open_session.cache_clear()


def ahead(tiny: Any, num_workers: int, **sections: Any) -> Any:
    given = config(tiny, num_workers, SECTIONS["separate critic"], num_shards=2).model_dump()
    given["execution"] |= {"overlap": True}
    given["num_iterations"] = 4
    for name, section in sections.items():
        given[name] |= section
    return build_config(given)


@pytest.fixture(scope="module")
def alone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this process alone: it answers when the update is done, with the weights of before."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    start(ahead(tiny, 0), run_dir)
    return run_dir


def test_prompts_are_answered_by_the_policy_before_the_last_update(alone: Path) -> None:
    run = RunFolder.open(alone)
    after = ["initial"] + [run.manifests(i)["ppo_update"].inputs["policy_after"] for i in range(4)]
    answered = [run.manifests(i)["generate"].inputs["policy"] for i in range(4)]
    assert answered == ["initial", "initial", after[1], after[2]]
    assert [run.manifests(i)["ppo_update"].inputs["policy"] for i in range(4)] == after[:4]
    assert verify_run(alone).damage == []


def test_what_is_one_update_old_is_weighted(alone: Path) -> None:
    metrics = [RunFolder.open(alone).manifests(i)["ppo_update"].metrics for i in range(4)]
    assert metrics[0]["sampler/logprob_gap_max"] < 1e-4, "the first responses are the policy's own"
    assert metrics[0]["sampler/weight_avg"] == pytest.approx(1.0, abs=1e-4)
    for later in metrics[1:]:
        assert later["sampler/logprob_gap_avg"] > 1e-4
        assert later["sampler/weight_avg"] == pytest.approx(1.0, abs=0.2), "of a sampler's tokens it is 1 on average"
        assert later["guard/first_max_abs_log_ratio"] < 1e-4, "the ratio is to the policy that moves"


def test_workers_answer_while_the_policy_moves(
    tiny: Any, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    joined = ShardedStages.generate

    def looked(work: ShardedStages, iteration: int, refs: Any) -> Any:
        run = work.session.run
        seen.append(all(part_path(run.path, "generate", iteration, Shard(n, 2)).is_file() for n in range(2)))
        return joined(work, iteration, refs)

    monkeypatch.setattr(ShardedStages, "generate", looked)
    run_dir = tmp_path / "run"
    start(ahead(tiny, 2), run_dir)
    assert seen == [True] * 4
    assert fingerprint(run_dir) == fingerprint(alone)
    assert not any((run_dir / SHARDS).rglob("*.arrow"))
    assert workers.workers() is None


def test_a_run_that_is_stopped_in_between_goes_on_exactly(
    tiny: Any, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the update of the third iteration, and then before the fourth one has its responses."""
    run_dir = tmp_path / "run"
    for stop_at, holder, name in ((2, PolicyState, "update"), (3, ShardedStages, "generate")):
        real = getattr(holder, name)

        def stop(work: Any, iteration: int, refs: Any, real: Any = real, stop_at: int = stop_at) -> Any:
            if iteration == stop_at:
                raise KeyboardInterrupt
            return real(work, iteration, refs)

        monkeypatch.setattr(holder, name, stop)
        with pytest.raises(KeyboardInterrupt):
            (go_on(run_dir) if (run_dir / "run.json").is_file() else start(ahead(tiny, 0), run_dir))
        monkeypatch.undo()
    go_on(run_dir)
    assert fingerprint(run_dir) == fingerprint(alone)


def test_a_cap_of_one_cuts_weights(tiny: Any, tmp_path: Path, alone: Path) -> None:
    start(ahead(tiny, 0, ppo={"importance_cap": 1.0}), tmp_path / "run")
    metrics = RunFolder.open(tmp_path / "run").manifests(1)["ppo_update"].metrics
    assert metrics["sampler/capped_fraction"] > 0.2
    assert metrics["sampler/weight_avg"] < 1.0
    tables = [
        read_artifact(path, RunFolder.open(path).manifests(1)["ppo_update"].artifact)
        for path in (alone, tmp_path / "run")
    ]
    assert not tables[0].equals(tables[1])


def test_it_needs_shards(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"execution\.overlap is true, but execution\.num_shards is 1"):
        build_config(config(tiny, None, num_shards=1).model_dump(), ["execution.overlap=true"])


def test_it_is_replayed_and_repaired_like_any_other(alone: Path, tmp_path: Path) -> None:
    for iteration in range(4):
        assert replay_iteration(str(alone), iteration).is_identical
    assert ask_what_if(str(alone), 2, ["ppo.importance_cap=1"]).computed == ["ppo_update"]
    damaged = tmp_path / "run"
    shutil.copytree(alone, damaged)
    for artifact in ("iterations/000001/02_rollouts.arrow", "iterations/000002/02_rollouts.arrow"):
        flip(damaged / artifact)
    open_session.cache_clear()
    assert repair_run(str(damaged))
    assert verify_run(damaged).damage == []
    assert fingerprint(damaged) == fingerprint(alone)
