"""Decoding: what it draws, what it says of the draw, and when it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import F32_MODEL

from rlhf_core.models.decoding import Decoded, DecodingRules, decode
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.tokenizers import PolicyTokenizer, load_policy_tokenizer

CPU = torch.device("cpu")
PROMPTS = [[40, 41, 42, 43], [50], [60, 61]]


@pytest.fixture(scope="module")
def policy(tiny: Any) -> LanguageModel:
    return LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=True)


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> PolicyTokenizer:
    return load_policy_tokenizer(str(tiny.policy), None)


def run(
    policy: LanguageModel,
    tokenizer: PolicyTokenizer,
    uniforms: torch.Tensor,
    prompts: list[list[int]] = PROMPTS,
    **rules: Any,
) -> Decoded:
    settings = {
        "max_new_tokens": uniforms.shape[1],
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "eos_ids": tokenizer.eos_ids,
    }
    return decode(
        policy,
        prompts,
        uniforms,
        samples_per_prompt=len(uniforms) // len(prompts),
        rules=DecodingRules(**{**settings, **rules}),
        pad_id=tokenizer.pad_id,
    )


def uniforms(rows: int, steps: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed))


def rows_of(decoded: Decoded) -> list[list[int]]:
    return [t[m].tolist() for t, m in zip(decoded.tokens_BR, decoded.mask_BR, strict=True)]


def test_each_token_inverts_the_cumulative_distribution_of_a_full_pass(
    policy: LanguageModel, tokenizer: PolicyTokenizer
) -> None:
    """Replay every draw from the model's plain logits, row by row, without cache or padding."""
    u = uniforms(3, 8)
    decoded = run(policy, tokenizer, u, temperature=0.8)
    for row, (prompt, response) in enumerate(zip(PROMPTS, rows_of(decoded), strict=True)):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + response])).logits[0].double() / 0.8
        for t, token in enumerate(response):
            probs = logits[len(prompt) - 1 + t].softmax(dim=0)
            below, above = float(probs[:token].sum()), float(probs[: token + 1].sum())
            assert below - 1e-5 <= float(u[row, t]) <= above + 1e-5
            torch.testing.assert_close(decoded.logprobs_BR[row, t].double(), probs[token].log(), **F32_MODEL)
            entropy = torch.distributions.Categorical(probs=probs).entropy()
            torch.testing.assert_close(decoded.entropies_BR[row, t].double(), entropy, **F32_MODEL)


def test_a_response_does_not_depend_on_its_neighbours(policy: LanguageModel, tokenizer: PolicyTokenizer) -> None:
    u = uniforms(3, 12)
    together = rows_of(run(policy, tokenizer, u))
    alone = [rows_of(run(policy, tokenizer, u[i : i + 1], [PROMPTS[i]]))[0] for i in range(3)]
    assert together == alone


def test_samples_of_a_prompt_share_its_prefill_and_differ_by_their_numbers(
    policy: LanguageModel, tokenizer: PolicyTokenizer
) -> None:
    u = uniforms(6, 6)
    grouped = rows_of(run(policy, tokenizer, u))
    repeated = rows_of(run(policy, tokenizer, u, [p for p in PROMPTS for _ in range(2)]))
    assert grouped == repeated
    assert grouped[0] != grouped[1]


def test_near_zero_temperature_is_greedy_generation(policy: LanguageModel, tokenizer: PolicyTokenizer) -> None:
    """Against transformers' own generate."""
    prompt = [40, 41, 42, 43]
    ours = rows_of(run(policy, tokenizer, uniforms(1, 10), [prompt], temperature=1e-4))[0]
    theirs = policy.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10)  # pyright: ignore[reportCallIssue]
    assert ours == theirs[0, len(prompt) :].tolist()


def test_responses_end_at_eos_which_is_kept(policy: LanguageModel, tokenizer: PolicyTokenizer) -> None:
    decoded = run(policy, tokenizer, uniforms(60, 20), [[40, 41]])
    eos = next(iter(tokenizer.eos_ids))
    reasons = set(decoded.finish_reasons)
    assert reasons == {"eos", "length"}, "the tiny policy should end some responses and not others"
    for response, reason in zip(rows_of(decoded), decoded.finish_reasons, strict=True):
        assert (response[-1] == eos) == (reason == "eos")
        assert eos not in response[:-1]
        assert len(response) == 20 or reason == "eos"


def test_a_stop_sequence_ends_a_response_and_is_kept(policy: LanguageModel, tokenizer: PolicyTokenizer) -> None:
    u = uniforms(30, 20)
    free = run(policy, tokenizer, u, [[40, 41]])
    target = next(r[2] for r, why in zip(rows_of(free), free.finish_reasons, strict=True) if len(r) > 4)
    stopped = run(policy, tokenizer, u, [[40, 41]], has_stop=lambda _row, ids: target in ids)
    assert "stop" in stopped.finish_reasons
    for before, after, reason in zip(rows_of(free), rows_of(stopped), stopped.finish_reasons, strict=True):
        assert after == before[: len(after)]
        assert (reason == "stop") == (target in after)
        if reason == "stop":
            assert after[-1] == target


def test_top_k_stores_the_support_that_was_sampled_from(policy: LanguageModel, tokenizer: PolicyTokenizer) -> None:
    decoded = run(policy, tokenizer, uniforms(3, 6), top_k=5)
    assert decoded.supports is not None
    for row, response in enumerate(rows_of(decoded)):
        support = decoded.supports[row]
        assert support.lens.tolist() == [5] * len(response)
        for t, token in enumerate(response):
            assert token in support.tokens[5 * t : 5 * t + 5].tolist()
        assert bool((decoded.logprobs_BR[row][decoded.mask_BR[row]] <= 0).all())


def test_without_truncation_no_support_is_stored(policy: LanguageModel, tokenizer: PolicyTokenizer) -> None:
    assert run(policy, tokenizer, uniforms(3, 4)).supports is None
