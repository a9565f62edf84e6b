"""What if: the same responses under other knobs, from the first stage that they affect; nothing else moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from replays import refuse, run_of, state_of
from tiny_world import Tiny

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.replay.what_if import WhatIf
from tasks.replay.what_if import ask_what_if


@pytest.fixture(scope="module")
def run_dir(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tiny, tmp_path_factory.mktemp("asked") / "run")


def ask(run_dir: Path, *overrides: str, iteration: int = 1, sample: str | None = None) -> WhatIf:
    return ask_what_if(str(run_dir), iteration, overrides, sample=sample)


def numbers(answer: WhatIf) -> dict[str, tuple[Any, Any]]:
    return {quantity.name: (quantity.stored, quantity.what_if) for quantity in answer.quantities}


def moved(answer: WhatIf) -> set[str]:
    return {name for name, (stored, what_if) in numbers(answer).items() if stored != what_if}


def stored(run_dir: Path, stage: str, iteration: int = 1) -> pa.Table:
    return read_artifact(run_dir, RunFolder.open(run_dir).manifests(iteration)[stage].artifact)


@pytest.fixture
def no_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("sample_prompts", "generate", "reference_logprobs"):
        where = "tasks.session.session" if stage == "sample_prompts" else f"rlhf_core.stages.{stage}"
        monkeypatch.setattr(f"{where}.{stage}", refuse)


@pytest.mark.usefixtures("no_generation")
class TestBeta:
    @pytest.mark.parametrize("iteration", [0, 1])
    def test_the_penalty_scales_and_the_rest_follows(self, run_dir: Path, iteration: int) -> None:
        """At iteration 1 β is the controller's, not the config's."""
        before = state_of(run_dir)
        beta = RunFolder.open(run_dir).state_before(iteration).kl_coef
        answer = ask(run_dir, f"kl.coef={2 * beta!r}", iteration=iteration)
        found = numbers(answer)
        assert found["β"] == (beta, 2 * beta)
        assert answer.changes == [f"β in force in iteration {iteration} (--set kl.coef): {beta:g} -> {2 * beta:g}"]
        assert answer.computed == ["shape_rewards", "ppo_update"]
        penalty, doubled = found["KL penalty (β·KL), mean"]
        kl = stored(run_dir, "shape_rewards", iteration)["kl"].to_numpy().mean(dtype=np.float64)
        assert penalty == pytest.approx(beta * kl, rel=1e-3, abs=1e-6)
        assert doubled == pytest.approx(2 * beta * kl, rel=1e-3, abs=1e-6)
        assert not {"score, mean", "KL to the reference, nats"} & moved(answer)
        then, now = found["β of the next iteration"]
        assert now == pytest.approx(2 * then, rel=1e-6), "the controller multiplies"
        assert state_of(run_dir) == before

    def test_rewards_of_one_sample(self, run_dir: Path) -> None:
        table, beta = stored(run_dir, "shape_rewards"), RunFolder.open(run_dir).state_before(1).kl_coef
        sample = table["sample_id"][2].as_py()
        answer = ask(run_dir, "kl.coef=0", sample=sample)
        for position, row in enumerate(answer.tokens):
            without = table["rewards"][2][position].as_py() + beta * table["token_kl"][2][position].as_py()
            assert row["reward"]["what_if"] == pytest.approx(without, abs=1e-5)
            assert row["logprob"].keys() == {"stored"}
        assert numbers(answer)["KL penalty (β·KL), mean"][1] == 0.0
        assert numbers(answer)["β of the next iteration"][1] == 0.0

    def test_whose_advantages_change_most(self, run_dir: Path) -> None:
        advantages = ask(run_dir, "kl.coef=5.0").advantages
        assert -1 <= advantages.correlation < 0.9999
        assert 0 < advantages.sign_flips < advantages.num_tokens
        changes = [abs(row["advantage"]["what_if"] - row["advantage"]["stored"]) for row in advantages.most_changed]
        assert len(changes) == 5
        assert changes[0] > 0


@pytest.mark.usefixtures("no_generation")
class TestUpdate:
    def test_a_knob_that_is_not_reached_gives_the_stored_bits(self, run_dir: Path) -> None:
        """Weights, moments and updates before are those of the run."""
        for iteration in (1, 2):
            answer = ask(run_dir, "ppo.max_skipped_steps=5", iteration=iteration)
            assert answer.computed == ["ppo_update"]
            assert moved(answer) == set()

    def test_only_this_iteration_learns_otherwise(self, run_dir: Path) -> None:
        """No checkpoint holds the weights before iteration 1: they come from an update with the run's own rate."""
        answer = ask(run_dir, "ppo.learning_rate=0.01")
        found = numbers(answer)
        assert found["learning_rate of a step"][1] == pytest.approx(10 * found["learning_rate of a step"][0], rel=1e-6)
        assert found["approx_kl of a step"][1] > found["approx_kl of a step"][0]
        assert "score, mean" not in moved(answer)
        assert answer.advantages.correlation == pytest.approx(1.0)

    def test_an_optimizer_of_another_memory(self, run_dir: Path) -> None:
        assert "loss of a step" in moved(ask(run_dir, "ppo.adam_beta1=0.1", iteration=2))

    def test_another_estimator(self, run_dir: Path) -> None:
        answer = ask(run_dir, "shaping.estimator=reinforce++")
        assert "advantages of a token, std" in numbers(answer)
        assert numbers(answer)["returns of a token, mean"][1] is None
        assert answer.advantages.correlation < 1


class TestRewards:
    def test_a_weight_needs_no_model(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the components said is stored."""
        monkeypatch.setattr("tasks.session.scoring_models.load_component", refuse)
        answer = ask(run_dir, "reward.components.0.weight=2.0")
        then, now = numbers(answer)["score, mean"]
        assert now == pytest.approx(2 * then, rel=1e-6)
        assert answer.computed == ["score_rewards", "shape_rewards", "ppo_update"]
        assert answer.changes == ["reward.components.0.weight: 1.0 -> 2.0"]

    def test_another_component_is_called(self, run_dir: Path) -> None:
        component = "reward.components.0={kind: function, function: length}"
        answer = ask(run_dir, component)
        lens = [len(row) for row in stored(run_dir, "generate")["response_tokens"].to_pylist()]
        assert numbers(answer)["score, mean"][1] is not None
        assert len(lens) == 8
        assert "score, std" in moved(answer)

    def test_a_model_that_is_not_there(self, run_dir: Path) -> None:
        with pytest.raises(UserError, match=r"reward\.components\.0\.model '/nowhere/rm' is not a folder here"):
            ask(run_dir, "reward.components.0.model=/nowhere/rm")

    def test_another_reference(self, run_dir: Path, tiny: Tiny) -> None:
        answer = ask(run_dir, f"reference.model={tiny.policy}")
        assert answer.computed[0] == "reference_logprobs"
        assert moved(answer) == set(), "it is the same model"


def test_what_cannot_be_asked_is_told_before_anything_is_loaded(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.replay.source.load_plan", refuse)
    with pytest.raises(UserError, match="would need new responses"):
        ask(run_dir, "generation.top_k=5")
    with pytest.raises(UserError, match="is not in iteration 1"):
        ask(run_dir, "kl.coef=1.0", sample="i000000-p000000-s0")


def test_as_json(run_dir: Path) -> None:
    told = json.loads(json.dumps(ask(run_dir, "kl.coef=1.0").to_json(), allow_nan=False))
    assert told["quantities"][0].keys() == {"name", "stored", "what_if"}
    assert told["advantages"].keys() >= {"correlation", "sign_flips"}
