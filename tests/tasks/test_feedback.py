"""What people say about responses becomes pairs by one rule, and a training reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.prompts.sources import load_prompt_set
from tasks.tracking.feedback import feedback_of, grade_of


def said(name: str, value: Any, *, who: str = "anna", kind: str = "HUMAN", **more: Any) -> dict[str, Any]:
    """A feedback, or an expectation, as MLflow gives it."""
    what = "expectation" if name == "expected_response" else "feedback"
    source = {"source_type": kind, "source_id": who}
    return {"assessment_name": name, "source": source, what: {"value": value}, "valid": True} | more


def trace(prompt: Any, response: str, *assessments: dict[str, Any], as_before: bool = False) -> dict[str, Any]:
    """A trace; earlier releases sent a chat as its prompt."""
    attributes = {
        "mlflow.spanInputs": json.dumps({"prompt" if isinstance(prompt, str) or as_before else "messages": prompt}),
        "mlflow.spanOutputs": json.dumps({"response": response}),
    }
    return {"info": {"assessments": list(assessments)}, "data": {"spans": [{"attributes": attributes}]}}


def pairs(*traces: dict[str, Any]) -> list[dict[str, Any]]:
    return feedback_of(traces).pairs


def test_two_grades_of_one_prompt_are_a_pair() -> None:
    rows = pairs(
        trace("p", "good", said("ok", True)), trace("p", "bad", said("ok", "No")), trace("q", "x", said("ok", 0))
    )
    assert rows == [{"prompt": "p", "chosen": "good", "rejected": "bad"}]


def test_numbers_are_grades_and_those_of_several_people_a_mean() -> None:
    first = trace("p", "one", said("stars", 5), said("stars", 1, who="ben"))
    second = trace("p", "two", said("stars", 4), said("stars", 4, who="ben"))
    assert pairs(first, second) == [{"prompt": "p", "chosen": "two", "rejected": "one"}]


def test_equal_grades_other_questions_and_questions_that_disagree_are_none() -> None:
    assert pairs(trace("p", "one", said("ok", True)), trace("p", "two", said("ok", True))) == []
    assert pairs(trace("p", "one", said("ok", True)), trace("p", "two", said("kind", False))) == []
    one, two = [said("ok", True), said("kind", False)], [said("ok", False), said("kind", True)]
    assert pairs(trace("p", "one", *one), trace("p", "two", *two)) == []
    assert pairs(trace("p", "same", said("ok", True)), trace("p", "same", said("ok", False))) == []


def test_an_expectation_is_a_better_response() -> None:
    rows = pairs(trace("p", "bad", said("expected_response", "as it should be"), said("ok", False)))
    assert rows == [{"prompt": "p", "chosen": "as it should be", "rejected": "bad"}]
    assert pairs(trace("p", "as it is", said("expected_response", "as it is"))) == []


def test_only_people_count_and_only_their_last_word() -> None:
    judge = said("ok", False, kind="LLM_JUDGE")
    changed = said("ok", False, valid=False)
    found = feedback_of([trace("p", "one", judge), trace("p", "two", changed, said("ok", True))])
    assert found.num_judged == 1
    assert found.labels == [{"prompt": "p", "completion": "two", "label": True}]


def test_single_judgements_are_those_of_yes_and_no_that_agree() -> None:
    found = feedback_of(
        [
            trace("p", "one", said("ok", "yes"), said("ok", True, who="ben")),
            trace("p", "two", said("ok", True), said("ok", False, who="ben")),
            trace("q", "three", said("stars", 3)),
            trace("q", "four", said("ok", "hm, hard to say"), said("ok", {"a": 1}, who="ben")),
        ]
    )
    assert found.labels == [{"prompt": "p", "completion": "one", "label": True}]
    assert found.unread == ["hm, hard to say", "{'a': 1}"]


@pytest.mark.parametrize(
    ("value", "grade"),
    [(True, 1.0), (False, 0.0), (3, 3.0), (-0.5, -0.5), (" Yes ", 1.0), ("👎", 0.0), ("maybe", None), (None, None),
     (float("nan"), None), ([1], None)],
)  # fmt: skip
def test_a_grade(value: Any, grade: float | None) -> None:
    assert grade_of(value) == grade


@pytest.mark.parametrize("as_before", [False, True])
@pytest.mark.parametrize("prompt", ["What is the film like?", [{"role": "user", "content": "What is the film like?"}]])
def test_a_training_reads_the_pairs(tmp_path: Path, prompt: Any, as_before: bool) -> None:
    rows = pairs(
        trace(prompt, "A joy.", said("ok", True), as_before=as_before), trace(prompt, "A bore.", said("ok", False))
    )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompt_set(PromptsConfig(source=str(tmp_path / "pairs.jsonl"), from_preferences=True))
    assert found.entries == [prompt]
