"""What people have said about a run's traces, as preference rows: the way from MLflow's pages to the next training.

    {"prompt": ..., "chosen": ..., "rejected": ...}      pairs, which prompts.from_preferences reads
    {"prompt": ..., "completion": ..., "label": true}    single judgements

The rule. Only assessments of people count (source HUMAN), and of one that was changed only the last. A feedback is a
grade: yes, true, good, better or a number; of several people the mean. Two responses of the run to the same prompt
that the same question grades differently are a pair, the higher grade chosen; where two questions disagree, there is
none. An expectation that is a text is a better response of that person's own: a pair with the one it was written for.
A yes or no is a single judgement, too. Knows no tracker.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Final

YES: Final = frozenset({"yes", "true", "good", "better", "pass", "correct", "up", "thumbs_up", "thumbs up", "👍"})
NO: Final = frozenset({"no", "false", "bad", "worse", "fail", "incorrect", "down", "thumbs_down", "thumbs down", "👎"})


@dataclass(frozen=True)
class Judged:
    """A response and what people have said about it.

    Example: ``Judged("The film was", " fine", {"better": {"anna": 1.0}}, ["a joy"])``
    """

    prompt: Any
    """A text, or messages."""
    response: str
    grades: Mapping[str, Mapping[str, float]]
    """Question -> person -> grade."""
    wishes: tuple[str, ...]
    """Responses that people have written themselves."""
    labels: tuple[bool, ...]
    """Whether people have said yes or no."""


@dataclass
class Feedback:
    """What people have said, as rows."""

    pairs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    labels: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    num_judged: int = 0
    """Responses that anybody has judged."""
    unread: list[str] = field(default_factory=list[str])
    """Values of assessments that are neither a grade nor a text of a response, each once."""


def feedback_of(traces: Iterable[Mapping[str, Any]]) -> Feedback:
    """Pairs and single judgements from traces, as MLflow's own dictionaries."""
    found = Feedback()
    judged = [judgement for trace in traces if (judgement := read_judgement(trace, found.unread)) is not None]
    found.num_judged = len(judged)
    by_prompt: defaultdict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        by_prompt[json.dumps(one.prompt, sort_keys=True)].append(one)
        found.pairs += [_pair(one.prompt, wish, one.response) for wish in one.wishes if wish != one.response]
        if one.labels and len(set(one.labels)) == 1:
            completion = _answer(one.prompt, one.response)
            found.labels.append({"prompt": one.prompt, "completion": completion, "label": one.labels[0]})
    for same in by_prompt.values():
        for one, other in itertools.combinations(same, 2):
            sign = better(one, other)
            if sign and one.response != other.response:
                chosen, rejected = (one, other) if sign > 0 else (other, one)
                found.pairs.append(_pair(one.prompt, chosen.response, rejected.response))
    return found


def better(one: Judged, other: Judged) -> int:
    """1 if the first response is graded higher, -1 if lower, 0 where nothing says so or two questions disagree."""
    signs: set[int] = set()
    for question in one.grades.keys() & other.grades.keys():
        difference = fmean(one.grades[question].values()) - fmean(other.grades[question].values())
        signs.add((difference > 0) - (difference < 0))
    signs.discard(0)
    return signs.pop() if len(signs) == 1 else 0


def read_judgement(trace: Mapping[str, Any], unread: list[str]) -> Judged | None:
    """What people have said about a trace; None if nobody has. What is no judgement is added to ``unread``."""
    grades: defaultdict[str, dict[str, float]] = defaultdict(dict)
    wishes: list[str] = []
    labels: list[bool] = []
    for assessment in trace["info"].get("assessments", []):
        source = assessment.get("source", {})
        if source.get("source_type") != "HUMAN" or assessment.get("valid") is False:
            continue
        value = (assessment.get("feedback") or assessment.get("expectation") or {}).get("value")
        if "expectation" in assessment and isinstance(value, str) and value.strip():
            wishes.append(value)
        elif "feedback" in assessment and (grade := grade_of(value)) is not None:
            grades[assessment["assessment_name"]][str(source.get("source_id"))] = grade
            labels += [grade > 0] * (not isinstance(value, int | float) or isinstance(value, bool))
        elif (shown := str(value)[:40]) not in unread:
            unread.append(shown)
    if not grades and not wishes:
        return None
    attributes = trace["data"]["spans"][0]["attributes"]
    asked = json.loads(attributes["mlflow.spanInputs"])
    prompt = asked["messages"] if "messages" in asked else asked["prompt"]  # earlier releases sent chats as a prompt
    response = json.loads(attributes["mlflow.spanOutputs"])["response"]
    return Judged(prompt, response, grades, tuple(wishes), tuple(labels))


def grade_of(value: Any) -> float | None:
    """A feedback's value as a grade, None if it is none."""
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    word = value.strip().lower() if isinstance(value, str) else ""
    return 1.0 if word in YES else 0.0 if word in NO else None


def _pair(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": _answer(prompt, chosen), "rejected": _answer(prompt, rejected)}


def _answer(prompt: Any, response: str) -> Any:
    """A response in the form of its prompt: a text, or a message."""
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
