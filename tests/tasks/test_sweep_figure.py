"""The picture of a sweep: points, intervals, the best one; and none while nothing is finished."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from tasks.sweep.figure import draw_sweep


def point(index: int, score: float, kl: float, *, reach: float | None = 0.1, finished: int = 3) -> dict[str, Any]:
    def interval(mean: float) -> dict[str, float | None]:
        low, high = (None, None) if reach is None else (mean - reach, mean + reach)
        return {"mean": mean, "low": low, "high": high}

    label = f"prompts.column=$x_{index}"  # a formula, if it were read as one: it does not end
    numbers = {"score": interval(score), "kl": interval(kl)} if finished else {"score": None, "kl": None}
    return {"point": index, "label": label, "finished": finished, "of": 3, "on_frontier": finished == 3, **numbers}


def summary(points: list[dict[str, Any]], best: int | None = 0, at_kl: float | None = None) -> dict[str, Any]:
    runs = [
        {"point": p["point"], "seed": seed, "finished": seed < p["finished"],
         "score": (p["score"] or {"mean": 0})["mean"] + 0.1 * seed, "kl": 1.0 + seed}
        for p in points
        for seed in range(3)
    ]  # fmt: skip
    criterion = {"price": 0.2, "at_kl": at_kl}
    return {"points": points, "runs": runs, "seeds": [0, 1, 2], "best": {"point": best}, "criterion": criterion}


def drawn(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The panel that was drawn."""
    panels: list[Any] = []
    make = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self: panels.append(make(self)) or panels[0])
    picture = draw_sweep(found, "a_sweep$")
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    return panels[0]


def test_a_mark_a_run_and_the_mean_of_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = drawn(summary([point(0, 2.0, 3.0), point(1, 1.0, 1.0), point(2, 0.0, 0.0, finished=0)]), monkeypatch)
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels[-2:] == [r"prompts.column=\$x_0: best", r"prompts.column=\$x_1"]
    assert "no other has more at less KL" in labels
    assert "worth as much at 0.2 a nat" in labels
    assert len(panel.containers) == 2, "nothing of what has not finished"
    clouds = [line for line in panel.lines if line.get_alpha() == 0.5]
    assert [len(line.get_xdata()) for line in clouds] == [3, 3]


def test_the_allowed_kl_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = drawn(summary([point(0, 2.0, 3.0, reach=None, finished=1)], best=None, at_kl=4.0), monkeypatch)
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["KL at most 4", r"prompts.column=\$x_0 (1 of 3 seeds)"]


def test_many_points_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = drawn(summary([point(i, float(i), float(i)) for i in range(50)]), monkeypatch)
    assert panel.get_legend() is None


def test_nothing_to_draw() -> None:
    assert draw_sweep(summary([point(0, 0.0, 0.0, finished=0)], best=None), "sweep") is None
