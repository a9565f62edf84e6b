"""Numbers of an evaluation, in a world of four responses a prompt where the attainable is known exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core.contracts.batches import Prompts
from rlhf_core.evaluation.folder import FRONTIER, SIDE_BY_SIDE
from rlhf_core.evaluation.samples import Samples
from rlhf_core.evaluation.summary import (
    best_of_n_rows,
    comparison,
    description,
    frontier_rows,
    frontier_table,
    metrics,
    side_by_side,
)

PROMPTS = 40
GENERATOR = torch.Generator().manual_seed(5)
REWARDS = 2 + torch.randn(PROMPTS, 4, generator=GENERATOR, dtype=torch.float64)
REFERENCE = torch.rand(PROMPTS, 4, generator=GENERATOR, dtype=torch.float64).softmax(dim=1)


def tilted(beta: float) -> Tensor:
    weights = REFERENCE * (REWARDS / beta).exp()
    return weights / weights.sum(dim=1, keepdim=True)


def world(policy: Tensor, count: int, seed: int) -> Samples:
    """``count`` samples a prompt of a policy, each response two tokens: its number twice."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(policy, count, replacement=True, generator=generator)
    log_ratio = (policy / REFERENCE).log().gather(1, drawn)
    tokens_BR = drawn.flatten()[:, None].repeat(1, 2)
    return Samples(
        prompt_ids=list(range(PROMPTS)),
        first_index=0,
        texts=[str(i) for i in drawn.flatten().tolist()],
        finish_reasons=["eos" if i else "length" for i in drawn.flatten().tolist()],
        tokens_BR=tokens_BR,
        mask_BR=torch.ones_like(tokens_BR, dtype=torch.bool),
        score_QK=REWARDS.gather(1, drawn).float(),
        kl_QK=log_ratio.float(),
        k3_QK=(torch.expm1(-log_ratio) + log_ratio).float(),
        entropy_QK=torch.ones(PROMPTS, count),
    )


@pytest.fixture(scope="module")
def reference() -> Samples:
    return world(REFERENCE, 256, seed=0)


def holds(interval: Mapping[str, float], truth: float) -> bool:
    """Within the interval, doubled: a miss of four standard errors."""
    reach = interval["high"] - interval["low"]
    return interval["low"] - reach / 2 <= truth <= interval["high"] + reach / 2


@pytest.mark.parametrize("beta", [2.0, 0.7])
def test_the_optimal_policy_has_all_that_can_be_had(beta: float, reference: Samples) -> None:
    numbers = comparison(world(tilted(beta), 256, seed=1), reference)
    best = tilted(beta)
    truth = {
        "score": (best * REWARDS).sum(dim=1).mean(),
        "gain": ((best - REFERENCE) * REWARDS).sum(dim=1).mean(),
        "kl": (best * (best / REFERENCE).log()).sum(dim=1).mean(),
        "k3": (best * (best / REFERENCE).log()).sum(dim=1).mean(),
        "attainable_score": (best * REWARDS).sum(dim=1).mean(),
        "share_of_attainable": torch.tensor(1.0),
    }
    for name, value in truth.items():
        assert holds(numbers[name], float(value)), name
    share = numbers["share_of_attainable"]
    assert 0.005 < share["high"] - share["low"] < 0.1
    assert numbers["share_by_half"] == pytest.approx(share["mean"], rel=0.02)
    assert numbers["share_note"] == ""


def test_a_policy_that_wastes_kl_has_a_share_of_it(reference: Samples) -> None:
    """Half of the time optimal, half of the time the worst: the truth is worked out here."""
    worse = 0.8 * tilted(0.5) + 0.2 * tilted(-0.5)
    numbers = comparison(world(worse, 256, seed=2), reference)
    kl = float((worse * (worse / REFERENCE).log()).sum(dim=1).mean())
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        best = tilted(middle)
        wide = float((best * (best / REFERENCE).log()).sum(dim=1).mean()) > kl
        low, high = (middle, high) if wide else (low, middle)
    gains = [float(((p - REFERENCE) * REWARDS).sum(dim=1).mean()) for p in (worse, tilted(low))]
    assert gains[0] / gains[1] < 0.9
    assert holds(numbers["share_of_attainable"], gains[0] / gains[1])


def test_the_win_rate_is_that_of_independent_draws(reference: Samples) -> None:
    best = tilted(0.7)
    wins = (REWARDS[:, :, None] > REWARDS[:, None, :]).double() + 0.5 * torch.eye(4)
    truth = torch.einsum("qa,qb,qab->q", best, REFERENCE, wins).mean()
    assert holds(comparison(world(best, 256, seed=3), reference)["win_rate"], float(truth))


def test_beyond_the_trusted_kl_it_says_so_and_what_would_help() -> None:
    few = world(REFERENCE, 20, seed=0)  # log 20 - log 10 = 0.69
    numbers = comparison(world(tilted(0.2), 64, seed=1), few)
    assert numbers["share_of_attainable"] is numbers["attainable_score"] is None
    kl = numbers["kl"]["mean"]
    said = f"the KL {kl:.2f} is beyond the 0.69 nats that 20 samples a prompt can vouch for (log n - log 10); "
    assert numbers["share_note"] == said + f"raise --frontier-samples to {math.ceil(10 * math.exp(kl))}"


def test_next_to_the_reference_there_is_no_share(reference: Samples) -> None:
    numbers = comparison(reference.first(64), reference)
    assert numbers["share_of_attainable"] is None
    assert "too close to the reference" in numbers["share_note"]
    assert holds(numbers["gain"], 0.0)
    assert holds(numbers["win_rate"], 0.5)


