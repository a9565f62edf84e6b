"""Ready-made reward functions: length, regex, format, exact_match, numeric_match, sentiment, repetition.

They are called like those of users. A ``ValueError`` is a mistake in ``params``, and is raised for no responses
too, so that it is found before a run starts. None means that a response cannot be scored.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_core.contracts.reward_config import GIVEN, FunctionReward
from rlhf_core.models.reward_text import Failure
from rlhf_core.prompts.entries import shown
from rlhf_core.rewards.numbers import last_number

THINK = "<think>"
OPENED = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
"""How a chat template begins an answer with a thought, or with an empty one."""
THINK_THEN_ANSWER = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>"


def length(
    responses: Sequence[str], completion_ids: Sequence[Sequence[int]], *, unit: str = "tokens", target: Any = None
) -> list[float]:
    """The length of each response, or how far it is from a target.

        n;    with a target: -|n - target| / target

    Args:
        responses: texts.
        completion_ids: their tokens, EOS included.
        unit: tokens, words or characters.
        target: None, or a positive number of units.
    """
    _choice("unit", unit, ("tokens", "words", "characters"))
    if target is not None:
        _number("target", target, above=0)
    pieces: Sequence[Sequence[Any]]
    pieces = completion_ids if unit == "tokens" else [t.split() if unit == "words" else t for t in responses]
    return [float(len(p)) if target is None else -abs(len(p) - target) / target for p in pieces]


def regex(
    responses: Sequence[str],
    *,
    pattern: Any = None,
    mode: str = "search",
    ignore_case: bool = False,
    dot_all: bool = False,
) -> list[float]:
    """Whether, or how often, a regular expression (Python's) is found.

    Args:
        responses: texts.
        pattern: the expression.
        mode: search: 1 if it is anywhere, else 0; whole: 1 if it is the whole response, but for white space around;
            count: how often it is there.
        ignore_case: small and capital letters are alike.
        dot_all: a dot is a line break too.
    """
    compiled = _pattern("pattern", pattern, flags=_flags(ignore_case=ignore_case, dot_all=dot_all))
    _choice("mode", mode, ("search", "whole", "count"))
    if mode == "count":
        return [float(sum(1 for _ in compiled.finditer(text))) for text in responses]
    found = compiled.search if mode == "search" else compiled.fullmatch
    return [float(found(text.strip() if mode == "whole" else text) is not None) for text in responses]


def format_(responses: Sequence[str], *, pattern: Any = THINK_THEN_ANSWER, opened: Any = False) -> list[float]:
    """1 if the whole response has a form, else 0.

    Args:
        responses: texts; white space around them is ignored.
        pattern: the form, a regular expression whose dot is a line break too; default: one
            ``<think>…</think>``, then one ``<answer>…</answer>``.
        opened: what the prompt ends with and the form begins with: true for ``<think>``, or another text; a chat
            template may open the answer so.
    """
    if not isinstance(opened, bool | str):
        raise ValueError(f"opened is {opened!r}; give true, false, or the text that the prompt ends with")
    before = opened if isinstance(opened, str) else THINK if opened else ""
    return regex([before + text for text in responses], pattern=pattern, mode="whole", dot_all=True)


def opened_by_prompt(config: FunctionReward, field: str, prompt_text: str) -> str | None:
    """A sentence where a prompt's end and the ``opened`` of the ready-made ``format`` do not agree; else None.

    Args:
        config: of the component.
        field: its place in the config.
        prompt_text: a prompt as the policy reads it.
    """
    pattern, opened = config.params.get("pattern", THINK_THEN_ANSWER), config.params.get("opened", False)
    if config.function != "format" or THINK not in str(pattern):
        return None
    before = opened if isinstance(opened, str) else THINK if opened else ""
    found = OPENED.search(prompt_text)
    if found is None or before:
        if before and not prompt_text.rstrip().endswith(before.rstrip()):
            return f"{field}.params has opened: {opened!r}, but prompts end with {prompt_text[-24:]!r}"
        return None
    remedy = "true" if "</" not in found[0] else repr(found[0])
    return (
        f"prompts end with {found[0]!r}, and {field} (format) looks for it in the response, where it is not: every "
        f"answer scores 0; set {field}.params: {{opened: {remedy}}}"
    )


def exact_match(
    responses: Sequence[str],
    *,
    column: Any = "answer",
    extract: Any = None,
    ignore_case: bool = False,
    **columns: Sequence[Any],
) -> list[float | Failure | None]:
    """1 if the response is the answer, white space aside, else 0.

    Args:
        responses: texts.
        column: dataset column of answers, texts or numbers; null: not to be scored.
        extract: regular expression of the part of a response that is compared: its first group, or all of it, where
            it is found last; 0 where it is not found. None: the whole response.
        ignore_case: small and capital letters are alike.
        columns: dataset columns.
    """
    answers = _answers(column, columns)
    compiled = None if extract is None else _pattern("extract", extract, flags=re.DOTALL)
    _flags(ignore_case=ignore_case)

    def plain(text: str | None) -> str | None:
        joined = None if text is None else " ".join(text.split())
        return joined.casefold() if joined is not None and ignore_case else joined

    given = [plain(text if compiled is None else _last(compiled, text)) for text in responses]
    return [
        Failure(f"has the answer {shown(answer)}, which is no text,")
        if isinstance(answer, list | dict)
        else None
        if answer is None
        else float(response == plain(str(answer)))
        for response, answer in zip(given, answers, strict=True)
    ]


def numeric_match(
    responses: Sequence[str],
    *,
    column: Any = "answer",
    tolerance: Any = 1e-6,
    relative_tolerance: Any = 0.0,
    **columns: Sequence[Any],
) -> list[float | Failure | None]:
    r"""1 if the last number in the response is the answer, else 0.

    Numbers may be fractions (``3/4``, ``\frac{3}{4}``), have commas, a unit or a per cent sign, which changes nothing;
    one in ``\boxed{…}`` or behind ``####`` counts before others. What cannot be read with certainty, such as
    ``\sqrt{3}``, is no number: see :mod:`rlhf_core.rewards.numbers`.

    Args:
        responses: texts.
        column: dataset column of answers: numbers, or texts whose last number counts, as GSM8K's ``… #### 1,200``;
            null, or a text without a number: not to be scored.
        tolerance: how far it may be off.
        relative_tolerance: likewise, as a share of the greater of the two; the larger tolerance decides.
        columns: dataset columns.
    """
    answers = _answers(column, columns)
    _number("tolerance", tolerance, least=0)
    _number("relative_tolerance", relative_tolerance, least=0)
    scores: list[float | Failure | None] = []
    for text, answer in zip(responses, answers, strict=True):
        given, wanted = last_number(text), number_of(answer)
        if wanted is None or isinstance(wanted, Failure):
            scores.append(wanted)
        else:
            near = given is not None and math.isclose(given, wanted, rel_tol=relative_tolerance, abs_tol=tolerance)
            scores.append(float(near))
    return scores


def number_of(answer: Any) -> float | Failure | None:
    """The number of an answer; None: not to be scored; a Failure where it is neither a number nor a text."""
    if isinstance(answer, bool) or not (answer is None or isinstance(answer, int | float | str)):
        return Failure(f"has the answer {shown(answer)}, which is neither a number nor a text,")
    return None if answer is None else last_number(str(answer))


def sentiment(responses: Sequence[str]) -> list[float]:
    """How positive each response is, from -1 to 1, by VADER's lexicon of English.

    Args:
        responses: texts.
    """
    analyzer = _vader()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in responses]


def repetition(
    responses: Sequence[str], completion_ids: Sequence[Sequence[int]], *, ngram: Any = 3, unit: str = "words"
) -> list[float]:
    """Minus the share of n-grams that a response had used before: 0 all new, towards -1 a loop.

        |distinct n-grams| / |n-grams| - 1

    Args:
        responses: texts.
        completion_ids: their tokens, EOS included.
        ngram: n, at least 1; a shorter response scores 0.
        unit: words or tokens.
    """
    _choice("unit", unit, ("words", "tokens"))
    if not isinstance(ngram, int) or isinstance(ngram, bool) or ngram < 1:
        raise ValueError(f"ngram is {ngram!r}; give a whole number of at least 1")
    scores: list[float] = []
    for pieces in [t.lower().split() for t in responses] if unit == "words" else completion_ids:
        grams = [tuple(pieces[i : i + ngram]) for i in range(len(pieces) - ngram + 1)]
        scores.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return scores


READY_MADE: dict[str, Callable[..., Any]] = {
    "length": length,
    "regex": regex,
    "format": format_,
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "sentiment": sentiment,
    "repetition": repetition,
}
"""By the names that a config uses."""


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _last(compiled: re.Pattern[str], text: str) -> str | None:
    found = [match.group(1 if compiled.groups else 0) for match in compiled.finditer(text)]
    return found[-1] if found else None


def _answers(column: Any, columns: dict[str, Sequence[Any]]) -> Sequence[Any]:
    if not isinstance(column, str) or column in GIVEN or column not in columns:
        raise ValueError(f"column is {column!r}, which is not among prompts.columns; name the column of answers there")
    return columns[column]


def _pattern(name: str, pattern: Any, *, flags: int) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{name} is {pattern!r}; give a regular expression")
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{name} {pattern!r} is no regular expression: {error}") from None


def _flags(*, ignore_case: Any = False, dot_all: Any = False) -> int:
    for name, value in (("ignore_case", ignore_case), ("dot_all", dot_all)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; give true or false")
    return (re.IGNORECASE if ignore_case else 0) | (re.DOTALL if dot_all else 0)


def _choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; known are {', '.join(known)}")


def _number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > above or not value >= least:
        bound = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise ValueError(f"{name} is {value!r}; give a number {bound}")
