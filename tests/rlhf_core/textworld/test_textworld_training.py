"""Tokenizer, losses and scores of the text world, on models that are never trained."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from tolerances import EXACT, F32_SUM
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_core.textworld import Recipe, training
from rlhf_core.textworld.grammar import BROKEN_QUALITY, Review, openings, sample_review

RECIPE = Recipe(vocab_size=400, hidden_size=16, num_layers=1, num_heads=2, policy_steps=1, reward_steps=1, num_pairs=8)


@pytest.fixture(scope="module")
def reviews() -> list[Review]:
    rng, prompts = Random(0), list(openings())
    return [sample_review(rng, rng.choice(prompts)) for _ in range(64)]


@pytest.fixture(scope="module")
def tokenizer(reviews: list[Review]) -> PreTrainedTokenizerFast:
    return training.fit_tokenizer([review.text for review in reviews], RECIPE)


@pytest.fixture
def policy(reviews: list[Review], tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    return training.fit_policy(reviews, tokenizer, RECIPE, rng=Random(0), on_step=lambda _done, _total: None)


@pytest.fixture
def reward(policy: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> GPT2ForSequenceClassification:
    pairs = training.draw_pairs(Random(0), list(openings()), RECIPE.num_pairs, RECIPE)
    return training.fit_reward(policy, pairs, tokenizer, RECIPE, rng=Random(0), on_step=lambda _done, _total: None)


def test_a_finished_review_ends_in_eos_and_a_broken_off_one_does_not(tokenizer: PreTrainedTokenizerFast) -> None:
    finished, broken_off = training.encode(
        tokenizer, [Review("the songs", "soar .", 0.9), Review("the songs", "soar .", 0.9, finished=False)]
    )
    assert finished == [*broken_off, training.EOS_ID]
    assert tokenizer.decode(broken_off) == "the songs soar ."
    assert tokenizer.convert_ids_to_tokens([training.EOS_ID, training.PAD_ID]) == [training.EOS, training.PAD]


def test_a_long_review_is_cut_to_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = training.encode(tokenizer, [Review("the songs", "soar " * 100, 0.0)])
    assert len(ids) == RECIPE.context_len


def test_loss_is_a_mean_over_real_tokens(
    policy: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, reviews: list[Review]
) -> None:
    """Against one review at a time, without padding, by the model's own loss."""
    with torch.no_grad():
        sequences = training.encode(tokenizer, reviews[:8])
        losses = [policy(input_ids=(ids := torch.tensor([seq])), labels=ids).loss for seq in sequences]
        weights = torch.tensor([len(seq) - 1.0 for seq in sequences])
        expected = (torch.stack(losses) * weights).sum() / weights.sum()
        torch.testing.assert_close(training.next_token_loss(policy, tokenizer, reviews[:8]), expected, **F32_SUM)


def test_shifting_scores_shifts_every_one(
    reward: GPT2ForSequenceClassification, tokenizer: PreTrainedTokenizerFast, reviews: list[Review]
) -> None:
    with torch.no_grad():
        before = training.scores(reward, tokenizer, reviews)
        training.shift_scores(reward, by=-2.5)
        torch.testing.assert_close(training.scores(reward, tokenizer, reviews), before - 2.5, **F32_SUM)


def test_fitting_a_reward_model_leaves_the_policy_alone(
    policy: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    pairs = training.draw_pairs(Random(1), list(openings()), 8, RECIPE)
    reward = training.fit_reward(policy, pairs, tokenizer, RECIPE, rng=Random(0), on_step=lambda _done, _total: None)
    torch.testing.assert_close(dict(policy.state_dict()), before, **EXACT)
    assert not torch.equal(reward.transformer.wte.weight, policy.transformer.wte.weight), "it has moved"


def test_pairs_share_their_prompt_and_are_no_ties() -> None:
    pairs = training.draw_pairs(Random(0), list(openings()), 500, RECIPE)
    assert len(pairs) == 500
    assert all(chosen.prompt == rejected.prompt for chosen, rejected in pairs)
    assert all(abs(chosen.quality - rejected.quality) >= RECIPE.tie_margin for chosen, rejected in pairs)
    right = sum(chosen.quality > rejected.quality for chosen, rejected in pairs) / 500
    assert 0.85 < right < 1.0, "the annotator errs, but not often"


@pytest.mark.parametrize("spoiled_share", [0.0, 0.5])
def test_as_many_reviews_are_spoiled_as_asked_for(spoiled_share: float) -> None:
    recipe = replace(RECIPE, spoiled_share=spoiled_share, tie_margin=0.0)
    reviews = [r for pair in training.draw_pairs(Random(0), list(openings()), 500, recipe) for r in pair]
    share = sum(review.quality == BROKEN_QUALITY for review in reviews) / len(reviews)
    assert abs(share - spoiled_share) < 0.07


def test_a_sharper_annotator_errs_less() -> None:
    blunt, sharp = (
        training.draw_pairs(Random(0), list(openings()), 500, replace(RECIPE, annotator_sharpness=sharpness))
        for sharpness in (0.0, 100.0)
    )
    assert 0.4 < sum(chosen.quality > rejected.quality for chosen, rejected in blunt) / 500 < 0.6
    assert all(chosen.quality > rejected.quality for chosen, rejected in sharp)


def test_a_batch_holds_every_example_once_an_epoch() -> None:
    examples = [([number] * (number % 7 + 1),) for number in range(20)]
    batches = training._batches(examples, 6, Random(0))
    for _ in range(2):
        epoch = [next(batches) for _ in range(4)]
        assert sorted(len(batch) for batch in epoch) == [2, 6, 6, 6]
        assert sorted(tokens[0] for batch in epoch for (tokens,) in batch) == list(range(20))
