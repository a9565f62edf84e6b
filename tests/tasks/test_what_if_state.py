"""What if, where the answer stands on earlier iterations: judged by NumPy, from the artifacts of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from replays import refuse, run_of, state_of
from tiny_world import Tiny
from tolerances import F32_OP

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.checkpoints import new_trainer
from rlhf_core.replay.what_if import WhatIf, with_optimizer_of
from tasks.replay.bundle import make_bundle
from tasks.replay.what_if import ask_what_if

Numbers = npt.NDArray[np.float64]
LENGTH: dict[str, Any] = {"kind": "function", "name": "len", "function": "length", "weight": 0.25}
NORMALIZATION = "shaping.score_normalization"


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that does not normalise."""
    return run_of(tiny, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def running(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that normalises by all scores so far, of a model and a function, in two shards, with log_pi."""
    changes = {
        "reward": {"components": [{"kind": "model", "name": "model", "model": str(tiny.reward)}, LENGTH]},
        "shaping": {"score_normalization": "running"},
        "execution": {"num_shards": 2, "num_workers": 0},
        "kl": {"controller": "log_pi", "target": 0.5},
    }
    return run_of(tiny, tmp_path_factory.mktemp("running") / "run", changes)


def ask(run: Path, *overrides: str, iteration: int = 2) -> WhatIf:
    return ask_what_if(str(run), iteration, overrides)


def column(run: Path, stage: str, iteration: int, name: str) -> list[Any]:
    return read_artifact(run, RunFolder.open(run).manifests(iteration)[stage].artifact)[name].to_pylist()


def stored_scores(run: Path, iteration: int) -> Numbers:
    return np.array(column(run, "score_rewards", iteration, "score"))


def lens(run: Path, iteration: int) -> Numbers:
    return np.array([float(len(tokens)) for tokens in column(run, "generate", iteration, "response_tokens")])


def weighted(run: Path, iteration: int) -> Numbers:
    """Model + 0.75 x length instead of model + 0.25 x length."""
    return stored_scores(run, iteration) + 0.5 * lens(run, iteration)


def normalized(scores: Callable[[Path, int], Numbers], run: Path, iteration: int, *, over: str) -> Numbers:
    """(score - mean) / std, over the iterations that count."""
    last = {"running": iteration, "reference": 0}[over]
    measured = np.concatenate([scores(run, before) for before in range(last + 1)])
    return (scores(run, iteration) - measured.mean()) / measured.std()


def assert_shaped(answer: WhatIf, expected: Numbers) -> None:
    found = {quantity.name: quantity.what_if for quantity in answer.quantities}
    assert found["score after shaping, mean"] == pytest.approx(expected.mean(), rel=1e-5, abs=1e-6)
    assert found["score after shaping, std"] == pytest.approx(expected.std(), rel=1e-5)


class TestMoments:
    @pytest.mark.parametrize("iteration", [0, 1, 2])
    @pytest.mark.parametrize("over", ["running", "reference"])
    def test_of_a_run_that_does_not_normalise(self, plain: Path, over: str, iteration: int) -> None:
        """They come from the stored scores of all earlier iterations, or of the first: never of this one alone."""
        before = state_of(plain)
        answer = ask(plain, f"{NORMALIZATION}={over}", iteration=iteration)
        expected = normalized(stored_scores, plain, iteration, over=over)
        assert_shaped(answer, expected)
        if iteration:
            assert abs(expected.mean()) > 0.01, "of this iteration alone it would be 0"
        assert state_of(plain) == before

    def test_of_a_run_that_normalises_otherwise(self, running: Path) -> None:
        answer = ask(running, f"{NORMALIZATION}=reference")
        assert_shaped(answer, normalized(stored_scores, running, 2, over="reference"))
        assert_shaped(ask(running, f"{NORMALIZATION}=none"), stored_scores(running, 2))

    def test_other_knobs_leave_them(self, running: Path) -> None:
        answer = ask(running, "kl.coef=1.0")
        assert_shaped(answer, normalized(stored_scores, running, 2, over="running"))

    def test_another_weight_changes_the_earlier_scores_as_well(
        self, running: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Their components are stored, so no model is asked, and no worker."""
        monkeypatch.setattr("tasks.session.scoring_models.load_component", refuse)
        answer = ask(running, "reward.components.1.weight=0.75")
        assert_shaped(answer, normalized(weighted, running, 2, over="running"))
        both = ask(running, "reward.components.1.weight=0.75", f"{NORMALIZATION}=reference", "kl.coef=1.0")
        assert_shaped(both, normalized(weighted, running, 2, over="reference"))
        assert {quantity.name: quantity.what_if for quantity in both.quantities}["β"] == 1.0

    def test_another_component_scores_the_earlier_responses_again(self, running: Path) -> None:
        told: list[str] = []
        overrides = ["reward.components=[{kind: function, function: length}]"]
        answer = ask_what_if(str(running), 2, overrides, progress=told.append)
        assert_shaped(answer, normalized(lens, running, 2, over="running"))
        assert told[:3] == ["score_rewards of iteration 0", "score_rewards of iteration 1", "score_rewards"]

    def test_a_bundle_has_no_earlier_scores(self, plain: Path, running: Path, tmp_path: Path) -> None:
        make_bundle(str(plain), 2, str(tmp_path / "plain.zip"), with_models=False)
        with pytest.raises(
            UserError, match=r"--set shaping\.score_normalization .* scores of iterations 0 to 1; ask the"
        ):
            ask(tmp_path / "plain.zip", f"{NORMALIZATION}=running")
        with pytest.raises(UserError, match="scores of iteration 0; ask the run folder"):
            ask(tmp_path / "plain.zip", f"{NORMALIZATION}=reference")
        assert_shaped(ask(tmp_path / "plain.zip", "kl.coef=1.0"), stored_scores(plain, 2))
        make_bundle(str(running), 2, str(tmp_path / "running.zip"), with_models=False)
        with pytest.raises(
            UserError, match=r"--set reward\.components\.1\.weight changes what .* running has measured"
        ):
            ask(tmp_path / "running.zip", "reward.components.1.weight=0.75")


class TestController:
    def test_log_pi_does_not_compare_two_references(self, running: Path, tiny: Tiny) -> None:
        """Its memory is the KL of the iteration before, to the reference of the run."""
        answer = ask(running, f"reference.model={tiny.policy}", "shaping.score_normalization=none")
        assert {quantity.name: quantity.what_if for quantity in answer.quantities}["β of the next iteration"] is None
        answer = ask(running, "kl.estimator=k3")
        assert {quantity.name: quantity.what_if for quantity in answer.quantities}[
            "β of the next iteration"
        ] is not None


class TestOptimizer:
    @pytest.mark.parametrize(("beta1", "beta2"), [(0.999, 0.999), (0.9, 0.5), (0.0, 0.999)])
    def test_other_betas_begin_with_the_same_step(self, plain: Path, beta1: float, beta2: float) -> None:
        """Eight steps with a gradient of 1, then one of 0: by hand, with the moments' own corrections."""
        config = RunFolder.open(plain).config
        trainer = new_trainer(config, torch.device("cpu"))
        parameter = next(p for _, p in trainer.actor_critic.policy_parameters())
        for _ in range(8):
            trainer.optimizer.zero_grad()
            parameter.grad = torch.ones_like(parameter)
            trainer.optimizer.step()
        changed = config.ppo.model_copy(update={"adam_beta1": beta1, "adam_beta2": beta2})
        asked = with_optimizer_of(trainer, config.model_copy(update={"ppo": changed})).optimizer
        before = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
        asked.step()
        # the corrected moments were 1; one more gradient of 0, at step 9
        m = (1 - beta1**8) * beta1 / (1 - beta1**9)
        v = (1 - beta2**8) * beta2 / (1 - beta2**9)
        rate = asked.param_groups[0]["lr"]
        expected = rate * m / (v**0.5 + config.ppo.adam_eps)
        torch.testing.assert_close(before - parameter.detach(), torch.full_like(before, expected), **F32_OP)

    def test_it_is_said(self, plain: Path) -> None:
        assert ["AdamW's moments" in note for note in ask(plain, "ppo.adam_beta1=0.5").notes] == [True]


def test_values_of_the_runs_critic_are_named(plain: Path) -> None:
    notes = ask(plain, "shaping.length_penalty=1.0", "ppo.clip_range=0.1").notes
    assert [note.split(":")[0] for note in notes] == [
        "values are those of the run's critic, which has learned the run's returns"
    ]
    assert "--set shaping.length_penalty gives" in notes[0]
    assert not ask(plain, "shaping.whiten_advantages=false").notes
    assert not ask(plain, "shaping.estimator=reward", "shaping.length_penalty=1.0").notes
