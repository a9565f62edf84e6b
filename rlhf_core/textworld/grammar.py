"""A grammar of short film reviews: endless to sample from, and small enough to parse back.

    review    = opening predicate { joiner subject predicate } [ "." verdict ] "."
    opening   = [ frame ] subject                                     the prompt
    predicate = ( verb | "is" [ adverb | negation ] adjective ) [ "," hedge ]

    for a space opera , the second act  drags , but the songs are quietly wonderful . bring a friend .
    `------------ prompt ------------'  `------------------------- response -------------------------'

Each review has a latent *quality*: what its clauses say, weighed by how they are joined. The reward model never sees
it, only the preferences of a noisy annotator. `parse` recovers it from any text, so what a policy gains on the learned
reward can be held against what its reviews really say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import exp, sqrt
from random import Random
from typing import Final

from rlhf_core.textworld import lexicon

BROKEN_QUALITY: Final = -1.5
"""Quality of a text that is no review: about that of the worst pan."""

_JOINERS: Final = lexicon.AGREEING | lexicon.TURNING
_VERDICT_WEIGHT: Final = 0.6
_HEDGES: Final = {f", {hedge}": factor for hedge, factor in lexicon.HEDGES.items()}
_VERDICTS: Final = {f". {verdict}": valence for verdict, valence in lexicon.VERDICTS.items()}


@dataclass(frozen=True)
class Review:
    """One review, cut where the policy takes over.

    Attributes:
        prompt: the opening, down to its subject.
        response: the rest; words and punctuation stand between single spaces.
        quality: latent quality, from about -2 (a pan) to 2 (a rave).
        finished: whether the writer stopped here; only a finished text is followed by the end-of-text token.
    """

    prompt: str
    response: str
    quality: float
    finished: bool = True

    @property
    def text(self) -> str:
        """Prompt and response as one line."""
        return f"{self.prompt} {self.response}"


@dataclass(frozen=True)
class Subject:
    """What a clause is about: "the two leads", of kind "people", plural."""

    name: str
    kind: str
    plural: bool


@cache
def openings() -> Mapping[str, Subject]:
    """Every opening of the grammar with the subject that it ends in, in a fixed order."""
    frames = [f.format(genre=genre) for f in lexicon.FRAMES for genre in (lexicon.GENRES if "{" in f else ("",))]
    return {f"{frame} {subject.name}".strip(): subject for frame in frames for subject in _subjects().values()}


def sample_review(rng: Random, opening: str, *, max_clauses: int = 3) -> Review:
    """Write one review that starts with `opening`.

    A review is written in a mood, which sets how likely each of its clauses is to praise; so reviews range from raves
    over mixed feelings to pans.

    Args:
        rng: source of randomness; advanced.
        opening: one of `openings()`.
        max_clauses: most clauses of a review, 1 to 3.
    Returns: the review, finished, with its quality.
    Raises: ValueError for an opening that the grammar does not have, or for max_clauses out of range.
    """
    subject = openings().get(opening)
    if subject is None:
        raise ValueError(f"not an opening of the grammar: {opening!r}")
    if not 1 <= max_clauses <= 3:
        raise ValueError(f"max_clauses must be 1, 2 or 3, got {max_clauses}")

    mood = rng.uniform(0.25, 0.75)
    said = {subject}
    pieces, valence = _sample_predicate(rng, subject, praise=rng.random() < mood)
    clauses = [(valence, 1.0)]
    for _ in range(rng.choices(range(max_clauses), (30, 55, 15)[:max_clauses])[0]):
        praise = rng.random() < mood
        joiner = rng.choice(tuple(lexicon.AGREEING if praise == (valence > 0) else lexicon.TURNING))
        subject = rng.choice([s for s in _subjects().values() if s not in said])
        predicate, valence = _sample_predicate(rng, subject, praise=praise)
        pieces += [joiner, subject.name, *predicate]
        clauses = _join(clauses, joiner, valence)
        said.add(subject)
    if rng.random() < (0.6, 0.5, 0.1)[len(clauses) - 1]:
        praise = _weigh(clauses) > 0
        verdict = rng.choice([v for v, valence in _VERDICTS.items() if (valence > 0) == praise])
        pieces.append(verdict)
        clauses.append((_VERDICTS[verdict], _VERDICT_WEIGHT))
    return Review(opening, " ".join([*pieces, "."]), _weigh(clauses))


def spoil(rng: Random, review: Review) -> Review:
    """Break a review the way a careless policy would: unfinished, cut off, stuttering or scrambled.

    Args:
        rng: source of randomness; advanced.
        review: a finished review.
    Returns: a text with the same prompt, of quality `BROKEN_QUALITY`.
    """
    words = review.response.split()
    cut = rng.randrange(1, len(words))
    fault = rng.choice(("unfinished", "cut", "stutter", "scramble"))
    if fault in ("unfinished", "cut"):
        words = words[:cut]
    elif fault == "stutter":
        words[cut:cut] = words[max(0, cut - rng.randint(1, 4)) : cut] * rng.randint(1, 3)
    else:
        rng.shuffle(words)
    return Review(review.prompt, " ".join(words), BROKEN_QUALITY, finished=fault != "unfinished")


def annotator_prefers(rng: Random, first: Review, second: Review, *, sharpness: float) -> bool:
    """Whether a simulated annotator prefers the first of two reviews.

        P(first) = sigmoid(sharpness * (quality_first - quality_second))        (Bradley and Terry, 1952)

    Args:
        rng: source of randomness; advanced.
        first, second: two reviews of the same prompt.
        sharpness: how well the annotator tells qualities apart; 0 tosses a coin.
    Returns: True where the first is preferred.
    """
    return rng.random() < 1 / (1 + exp(-sharpness * (first.quality - second.quality)))


def parse(prompt: str, response: str) -> float | None:
    """Latent quality of a text, or None where it is not a review of this grammar.

    A review that says "but" and does not turn is odd, and still a review; one that takes up a subject twice is none.
    The share of responses that parse measures how well a policy still speaks.

    Args:
        prompt: the opening; anything that is none parses to None.
        response: the continuation, without special tokens.
    Returns: the quality that `sample_review` gives the same review, or None.
    """
    rest = _Reader(response)
    subject = openings().get(prompt)
    said: set[Subject] = set()
    clauses: list[tuple[float, float]] = []
    joiner = None
    while subject is not None and subject not in said:
        said.add(subject)
        predicates = _predicates(subject.kind, subject.plural)
        predicate = rest.take(predicates)
        if predicate is None:
            return None
        hedge = rest.take(_HEDGES)
        valence = predicates[predicate] * (_HEDGES[hedge] if hedge else 1.0)
        clauses = _join(clauses, joiner, valence) if joiner else [(valence, 1.0)]
        joiner = rest.take(_JOINERS)
        if joiner is None:
            if verdict := rest.take(_VERDICTS):
                clauses.append((_VERDICTS[verdict], _VERDICT_WEIGHT))
            return _weigh(clauses) if rest.take({".": None}) and rest.ended else None
        subject = _subjects().get(rest.take(_subjects()) or "")
    return None


class _Reader:
    """A cursor over the words of a text that takes one lexicon entry at a time."""

    MOST_WORDS = 9  # of one entry

    def __init__(self, text: str) -> None:
        self._words = text.split()

    @property
    def ended(self) -> bool:
        return not self._words

    def take(self, entries: Mapping[str, object]) -> str | None:
        """The longest entry that the rest of the text starts with, which is then passed; None where there is none."""
        for num_words in range(min(self.MOST_WORDS, len(self._words)), 0, -1):
            entry = " ".join(self._words[:num_words])
            if entry in entries:
                del self._words[:num_words]
                return entry
        return None


@cache
def _subjects() -> Mapping[str, Subject]:
    """Every subject, by name."""
    return {
        name: Subject(name, kind, plural)
        for kind, by_number in lexicon.SUBJECTS.items()
        for plural, names in zip((False, True), by_number, strict=True)
        for name in names.split(",")
    }


@cache
def _phrases(kind: str, plural: bool, praise: bool) -> tuple[Mapping[str, float], ...]:
    """Predicates that praise a subject, or pan it, with their valences; one mapping for each form.

    Forms: verbs, bare adjectives, adjectives under an adverb, negated adjectives.
    """
    agreement = lexicon.PLURAL if plural else lexicon.SINGULAR
    be = agreement["is"]
    adverbs = lexicon.ADVERBS | (lexicon.PRAISING_ADVERBS if praise else lexicon.PANNING_ADVERBS)
    verbs = lexicon.VERBS["any"] | lexicon.VERBS[kind]
    adjectives = lexicon.ADJECTIVES["any"] | lexicon.ADJECTIVES[kind]
    fitting = {adjective: valence for adjective, valence in adjectives.items() if (valence > 0) == praise}
    opposite = {adjective: valence for adjective, valence in adjectives.items() if (valence > 0) != praise}
    return (
        {v.format_map(agreement): valence for v, valence in verbs.items() if (valence > 0) == praise},
        {f"{be} {a}": valence for a, valence in fitting.items()},
        {f"{be} {adverb} {a}": f * valence for adverb, f in adverbs.items() for a, valence in fitting.items()},
        {f"{be} {no} {a}": f * valence for no, f in lexicon.NEGATIONS.items() for a, valence in opposite.items()},
    )


@cache
def _predicates(kind: str, plural: bool) -> Mapping[str, float]:
    """Every predicate that fits a subject, with its valence and without a hedge."""
    return {
        phrase: valence
        for praise in (True, False)
        for form in _phrases(kind, plural, praise)
        for phrase, valence in form.items()
    }


def _sample_predicate(rng: Random, subject: Subject, *, praise: bool) -> tuple[list[str], float]:
    """A predicate for the subject, as pieces of text, and its valence."""
    form = rng.choices(_phrases(subject.kind, subject.plural, praise), (45, 15, 24, 16))[0]
    phrase, valence = rng.choice(tuple(form.items()))
    if rng.random() < 0.9:
        return [phrase], valence
    hedge, factor = rng.choice(tuple(_HEDGES.items()))
    return [phrase, hedge], valence * factor


def _join(clauses: list[tuple[float, float]], joiner: str, valence: float) -> list[tuple[float, float]]:
    """The clauses, as (valence, weight), with one more that the joiner weighs against the one before it."""
    *earlier, (last, weight) = clauses
    before, after = _JOINERS[joiner]
    return [*earlier, (last, weight * before), (valence, after)]


def _weigh(clauses: list[tuple[float, float]]) -> float:
    """Quality: the weighted sum of valences over the root of the weights; more of the same adds less and less."""
    return sum(valence * weight for valence, weight in clauses) / sqrt(sum(weight for _, weight in clauses))
