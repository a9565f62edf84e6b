"""Samples of an evaluation: paired dice, KL and scores, and their way through Arrow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from iteration import CPU, Bench
from tolerances import F32_MODEL
from torch.testing import assert_close

from rlhf_core.contracts.batches import Prompts, Rollouts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.evaluation.samples import PART, PART_SIZE, Samples, draw_part, evaluation_seed, part_sizes
from rlhf_core.models.language_model import LanguageModel


@pytest.fixture
def bench(tiny_config: Callable[[Sequence[str]], RunConfig]) -> Bench:
    return Bench.of(tiny_config(["prompts.batch_size=4", "ppo.num_minibatches=1"]))


def lengths(_: Prompts, rollouts: Rollouts) -> torch.Tensor:
    """A score that is easy to check: response tokens."""
    return rollouts.response_mask_BR.sum(dim=1).float()


def drawn(bench: Bench, policy: LanguageModel, part: int = 0, num_samples: int = 3) -> Samples:
    prompts = bench.prompts().batch
    return draw_part(
        policy, bench.reference, lengths, bench.plan.tokenizer, prompts, bench.config,
        part=part, num_samples=num_samples,
    )  # fmt: skip


def moved(bench: Bench) -> LanguageModel:
    """The reference with other weights."""
    model: Any = copy.deepcopy(bench.reference.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return LanguageModel(model, dtype=torch.float32, device=CPU)


def test_the_reference_is_at_kl_zero_and_an_equal_policy_answers_alike(bench: Bench) -> None:
    reference = drawn(bench, bench.reference)
    assert float(reference.kl_QK.abs().max()) == float(reference.k3_QK.abs().max()) == 0.0
    equal = drawn(bench, LanguageModel(copy.deepcopy(bench.reference.model), dtype=torch.float32, device=CPU))
    assert equal.texts == reference.texts, "the same dice"
    assert float(equal.kl_QK.abs().max()) < 1e-3


def test_kl_is_the_difference_of_the_models_own_logprobs(bench: Bench) -> None:
    policy, prompts = moved(bench), bench.prompts().batch
    samples = drawn(bench, policy)
    for row, (tokens, mask) in enumerate(zip(samples.tokens_BR, samples.mask_BR, strict=True)):
        prompt = prompts.tokens_QP[row // 3][prompts.mask_QP[row // 3]]
        response = tokens[mask]
        k1 = torch.zeros(())
        k3 = torch.zeros(())
        ids = torch.cat([prompt, response])[None]
        per_model = []
        for model in (policy, bench.reference):
            logits = cast("Any", model.model)(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=1)
            per_model.append(logits.gather(1, response[:, None])[:, 0])
        d = per_model[0] - per_model[1]
        k1, k3 = d.sum(), (torch.exp(-d) - 1 + d).sum()
        assert_close((samples.kl_QK.flatten()[row], samples.k3_QK.flatten()[row]), (k1, k3), **F32_MODEL)
    assert float(samples.k3_QK.mean()) > 0.01, "the two differ"


def test_scores_lengths_and_ends_stand_with_their_responses(bench: Bench) -> None:
    samples = drawn(bench, bench.reference)
    assert_close(samples.score_QK.double(), samples.len_QK, rtol=0, atol=0)
    assert samples.eos_QK.flatten().tolist() == [float(reason == "eos") for reason in samples.finish_reasons]
    assert 0 < float(samples.eos_QK.mean()) < 1


def test_a_sample_depends_on_its_index_alone(bench: Bench) -> None:
    many, few = drawn(bench, bench.reference, num_samples=5), drawn(bench, bench.reference, num_samples=2)
    assert many.first(2).texts == few.texts
    assert_close(many.first(2).kl_QK, few.kl_QK, rtol=0, atol=0)
    other = drawn(bench, bench.reference, part=1, num_samples=2)
    assert other.texts != few.texts
    assert other.first_index == PART_SIZE


def test_dice_are_none_that_training_has_seen(bench: Bench) -> None:
    assert evaluation_seed(bench.config.seed) != bench.config.seed
    trained_on = bench.rollouts(bench.prompts().batch).batch
    assert drawn(bench, bench.reference, num_samples=1).texts != list(trained_on.texts)


def test_parts_come_back_from_arrow_as_one(bench: Bench) -> None:
    parts = [drawn(bench, moved(bench), part, size) for part, size in ((0, 3), (1, 2))]
    tables = [part.to_table() for part in parts]
    assert all(table.schema.equals(PART) for table in tables)
    assert tables[1]["sample_index"].to_pylist() == [32, 33] * 4
    whole = Samples.from_tables(tables, parts[0].prompt_ids)
    for name in ("score_QK", "kl_QK", "k3_QK", "entropy_QK", "len_QK"):
        assert_close(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], dim=1))
    assert whole.texts[:5] == parts[0].texts[:3] + parts[1].texts[:2]
    with pytest.raises(IntegrityError, match="other prompts"):
        Samples.from_tables([tables[0].take(pa.array(range(11, -1, -1)))], parts[0].prompt_ids)


def test_part_sizes() -> None:
    assert part_sizes(1) == [1]
    assert part_sizes(64) == [32, 32]
    assert part_sizes(70) == [32, 32, 6]
