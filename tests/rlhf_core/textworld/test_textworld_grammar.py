"""The grammar: how much it can say, what its texts are worth, and what it does not take for a review."""

from __future__ import annotations

from math import exp
from random import Random
from statistics import fmean, pstdev

import pytest
import torch
from tolerances import HAND

from rlhf_core.textworld import grammar, lexicon
from rlhf_core.textworld.grammar import (
    BROKEN_QUALITY,
    Review,
    annotator_prefers,
    openings,
    parse,
    sample_review,
    spoil,
)

NUM_SAMPLES = 6_000


@pytest.fixture(scope="module")
def reviews() -> list[Review]:
    rng, prompts = Random(0), list(openings())
    return [sample_review(rng, rng.choice(prompts)) for _ in range(NUM_SAMPLES)]


def test_openings_are_many_short_and_different() -> None:
    assert len(openings()) >= 2_000 + 64
    assert all(2 <= len(opening.split()) <= 10 for opening in openings())
    assert all(opening == " ".join(opening.split()) for opening in openings()), "single spaces"
    assert all(opening.endswith(subject.name) for opening, subject in openings().items())


def test_hardly_a_review_comes_twice(reviews: list[Review]) -> None:
    assert len({review.text for review in reviews}) > 5_800
    assert len({review.response for review in reviews}) > 5_000


def test_responses_are_of_many_lengths_and_end_in_a_full_stop(reviews: list[Review]) -> None:
    lengths = sorted(len(review.response.split()) for review in reviews)
    assert lengths[NUM_SAMPLES // 20] <= 6
    assert 11 <= fmean(lengths) <= 17
    assert lengths[-NUM_SAMPLES // 20] <= 26
    assert all(review.response.endswith(" .") and review.finished for review in reviews)


def test_sentiment_is_balanced_and_graded(reviews: list[Review]) -> None:
    qualities = [review.quality for review in reviews]
    assert 0.45 < fmean(quality > 0 for quality in qualities) < 0.55
    assert pstdev(qualities) > 0.6
    assert fmean(abs(quality) < 0.4 for quality in qualities) > 0.15, "mixed feelings"
    assert fmean(abs(quality) > 1.0 for quality in qualities) > 0.15, "strong ones"


def test_every_review_parses_to_its_quality(reviews: list[Review]) -> None:
    assert [parse(review.prompt, review.response) for review in reviews] == [review.quality for review in reviews]


@pytest.mark.parametrize(
    ("prompt", "response", "quality"),
    [
        ("the songs", "soar .", 0.9),
        ("the songs", "soar , i suppose .", 0.9 * 0.6),
        ("the title song", "soars , to my surprise .", 0.9 * 1.1),
        ("the plot", "is dull .", -0.8),
        ("the plot", "is painfully dull .", -0.8 * 1.4),
        ("the plot", "is anything but dull .", 0.8 * 0.9),
        ("the plot", "is not wonderful .", -0.5),
        # a contrast: 0.7 * -0.8 + 1.3 * 0.9 over sqrt(0.7 + 1.3)
        ("for a western , the plot", "is dull , but the songs soar .", 0.43133514),
        # the same in the other order: 0.7 * 0.9 - 1.3 * 0.8 over sqrt(2)
        ("for a western , the songs", "soar , but the plot is dull .", -0.28991378),
        # a concession: 1.2 * 0.9 - 0.7 * 0.8 over sqrt(1.9)
        ("to be fair , the songs", "soar , though the plot is dull .", 0.37724765),
        # agreement, and a verdict of weight 0.6: (0.9 + 0.8 + 0.6 * 1.0) / sqrt(2.6)
        ("the songs", "soar , and the costumes glow . worth every penny .", 1.42639945),
    ],
)
def test_quality_worked_out_by_hand(prompt: str, response: str, quality: float) -> None:
    torch.testing.assert_close(parse(prompt, response), quality, **HAND)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("the songs", "soars ."),  # one song soars
        ("the songs", "crackle with wit ."),  # a script does
        ("the songs", "soar"),  # unfinished
        ("the songs", "soar , but the plot"),
        ("the songs", "soar . ."),
        ("the songs", "soar , and the songs soar ."),  # a subject comes up twice
        ("the songs", "soar , and soar ."),
        ("the songs", "soar . a small gem . a small gem ."),
        ("the songs", "."),
        ("the songs", ""),
        ("the banjo", "soars ."),
        ("", "soars ."),
    ],
)
def test_what_is_no_review(prompt: str, response: str) -> None:
    assert parse(prompt, response) is None


def test_a_spoiled_review_keeps_its_prompt_and_rarely_parses(reviews: list[Review]) -> None:
    rng = Random(0)
    spoiled = [spoil(rng, review) for review in reviews]
    assert [review.prompt for review in spoiled] == [review.prompt for review in reviews]
    assert {review.quality for review in spoiled} == {BROKEN_QUALITY}
    assert all(review.response for review in spoiled)
    assert 0.2 < fmean(not review.finished for review in spoiled) < 0.3, "one fault of four"
    assert fmean(parse(review.prompt, review.response) is not None for review in spoiled) < 0.05


def test_the_annotator_is_a_bradley_terry_model() -> None:
    rng, num = Random(0), 20_000
    better, worse = Review("the songs", "soar .", 0.9), Review("the songs", "hum with life .", 0.4)
    for sharpness in (0.0, 1.0, 4.0):
        chance = 1 / (1 + exp(-0.5 * sharpness))
        preferred = fmean(annotator_prefers(rng, better, worse, sharpness=sharpness) for _ in range(num))
        assert abs(preferred - chance) < 4 * (chance * (1 - chance) / num) ** 0.5, "four standard errors"


def test_a_phrase_has_one_meaning_and_fits_the_reader() -> None:
    for kind in lexicon.SUBJECTS:
        for plural in (False, True):
            forms = [form for praise in (True, False) for form in grammar._phrases(kind, plural, praise)]
            assert sum(map(len, forms)) == len(grammar._predicates(kind, plural)), "no phrase in two forms"
            assert all(valence > 0 for form in forms[:4] for valence in form.values()), "praise"
            assert all(valence < 0 for form in forms[4:] for valence in form.values()), "pans"
            assert not any("{" in phrase for phrase in grammar._predicates(kind, plural))
            assert max(len(p.split()) for p in grammar._predicates(kind, plural)) <= grammar._Reader.MOST_WORDS
    assert max(len(verdict.split()) for verdict in lexicon.VERDICTS) < grammar._Reader.MOST_WORDS


def test_a_seed_decides_a_review() -> None:
    prompt = next(iter(openings()))
    first, again, other = (sample_review(Random(seed), prompt) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_max_clauses_is_kept() -> None:
    rng = Random(0)
    for _ in range(200):
        response = sample_review(rng, "the songs", max_clauses=1).response
        assert not any(f" {joiner} " in response for joiner in (", but", ", and", ", though", "; still ,"))


@pytest.mark.parametrize(("opening", "max_clauses"), [("the banjo", 3), ("", 3), ("the songs", 0), ("the songs", 4)])
def test_bad_arguments_are_refused(opening: str, max_clauses: int) -> None:
    with pytest.raises(ValueError, match=r"opening|max_clauses"):
        sample_review(Random(0), opening, max_clauses=max_clauses)
