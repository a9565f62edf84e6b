"""The numerical guards, each at the place that refuses: what is named, and that nothing is moved by it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from iteration import CPU, Bench
from safetensors.torch import load_file, save_file
from tiny_world import Tiny
from torch import Tensor

from rlhf_core.contracts.batches import check_aligned, check_as_long, check_vocabulary
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError, NumericalError, UserError
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.contracts.records import read_json
from rlhf_core.models.checkpoints import new_trainer, save_checkpoint
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.ops.kl import KL_COEF_BOUNDS, adaptive_kl_coef, log_pi_kl_coef
from rlhf_core.ops.sampling import sample

Configure = Callable[[Sequence[str]], RunConfig]
STATE = LoopState(3, 0.1, 24, Cursor(0, 24), ScoreMoments(24, 0.5, 2.0), 0.25)


class TestLoopState:
    def test_a_healthy_one_comes_back(self) -> None:
        assert LoopState.from_json(STATE.to_json()) == STATE
        assert LoopState.from_json(LoopState(0, 0.0).to_json()) == LoopState(0, 0.0)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"kl_coef": math.inf}, "kl_coef is inf"),
            ({"kl_coef": math.nan}, "kl_coef is nan"),
            ({"kl_coef": -0.1}, "kl_coef is -0.1"),
            ({"kl_coef": "0.1"}, "kl_coef is '0.1'"),
            ({"kl_error": math.inf}, "kl_error is inf"),
            ({"episodes": -1}, "episodes is -1, not a count"),
            ({"iteration": 1.0}, "iteration is 1.0, not a count"),
            ({"moments": {"count": 3, "mean": 0.0, "m2": -4.0}}, "moments.m2 is -4.0"),
            ({"moments": {"count": 3, "mean": math.nan, "m2": 4.0}}, "moments.mean is nan"),
            ({"cursor": {"epoch": 0, "position": -3}}, "cursor.position is -3"),
        ],
    )
    def test_numbers_that_no_run_comes_to_are_refused(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(IntegrityError, match=f"not a loop state: {words}.*--repair"):
            LoopState.from_json(STATE.to_json() | changes)

    def test_json_cannot_bring_infinity_in_as_a_large_number(self) -> None:
        with pytest.raises(IntegrityError, match=r"1e999 is too large for a number.*rlhf verify"):
            read_json(b'{"kl_coef":1e999}', origin="state.json")


class TestBeta:
    @given(st.floats(1e-300, 1e300), st.floats(-1e3, 1e3), st.integers(1, 512))
    def test_the_adaptive_one_stays_positive_and_finite_at_the_smallest_horizon(
        self, kl_coef: float, kl: float, num_samples: int
    ) -> None:
        moved = adaptive_kl_coef(kl_coef, kl, target=6.0, horizon=0.2 * num_samples, num_samples=num_samples)
        assert KL_COEF_BOUNDS[0] <= moved <= KL_COEF_BOUNDS[1]

    @given(st.floats(1e-300, 1e300), st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1e6), st.floats(0, 1e6))
    def test_so_does_the_other(self, kl_coef: float, error: float, last: float, gain: float, integral: float) -> None:
        moved = log_pi_kl_coef(kl_coef, error, last, proportional_gain=gain, integral_gain=integral)
        assert KL_COEF_BOUNDS[0] <= moved <= KL_COEF_BOUNDS[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_give_a_token_and_a_log_prob_that_tells(
    value: float, options: dict[str, Any]
) -> None:
    logits_BV = torch.zeros(2, 5)
    logits_BV[1] = value
    draw = sample(logits_BV, torch.tensor([0.99, 0.99]), **options)
    assert bool((draw.tokens_B < 5).all())
    assert torch.isfinite(draw.logprobs_B).tolist() == [True, False]


class TestArtifactsThatDoNotFit:
    def test_other_lengths_are_named(self) -> None:
        mask = torch.tensor([[True, True], [True, False]])
        check_as_long(["a", "b"], mask, ref_logprobs=mask)
        longer = torch.tensor([[True, True, False], [True, True, True]])
        with pytest.raises(IntegrityError, match=r"ref_logprobs of 1 of 2 rows \(b\) is of another length .*resume"):
            check_as_long(["a", "b"], mask, ref_logprobs=longer)

    def test_tokens_beyond_the_vocabulary_are_named(self) -> None:
        check_vocabulary([4, 9], torch.tensor([[299, 0], [3, 4]]), 300)
        with pytest.raises(IntegrityError, match=r"token 300 in 1 of 2 rows \(9\) is not in the vocabulary .*0 to 299"):
            check_vocabulary([4, 9], torch.tensor([[299, 0], [3, 300]]), 300)

    def test_another_order_says_what_to_do(self) -> None:
        with pytest.raises(IntegrityError, match=r"another order.*delete .* resume"):
            check_aligned(["a", "b"], ["b", "a"])


def spoilt(batch: Any) -> Any:
    """NaN wherever a batch is padded."""
    mask = batch.response_mask_BR
    changes = {
        f.name: torch.where(mask, value, math.nan)
        for f in fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
        and value.is_floating_point()
        and value.shape == mask.shape
    }
    return replace(batch, **changes)


@pytest.mark.parametrize(
    ("estimator", "level"),
    [(name, "token") for name in ("gae", "value", "reward", "reinforce++", "rloo", "group")] + [("reward", "sequence")],
)
@pytest.mark.parametrize("value_clip", ["0.2", "null"])
def test_nan_in_padding_changes_no_bit_of_experience_or_weights(
    tiny_config: Configure, estimator: str, level: str, value_clip: str
) -> None:
    overrides = [
        f"shaping.estimator={estimator}", f"ppo.value_clip_range={value_clip}", "shaping.whiten_rewards=true",
        "ppo.kl_loss_coef=0.1", "ppo.entropy_coef=0.1", "prompts.samples_per_prompt=2", "ppo.micro_batch_size=2",
        f"ppo.level={level}",
    ]  # fmt: skip
    results: list[tuple[Any, str]] = []
    for spoil in (lambda batch: batch, spoilt):
        bench = Bench.of(tiny_config(overrides))
        prompts = bench.prompts().batch
        rollouts = bench.rollouts(prompts).batch
        assert not bool(rollouts.response_mask_BR.all()), "some responses are shorter than others"
        scores = bench.scores(prompts, rollouts).batch
        reference = bench.ref_logprobs(prompts, rollouts).batch
        shaped = bench.experience(spoil(rollouts), scores, spoil(reference))
        update = bench.update(prompts, spoil(rollouts), spoil(shaped.batch))
        results.append(((shaped.metrics, update.metrics, shaped.batch.to_table().to_pylist()), bench.trainer.digest()))
    assert results[0] == results[1]


def test_a_reference_that_says_nan_is_refused_by_name(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config([]))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    bench.reference = copy.copy(bench.reference)
    bench.reference.model = copy.deepcopy(bench.reference.model)
    bench.reference.trunk = bench.reference.model.base_model  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        next(iter(bench.reference.model.parameters())).fill_(math.nan)
    with pytest.raises(NumericalError, match=r"log π_ref is not finite in 8 of 8 rows \(i000000-p\d+-s0, .*resume"):
        bench.ref_logprobs(prompts, rollouts)


def test_a_step_that_overflows_a_weight_ends_the_update(tiny_config: Configure) -> None:
    """The gradient is finite, and so is the loss; the learning rate is not of this world. It is the last step."""
    bench = Bench.of(tiny_config(["ppo.num_ppo_epochs=1", "ppo.num_minibatches=1", "ppo.learning_rate=1e39"]))
    with pytest.raises(
        NumericalError, match=r"is not finite after 1 updates: nothing of it is saved.*ppo.learning_rate"
    ):
        bench.update(*bench.until_experience())


class TestCheckpoints:
    def test_moments_that_are_not_finite_are_never_saved(self, tiny_config: Configure, tmp_path: Path) -> None:
        bench = Bench.of(tiny_config([]))
        bench.update(*bench.until_experience())
        tokenizer = bench.plan.tokenizer.tokenizer
        save_checkpoint(tmp_path / "000001", bench.trainer, tokenizer, STATE)
        name, parameter = bench.trainer.actor_critic.policy_parameters()[2]
        bench.trainer.optimizer.state[parameter]["exp_avg_sq"].view(-1)[3] = math.inf
        with pytest.raises(NumericalError, match=f"exp_avg_sq of {name} is not finite"):
            save_checkpoint(tmp_path / "000002", bench.trainer, tokenizer, STATE)
        assert not (tmp_path / "000002").exists()

    def test_a_healthy_trainer_passes(self, tiny_config: Configure) -> None:
        new_trainer(tiny_config([]), CPU).check_finite()


def test_a_model_with_a_nan_among_its_weights_is_not_loaded(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny.policy, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"reference.model '.*model' holds a weight that is NaN or infinite \(.*h\.1\.mlp"
    ):
        LanguageModel.load(
            str(tmp_path / "model"), dtype="bfloat16", device=CPU, trainable=False, field="reference.model"
        )
