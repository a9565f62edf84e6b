"""The stage with components of several kinds: columns reach them, failures follow their policy, values are kept."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from iteration import Bench
from tolerances import EXACT

from rlhf_core.contracts.artifacts import conform
from rlhf_core.contracts.batches import Prompts, Rollouts, Scores, StageResult
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import NumericalError
from rlhf_core.models.reward_model import Conversation, RewardModel

Configure = Callable[..., RunConfig]
MODULE = """
import math

def rank(responses, prompts, gold):
    assert all(g["text"] == p for g, p in zip(gold, prompts))
    return [g["row"] / 2 for g in gold]

def every_third(responses, value=None):
    return [math.nan if value is None else value if i % 3 == 0 else 1.0 for i in range(len(responses))]

def never(responses):
    raise RuntimeError("out of order")

async def large(responses):
    return [3e38] * len(responses)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "stage_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("stage_rewards", None)


@pytest.fixture
def score(
    tiny: Any, tmp_path: Path, tiny_config: Configure
) -> Callable[..., tuple[StageResult[Scores], Prompts, Rollouts]]:
    """From components and further overrides to the result of the stage, with what was scored."""
    source = tmp_path / "with_gold.jsonl"
    texts = [json.loads(line)["prompt"] for line in tiny.prompts.read_text().splitlines()]
    source.write_text(
        "".join(json.dumps({"prompt": t, "gold": {"text": t, "row": i}}) + "\n" for i, t in enumerate(texts))
    )

    def run(*components: str, overrides: Sequence[str] = ()) -> tuple[StageResult[Scores], Prompts, Rollouts]:
        listed = f"reward.components=[{', '.join(f'{{{c}}}' for c in components)}]"
        bench = Bench.of(tiny_config([f"prompts.source={source}", "prompts.columns=[gold]", listed, *overrides]))
        prompts = bench.prompts().batch
        prompts = Prompts.from_table(conform(prompts.to_table(), "sample_prompts"))  # as the next stage gets them
        rollouts = bench.rollouts(prompts).batch
        return bench.scores(prompts, rollouts), prompts, rollouts

    return run


RANK = "kind: function, name: rank, function: 'stage_rewards:rank'"
THIRD = "kind: function, name: third, function: 'stage_rewards:every_third'"
NEVER = "kind: function, name: never, function: 'stage_rewards:never'"
SIZE = "kind: function, name: size, function: length"