def test_scores_that_are_all_alike_leave_nothing_to_be_had(reference: Samples) -> None:
    flat = Samples(**{**vars(reference), "score_QK": torch.ones_like(reference.score_QK)})
    policy = Samples(**{**vars(world(tilted(0.5), 8, seed=1)), "score_QK": torch.ones(PROMPTS, 8)})
    assert "nothing to be had" in comparison(policy, flat)["share_note"]


def test_where_the_best_response_is_reached_more_kl_is_of_no_use(reference: Samples) -> None:
    """256 samples hold the best response of each prompt many times: the frontier is flat and trusted from there on."""
    narrow = world(tilted(0.02), 64, seed=1)
    far = Samples(**{**vars(narrow), "kl_QK": torch.full((PROMPTS, 64), 9.0)})
    numbers = comparison(far, reference)
    assert numbers["attainable_score"]["mean"] == pytest.approx(float(REWARDS.max(dim=1).values.mean()), rel=1e-4)


def test_what_responses_are_like(reference: Samples) -> None:
    numbers = description(reference, 8)
    few = reference.first(8)
    assert numbers["response_len"] == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert numbers["eos_rate"]["mean"] == pytest.approx(float((reference.tokens_BR[:, 0] > 0).double().mean()))
    assert numbers["distinct_1"] == len(set(few.tokens_BR.flatten().tolist())) / few.tokens_BR.numel()
    assert numbers["distinct_2"] == 4 / (PROMPTS * 8)
    assert numbers["repetition"] == 0.0
    assert numbers["entropy"]["mean"] == 1.0
    assert numbers["score"]["mean"] == pytest.approx(float(reference.score_QK.double().mean()))


def test_best_of_n_is_below_the_frontier_and_rises(reference: Samples) -> None:
    rows = best_of_n_rows(reference)
    assert [row["n"] for row in rows] == [2, 4, 8, 16, 32, 64]
    scores = [row["score"]["mean"] for row in rows]
    assert scores == sorted(scores)
    assert [row["kl"] for row in rows] == pytest.approx([math.log(2**i) - (2**i - 1) / 2**i for i in range(1, 7)])
    two = (REFERENCE[:, :, None] * REFERENCE[:, None, :] * torch.maximum(REWARDS[:, :, None], REWARDS[:, None, :])).sum(
        dim=(1, 2)
    )
    assert holds(rows[0]["score"], float(two.mean()))


def test_the_frontier_is_exact_and_says_where_it_is_trusted(reference: Samples) -> None:
    rows = frontier_rows(reference)
    for row in rows[1::4]:
        best = tilted(row["beta"])
        assert row["kl"] == pytest.approx(float((best * (best / REFERENCE).log()).sum(dim=1).mean()), rel=0.1, abs=0.01)
        assert row["score"] == pytest.approx(float((best * REWARDS).sum(dim=1).mean()), abs=0.03)
        assert row["score_by_half"] == pytest.approx(row["score"], abs=0.02)
    assert all(row["trusted"] for row in rows), "four responses are no more than 1.4 nats"
    few = frontier_rows(world(REFERENCE, 12, seed=0))
    assert [row["trusted"] for row in few] == [row["kl"] <= math.log(1.2) * (1 + 1e-9) for row in few]
    assert any(row["trusted"] for row in few[1:])
    assert not few[-1]["trusted"]
    table = frontier_table(rows)
    assert table.schema.equals(FRONTIER)
    assert table["beta"][0].as_py() == math.inf


def test_side_by_side_pairs_prompts_and_dice(reference: Samples) -> None:
    early, late = world(tilted(2.0), 3, seed=1), world(tilted(0.5), 3, seed=2)
    nothing = torch.zeros(PROMPTS, 1, dtype=torch.int64)
    texts = [f"prompt {i}" for i in range(PROMPTS)]
    ids = list(range(PROMPTS))
    empty: list[Any] = [[] for _ in ids]
    prompts = Prompts(ids, texts, empty, nothing, nothing > 0, [0] * PROMPTS, [{} for _ in ids])
    table = side_by_side({"000010": early, "000020": late}, reference, prompts)
    assert table.schema.equals(SIDE_BY_SIDE)
    rows = table.to_pylist()
    assert [row["prompt"] for row in rows[:PROMPTS]] == texts, "each prompt once, then each again"
    assert [rows[0]["policy"], rows[-1]["policy"]] == ["000020", "000010"], "the last policy first"
    row = rows[PROMPTS + 7]  # prompt 7, sample 1
    assert (row["prompt_id"], row["sample_index"]) == (7, 1)
    assert (row["response"], row["score"]) == (late.texts[7 * 3 + 1], float(late.score_QK[7, 1]))
    assert (row["ref_response"], row["ref_score"]) == (reference.texts[7 * 256 + 1], float(reference.score_QK[7, 1]))
    assert row["kl"] == float(late.kl_QK[7, 1])
    assert (row["response_len"], row["ref_response_len"]) == (2, 2)


def test_metrics_are_named_and_the_unknown_left_out(reference: Samples) -> None:
    known = metrics(comparison(world(tilted(0.7), 64, seed=1), reference))
    assert len(known) == 13
    assert all(isinstance(value, float) for value in known.values())
    assert 0.9 < known["eval/share_of_attainable"] < 1.1
    unknown = metrics(comparison(reference.first(8), reference))
    assert known.keys() - unknown.keys() == {"eval/share_of_attainable", "eval/attainable_score"}
