"""A comparison as labelled cells, for the terminal and for the page alike; and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from rlhf_core.comparing.comparison import Comparison, SeedGroup
from rlhf_core.comparing.outcome import Outcome, Spread

QUANTITIES: Final[Mapping[str, tuple[str, int]]] = {
    "score": ("score", 3),
    "kl": ("KL to the reference, nats", 2),
    "beta": ("β", 4),
    "entropy": ("entropy, nats", 1),
    "length": ("response length, tokens", 1),
    "clip_fraction": ("clip fraction", 3),
}
"""What is averaged at the end -> what it is called, and its digits."""
CURVES: Final[Mapping[str, str]] = {"score": "score", "kl": "KL, nats", "beta": "β"}
"""Columns of an outcome's rows that are drawn by iteration -> what they are called."""
Line = tuple[str, list[str]]
"""A label, and a cell for each run or group."""


def result_lines(compared: Comparison) -> list[Line]:
    """The table of results: a line a quantity, a cell a run. Lines that no run has a number for are left out."""
    per_run: dict[str, Callable[[Outcome], str]] = {"standing": lambda o: o.standing, "iterations": _iterations}
    for column, (label, digits) in QUANTITIES.items():
        per_run[label] = lambda o, column=column, digits=digits: spread(o.end[column], digits)
    per_run |= {
        "gain a nat of KL": lambda o: "" if o.gain_per_nat is None else f"{o.gain_per_nat:.3f}",
        f"best score, mean of {compared.last}": lambda o: f"{o.best_score:.3f}",
        "at KL, until iteration": lambda o: f"{o.best_kl:.2f}, {o.best_until}",
        "seconds an iteration": lambda o: f"{o.seconds_per_iteration:.2f}",
        "time in all": lambda o: duration(o.seconds),
        "evaluated: iteration": lambda o: "" if o.evaluated is None else o.evaluated.policy.lstrip("0") or "0",
        "evaluated: score": lambda o: _evaluated(o, "score", 3),
        "evaluated: KL, nats": lambda o: _evaluated(o, "kl", 2),
        "evaluated: win rate": lambda o: _evaluated(o, "win_rate", 2),
        "evaluated: of the attainable": lambda o: _evaluated(o, "share_of_attainable", 2),
    }
    lines = [(label, [cell(each) for each in compared.outcomes]) for label, cell in per_run.items()]
    return [(label, cells) for label, cells in lines if any(cells)]


def group_lines(compared: Comparison) -> list[Line]:
    """The table of seeds: a line a quantity, a cell a group."""
    per_group: dict[str, Callable[[SeedGroup], str]] = {
        "seeds": lambda g: ", ".join(map(str, g.seeds)),
        "iterations": lambda g: ", ".join(map(str, sorted(set(g.num_finished)))),
    }
    for column, (label, digits) in QUANTITIES.items():
        per_group[label] = lambda g, column=column, digits=digits: spread(g.end[column], digits)
    per_group["gain a nat of KL"] = lambda g: "" if g.gain_per_nat is None else spread(g.gain_per_nat, 3)
    per_group[f"best score, mean of {compared.last}"] = lambda g: spread(g.best_score, 3)
    lines = [(label, [cell(group) for group in compared.groups]) for label, cell in per_group.items()]
    return [(label, cells) for label, cells in lines if any(cells)]


def difference_lines(compared: Comparison) -> list[Line]:
    """The table of configs: a line a key that differs, a cell a run."""
    return [(d.key, [value_text(value) for value in d.values]) for d in compared.differences]


def spread(value: Spread, digits: int) -> str:
    """``2.889 ± 0.031``."""
    text = f"{value.mean:.{digits}f}"
    return text if value.std is None else f"{text} ± {value.std:.{digits}f}"


def duration(seconds: float) -> str:
    """``48 s``, ``5 min 03 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def value_text(value: Any) -> str:
    """A value of a config as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def to_json(compared: Comparison) -> dict[str, Any]:
    """All of it as plain JSON."""
    return {
        "last": compared.last,
        "runs": [_run_json(each) for each in compared.outcomes],
        "differences": {d.key: list(d.values) for d in compared.differences},
        "seeds": [asdict(group) for group in compared.groups],
        "notes": list(compared.notes),
    }


def _run_json(each: Outcome) -> dict[str, Any]:
    evaluated = each.evaluated
    columns = ("iteration", *CURVES)
    return {
        "name": each.name,
        "path": str(each.run.path),
        "standing": each.standing,
        "num_finished": len(each.rows),
        "num_iterations": each.run.config.num_iterations,
        "seed": each.run.config.seed,
        "averaged": each.num_averaged,
        "end": {column: asdict(value) for column, value in each.end.items()},
        "kl_target": each.kl_target,
        "gain_per_nat": each.gain_per_nat,
        "best": {"score": each.best_score, "kl": each.best_kl, "until": each.best_until},
        "seconds_per_iteration": each.seconds_per_iteration,
        "seconds": each.seconds,
        "evaluation": None
        if evaluated is None
        else {
            "folder": evaluated.folder,
            "policy": evaluated.policy,
            **evaluated.numbers,
        },
        "curves": {column: [row[column] for row in each.rows] for column in columns},
    }


def _iterations(each: Outcome) -> str:
    return f"{len(each.rows)} of {each.run.config.num_iterations}"


def _evaluated(each: Outcome, name: str, digits: int) -> str:
    value = None if each.evaluated is None else each.evaluated.numbers[name]
    if value is None:
        return ""
    reach = max(value["high"] - value["mean"], value["mean"] - value["low"])
    return f"{value['mean']:.{digits}f} ± {reach:.{digits}f}"