def test_one_model_alone_scores_as_that_model_bit_for_bit(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    (model,) = bench.rewards
    assert isinstance(model, RewardModel)
    rows = [
        torch.cat([prompts.tokens_QP[q][prompts.mask_QP[q]], tokens[mask]]).tolist()
        for q, tokens, mask in zip(rollouts.prompt_rows, rollouts.tokens_BR, rollouts.response_mask_BR, strict=True)
    ]
    alone_B = model.score([Conversation("", "", [], row) for row in rows])
    assert isinstance(alone_B, torch.Tensor)
    result = bench.scores(prompts, rollouts)
    assert torch.equal(result.batch.score_B, alone_B)
    assert torch.equal(result.batch.components_BC, alone_B[:, None])
    assert bool(result.batch.components_mask_BC.all())
    assert result.metrics == {"reward/reward0": float(alone_B.mean()), "reward/reward0_failed": 0.0}


def test_model_and_functions_together(score: Any, tiny: Any) -> None:
    model = f"kind: model, name: taste, model: '{tiny.reward}', weight: 2.0"
    result, prompts, rollouts = score(model, f"{RANK}, weight: -1.0", SIZE)
    rows = [prompts.prompt_ids[q] for q in rollouts.prompt_rows.tolist()]
    raw = result.batch.components_BC
    assert raw[:, 1].tolist() == [row / 2 for row in rows], "each response with the columns of its own prompt"
    assert len(set(rows)) == 8
    assert raw[:, 2].tolist() == rollouts.response_mask_BR.sum(dim=1).tolist()
    expected = (raw.double() @ torch.tensor([2.0, -1.0, 1.0]).double()).float()
    torch.testing.assert_close(result.batch.score_B, expected, **EXACT)
    assert result.metrics["reward/rank"] == pytest.approx(sum(rows) / 16)
    assert [result.metrics[f"reward/{name}_failed"] for name in ("taste", "rank", "size")] == [0.0, 0.0, 0.0]


def test_several_responses_of_a_prompt_share_its_columns(score: Any) -> None:
    result, prompts, rollouts = score(RANK, overrides=["prompts.samples_per_prompt=2"])
    rows = [prompts.prompt_ids[q] for q in rollouts.prompt_rows.tolist()]
    assert len(set(rows)) == 4
    assert result.batch.components_BC[:, 0].tolist() == [row / 2 for row in rows]


@pytest.mark.parametrize("combine", ["weighted_sum", "min", "mean_minus_std"])
def test_combinations_and_what_a_dropped_component_leaves(combine: str, score: Any) -> None:
    result, _, _ = score(
        f"{THIRD}, params: {{value: a text}}, on_error: drop, weight: 4.0",
        "kind: function, name: word, function: regex, params: {pattern: '.', mode: count}, weight: 0.5",
        overrides=[f"reward.combine={combine}", "reward.std_coef=2"],
    )
    scores = result.batch
    for i, (third, word) in enumerate(scores.components_BC.tolist()):
        left = [0.5 * word] if i % 3 == 0 else [4.0, 0.5 * word]
        mean = sum(left) / len(left)
        std = math.sqrt(sum((x - mean) ** 2 for x in left) / len(left))
        wanted = {"weighted_sum": sum(left), "min": min(left), "mean_minus_std": mean - 2 * std}[combine]
        assert scores.score_B[i].item() == pytest.approx(wanted)
        assert third == (0.0 if i % 3 == 0 else 1.0)
    assert scores.components_mask_BC[:, 0].tolist() == [i % 3 != 0 for i in range(8)]
    assert result.metrics["reward/third_failed"] == 3.0
    assert result.metrics["reward/third"] == 1.0, "the mean of what is there"
    table = conform(scores.to_table(), "score_rewards")
    assert [[c["name"] for c in row] for row in table["components"].to_pylist()[:2]] == [["word"], ["third", "word"]]
    assert not any(table[name].null_count for name in table.column_names)


def test_a_substitute_stands_in_the_artifact_and_is_counted(score: Any) -> None:
    result, _, _ = score(f"{THIRD}, params: {{value: x}}, on_error: substitute, substitute: -9.0")
    assert result.batch.score_B.tolist() == [-9.0 if i % 3 == 0 else 1.0 for i in range(8)]
    assert bool(result.batch.components_mask_BC.all())
    assert result.metrics == {"reward/third": pytest.approx(-22 / 8), "reward/third_failed": 3.0}


@pytest.mark.parametrize(
    ("component", "sentence"),
    [
        (THIRD, r"reward component third gave nan for 8 of 8 samples \(i000000-p0000\d\d-s0, .* …\); a score must be"),
        (
            f"{THIRD}, params: {{value: 1e39}}",
            r"reward component third gave 1e\+39, which float32 cannot hold, for 3 of",
        ),
        (NEVER, "reward component never raised RuntimeError: out of order for 8 of 8 samples"),
    ],
)
def test_the_run_stops_at_a_component_that_must_not_fail(component: str, sentence: str, score: Any) -> None:
    with pytest.raises(NumericalError, match=sentence):
        score(SIZE, component)


def test_a_component_that_is_dropped_everywhere_is_counted_and_has_no_mean(score: Any) -> None:
    result, _, _ = score(f"{NEVER}, on_error: drop", SIZE)
    assert torch.equal(result.batch.score_B, result.batch.components_BC[:, 1])
    assert result.metrics.keys() == {"reward/never_failed", "reward/size", "reward/size_failed"}
    assert result.metrics["reward/never_failed"] == 8.0


def test_a_response_without_any_component_stops_the_run(score: Any) -> None:
    with pytest.raises(
        NumericalError, match=r"every reward component has failed and is dropped for 3 of 8 samples \(i000000-p"
    ):
        score(f"{NEVER}, on_error: drop", f"{THIRD}, params: {{value: x}}, on_error: drop")


def test_weights_that_are_too_large_stop_the_run(score: Any) -> None:
    large = "kind: function, function: 'stage_rewards:large'"
    with pytest.raises(
        NumericalError, match=r"the weights of reward.components are too large: the score is not finite"
    ):
        score(large, large, overrides=["reward.components.1.name=b"])
