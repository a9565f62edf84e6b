"""A replay gives the bits that are stored, or shows where it does not; and it changes nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from replays import (
    POSITION,
    ROW,
    another_advantage,
    another_update,
    on_other_machine,
    refuse,
    run_of,
    state_of,
    without_drawing,
)
from tiny_world import Tiny
from torture.runs import go_on

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.identity import run_identity
from rlhf_core.replay.outcome import Replay, StageReplay
from rlhf_core.stages.generate import generate
from tasks.lifecycle import start as lifecycle
from tasks.lifecycle.start import record_drift
from tasks.replay.iteration import replay_iteration


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody changes."""
    return run_of(tiny, tmp_path_factory.mktemp("replayed") / "run")


@pytest.fixture
def own(run_dir: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(run_dir, tmp_path / "run", symlinks=True))


def verdicts(replay: Replay) -> dict[str, bool | None]:
    return {stage.stage: stage.is_identical for stage in replay.stages}


def of(replay: Replay, stage: str) -> StageReplay:
    return next(found for found in replay.stages if found.stage == stage)


ALL = dict.fromkeys(STAGES, True)


class TestIdentical:
    @pytest.mark.parametrize("iteration", [0, 1, 2])
    def test_all_six_stages_and_the_weights(self, run_dir: Path, iteration: int) -> None:
        """From the beginning, from an update computed again, and from a checkpoint."""
        before = state_of(run_dir)
        replay = replay_iteration(str(run_dir), iteration)
        assert verdicts(replay) == ALL
        assert all(stage.replayed == stage.stored and stage.seconds > 0 for stage in replay.stages)
        (weights,) = [stage.weights for stage in replay.stages if stage.weights is not None]
        assert (
            weights[0]
            == weights[1]
            == RunFolder.open(run_dir).manifests(iteration)["ppo_update"].inputs["policy_after"]
        )
        assert replay.conditions == ()
        assert state_of(run_dir) == before, "a replay changes nothing"

    @pytest.mark.parametrize(
        "changes",
        [
            {"prompts": {"batch_size": 8, "samples_per_prompt": 2}, "shaping": {"estimator": "rloo"},
             "policy": {"lora": {"rank": 2}}, "kl": {"controller": "log_pi", "target": 0.5}},
            {"shaping": {"score_normalization": "running", "score_clip": 2.0}, "policy": {"critic": {"kind": "shared"}},
             "artifacts": {"keep_iterations": 1}, "generation": {"max_new_tokens": 6, "top_k": 20}},
        ],
        ids=["rloo, LoRA, log_pi", "gae, shared critic, running scores, archived, top-k"],
    )  # fmt: skip
    def test_runs_of_other_kinds(self, tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
        tree = {name: section | _base(tiny, name) for name, section in changes.items()}
        run_dir = run_of(tiny, tmp_path / "run", tree)
        archived = not (run_dir / "iterations/000000").exists()
        assert archived == ("artifacts" in changes)
        assert verdicts(replay_iteration(str(run_dir), 0 if archived else 1)) == ALL

    def test_from_a_stage_on(self, run_dir: Path) -> None:
        replay = replay_iteration(str(run_dir), 1, first="shape_rewards")
        assert verdicts(replay) == {"shape_rewards": True, "ppo_update": True}

    def test_before_and_after_an_accepted_drift(self, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in ("iterations/000002", "checkpoints/000003", "before_after.json"):
            target = own / path
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        on_lifecycle = lifecycle.run_identity
        with monkeypatch.context() as patch, without_drawing():
            patch.setattr(lifecycle, "run_identity", lambda *a: on_lifecycle(*a) | {"instruction_set": "other"})
            record_drift(str(own))
            go_on(own)
        assert [drift.iteration for drift in RunFolder.open(own).drifts] == [2]
        for iteration in (1, 2):
            assert verdicts(replay_iteration(str(own), iteration)) == ALL


def _base(tiny: Tiny, section: str) -> dict[str, Any]:
    """What the tiny world needs of a section."""
    return {"prompts": {"source": str(tiny.prompts)}, "policy": {"model": str(tiny.policy)}}.get(section, {})


class TestDifferent:
    def test_one_value_is_found_where_it_is(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_advantage(monkeypatch)
        replay = replay_iteration(str(run_dir), 1)
        assert verdicts(replay) == ALL | {"shape_rewards": False}, "the update is given what is stored"
        stage = of(replay, "shape_rewards")
        assert stage.difference is not None
        assert stage.replayed != stage.stored
        (column,) = stage.difference.columns
        first, table = column.first, stored(run_dir, 1, "shape_rewards")
        assert (first.column, first.row, first.position) == ("advantages", ROW, POSITION)
        assert first.key == table["sample_id"][ROW].as_py()
        assert first.stored == table["advantages"][ROW][POSITION].as_py()
        assert (column.num_different, column.largest_ulp) == (1, 1)
        assert replay.conditions == (), "nothing in the identity explains it"

    def test_another_machine_is_named(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_advantage(monkeypatch)
        on_other_machine(monkeypatch, run_identity)
        replay = replay_iteration(str(run_dir), 1, first="shape_rewards")
        (line,) = replay.conditions
        assert line.startswith("versions.torch: ")
        assert line.endswith(" -> 99.0")

    def test_another_number_of_threads_is_named(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        used: list[int] = []

        def watched(*arguments: Any, **settings: Any) -> Any:
            used.append(torch.get_num_threads())
            return generate(*arguments, **settings)

        monkeypatch.setattr("rlhf_core.stages.generate.generate", watched)
        another_advantage(monkeypatch)
        replay = replay_iteration(str(run_dir), 0, num_threads=2)
        assert used == [2]
        assert (replay.num_threads, replay.threads_of_run) == (2, 1)
        assert replay.conditions == ("num_threads: 1 -> 2",)

    def test_another_temperature(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def hotter(policy: Any, tokenizer: Any, prompts: Any, config: Any, **settings: Any) -> Any:
            return generate(policy, tokenizer, prompts, config.model_copy(update={"temperature": 1.5}), **settings)

        monkeypatch.setattr("rlhf_core.stages.generate.generate", hotter)
        replay = replay_iteration(str(run_dir), 0)
        assert verdicts(replay) == ALL | {"generate": False}
        difference = of(replay, "generate").difference
        assert difference is not None
        assert "logprobs" in [column.first.column for column in difference.columns]

    def test_an_update_that_leads_elsewhere(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_update(monkeypatch)
        stage = of(replay_iteration(str(run_dir), 0, first="ppo_update"), "ppo_update")
        assert stage.difference is None, "its statistics are the same"
        assert stage.is_identical is False
        assert stage.weights is not None
        assert stage.weights[0] != stage.weights[1]
        assert [line.split(":")[0] for line in stage.others] == ["provenance inputs"]

    def test_weights_that_cannot_be_had_again(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a checkpoint of iteration 1 its weights are computed again, and come out otherwise here."""
        another_update(monkeypatch)
        replay = replay_iteration(str(run_dir), 1)
        assert verdicts(replay) == ALL | {"generate": False, "ppo_update": False}
        assert "gives other weights than it committed" in str(of(replay, "generate").failed)

    def test_a_stage_that_fails(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rlhf_core.stages.ppo_update.RATIO_TOLERANCE", {torch.float32: -1.0})
        stage = of(replay_iteration(str(run_dir), 0, first="ppo_update"), "ppo_update")
        assert stage.is_identical is False
        assert "the ratio to the behaviour policy must be 1" in str(stage.failed)

    def test_a_stored_metric_that_somebody_has_changed(self, own: Path) -> None:
        path = own / "iterations/000000/05_experience.json"
        record = read_record(path)
        write_record(path, record | {"metrics": {**record["metrics"], "objective/kl": 0.25}})
        stage = of(replay_iteration(str(own), 0, first="shape_rewards"), "shape_rewards")
        assert stage.is_identical is False
        assert stage.others[0].startswith("metric objective/kl: 0.25 -> ")


class TestOneSample:
    def test_token_by_token(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        another_advantage(monkeypatch)
        table = stored(run_dir, 1, "shape_rewards")
        changed, other = (table["sample_id"][row].as_py() for row in (ROW, 0))
        replay = replay_iteration(str(run_dir), 1, sample=changed)
        assert verdicts(replay)["shape_rewards"] is False
        cell = replay.tokens[POSITION]["advantage"]
        assert cell["stored"] == table["advantages"][ROW][POSITION].as_py() < cell["replayed"]
        assert replay.tokens[0]["token"], "its text"
        rest = [v for row in replay.tokens for k, v in row.items() if k not in ("position", "token", "advantage")]
        assert all(cell["stored"] == cell["replayed"] for cell in rest)
        assert len(replay.tokens) == len(table["advantages"][ROW])
        assert replay_iteration(str(run_dir), 1, first="shape_rewards", sample=other).is_identical

    def test_what_was_not_computed_stands_alone(self, run_dir: Path) -> None:
        sample = stored(run_dir, 1, "generate")["sample_id"][0].as_py()
        first = replay_iteration(str(run_dir), 1, first="shape_rewards", sample=sample).tokens[0]
        assert first["logprob"].keys() == {"stored"}
        assert first["reward"].keys() == {"stored", "replayed"}


def stored(run_dir: Path, iteration: int, stage: str) -> pa.Table:
    return read_artifact(run_dir, RunFolder.open(run_dir).manifests(iteration)[stage].artifact)


SCORER = "def scorer(responses, **_):\n    return [float(len(r) % 5) for r in responses]\n"


@pytest.fixture(scope="module")
def mine(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A run with a function of its own, and that function's file."""
    place = tmp_path_factory.mktemp("code")
    module = place / "own_scorer_of_replays.py"
    module.write_text(SCORER)
    components = [
        {"kind": "model", "model": str(tiny.reward)},
        {"kind": "function", "name": "mine", "function": f"{module.stem}:scorer"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        yield run_of(tiny, place / "run", {"reward": {"components": components}, "num_iterations": 1}), module
    sys.modules.pop(module.stem, None)


class TestRewardsThatAreNotHere:
    def test_here_it_is_called(self, mine: tuple[Path, Path]) -> None:
        assert verdicts(replay_iteration(str(mine[0]), 0)) == ALL

    @pytest.mark.parametrize("harm", ["gone", "changed"])
    def test_else_scoring_is_left_out_and_nothing_is_imported(
        self, mine: tuple[Path, Path], harm: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_dir, module = mine
        monkeypatch.delitem(sys.modules, module.stem)
        module.unlink() if harm == "gone" else module.write_text("raise SystemExit('evil')\n")
        monkeypatch.setattr("rlhf_core.rewards.function._import", refuse)
        replay = replay_iteration(str(run_dir), 0)
        assert verdicts(replay) == ALL | {"score_rewards": None}
        assert replay.is_identical
        said = "there is no module" if harm == "gone" else "the function is not the one of the run: rewards.mine"
        assert said in str(of(replay, "score_rewards").skipped)
        module.write_text(SCORER)


class TestMistakes:
    @pytest.mark.parametrize(
        ("iteration", "settings", "said"),
        [
            (9, {}, r"--iteration 9 is not in .*run: finished are 0 to 2"),
            (-1, {}, r"--iteration -1 is not in .*run: finished are 0 to 2"),
            (None, {}, r"--iteration is missing: finished are 0 to 2"),
            (1, {"first": "shaping"}, r"--from shaping is not a stage; stages: sample_prompts, generate, "),
            (1, {"sample": "i000000-p000000-s0"}, r"--sample i000000-p000000-s0 is not in iteration 1, whose"),
        ],
    )  # fmt: skip
    def test_one_sentence(self, run_dir: Path, iteration: int | None, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            replay_iteration(str(run_dir), iteration, **settings)

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is not a run folder: it has no run\.json"):
            replay_iteration(str(tmp_path), 0)

    def test_an_unfinished_iteration(self, own: Path) -> None:
        for name in ("05_experience", "06_update"):
            for ending in ("json", "arrow"):
                (own / f"iterations/000002/{name}.{ending}").unlink()
        said = (
            r"--iteration 2 of .*run is not finished: of its six stages only sample_prompts, generate, score_rewards, "
            r"reference_logprobs are committed; finished are 0 to 1"
        )
        with pytest.raises(UserError, match=said):
            replay_iteration(str(own), 2)

    def test_a_run_of_another_schema_version(self, own: Path) -> None:
        path = own / "iterations/000001/03_scores.json"
        write_record(path, read_record(path) | {"schema_version": 1})
        with pytest.raises(IntegrityError, match=r"03_scores\.json has schema version 1, this release reads 2"):
            replay_iteration(str(own), 1)

    def test_a_damaged_artifact_is_told_before_anything_is_computed(self, own: Path) -> None:
        path = own / "iterations/000001/03_scores.arrow"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        with pytest.raises(IntegrityError, match=r"03_scores\.arrow is damaged"):
            replay_iteration(str(own), 1)
