"""From a config, a grid and seeds to runs: every combination is built before the first begins.

A point is one combination of the grid's values; a run is a point with a seed. Seeds come before points in the order
of runs, so that a sweep that is stopped has seen every point about as often.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, canonical_json, config_digest, parse_yaml
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.secrets import without_secrets

Grid = Mapping[str, Sequence[Any]]
"""Dotted key -> the values that it takes in turn."""
MAX_RUNS: Final = 64
"""Runs that a sweep may have unless more are asked for."""
MAX_SEEDS: Final = 1000
LONGEST_NAME: Final = 120
"""Bytes of a run's name made of its values; a longer one is a number."""
TRIALS: Final = "-sweep"
"""Ends the name under which the policies of a sweep are registered: a trial must not move the aliases of the others."""
_UNFIT: Final = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Example: ``SweepRun("kl.coef=0.05_seed=1", 1, {"kl.coef": 0.05}, 1, config)``
    """

    name: str
    """Of its folder, and in the tracker."""
    point: int
    """Index of its combination."""
    values: Mapping[str, Any]
    """The combination: key -> value."""
    seed: int
    config: RunConfig


def parse_grid(texts: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The grid that the options ``--grid key=v1,v2`` say.

    Args:
        texts: one option each; values as YAML has them, separated by commas: ``generation.stop=[a],[a,b]``.
        overrides: the options ``--set``, none of which may be of the same key.
    Raises: UserError with every mistake.
    """
    problems, grid = list[str](), dict[str, list[Any]]()
    for text in texts:
        key, sign, values = text.partition("=")
        key = key.strip()
        if not (sign and key and values.strip()):
            problems.append(f"--grid {text!r} is not of the form section.key=value,value")
            continue
        try:
            found = parse_yaml(f"[{values}]", origin=f"--grid {key}")
        except UserError as error:
            problems += error.problems
            continue
        if not isinstance(found, list):
            problems.append(f"--grid {key}={values} holds no list of values; separate them by commas")
        elif key in grid:
            problems.append(f"--grid {key} is given twice; give all of its values at once")
        else:
            grid[key] = cast("list[Any]", found)
    for override in overrides:
        set_key = override.partition("=")[0].strip()
        problems += [
            f"--grid {key} and --set {set_key} are of the same key, and the grid would win; leave one of them out"
            for key in grid
            if _overlap(key, set_key)
        ]
    if problems:
        raise UserError(*problems)
    return grid


def parse_seeds(text: str | None, first: int) -> list[int]:
    """The seeds that the option ``--seeds`` says.

    Args:
        text: ``3`` for so many, from ``first`` on; ``1,2,5`` for these; None for ``first`` alone.
        first: the config's own seed.
    Raises: UserError if it is neither.
    """
    if text is None:
        return [first]
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and not parts[-1]:  # "7," is the seed 7, not seven seeds
        parts.pop()
    if not all(part.isascii() and part.isdecimal() and len(part) < 20 for part in parts):
        raise UserError(f"--seeds is {text!r}; give how many, as 3, or which, as 1,2,5 (7, is the seed 7 alone)")
    numbers = [int(part) for part in parts]
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= MAX_SEEDS:
        raise UserError(f"--seeds is {text}: how many seeds is from 1 to {MAX_SEEDS}")
    return [first + i for i in range(numbers[0])]


def plan_runs(config: RunConfig, grid: Grid, seeds: Sequence[int], *, max_runs: int = MAX_RUNS) -> list[SweepRun]:
    """Every run of a sweep, its config built and valid in itself.

    Args:
        config: what all of them share.
        grid: what differs between points; may be empty.
        seeds: one run of each point for each.
        max_runs: more are refused.
    Returns: seed after seed, in each the points in order, the grid's last key changing fastest.
    Raises: UserError with every mistake of every combination, each told once.
    """
    problems = [*_grid_problems(grid), *_seed_problems(seeds)]
    if problems:
        raise UserError(*problems)
    num_points = math.prod(len(values) for values in grid.values())
    if num_points * len(seeds) > max_runs:
        factors = " x ".join(f"{len(values)} {key}" for key, values in grid.items())
        raise UserError(
            f"--grid and --seeds give {factors}{' x ' if factors else ''}{len(seeds)} seeds = "
            f"{num_points * len(seeds):,} runs, more than --max-runs {max_runs}; "
            f"give --max-runs {num_points * len(seeds)} if you mean it"
        )
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    configs = _built(config, points, seeds)
    _refuse_equal(points, [configs[i, seeds[0]] for i in range(num_points)])
    names = _names(points, seeds)
    return [
        SweepRun(names[i, seed], i, point, seed, _as_trial(configs[i, seed], names[i, seed]))
        for seed in seeds
        for i, point in enumerate(points)
    ]


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A config with the values of a point. Raises UserError with every mistake."""
    try:
        return build_config(config.model_dump(), [f"{key}={json.dumps(value)}" for key, value in values.items()])
    except UserError as error:
        raise UserError(*(problem.replace("--set ", "--grid ", 1) for problem in error.problems)) from None


def point_label(values: Mapping[str, Any]) -> str:
    """A point as a person reads it: ``kl.coef=0.02, ppo.learning_rate=0.0001``."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in values.items()) or "the config"


def value_text(value: Any) -> str:
    """A value as a config has it, without secrets."""
    return without_secrets(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def together(found: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Mistakes of all points, each told once, with the points that have it unless all of them do.

    Args:
        found: (label of a point, its mistakes).
    """
    where: dict[str, list[str]] = {}
    for label, problems in found:
        for problem in problems:
            where.setdefault(problem, []).append(label)
    told: list[str] = []
    for problem, everywhere in where.items():
        labels = list(dict.fromkeys(everywhere))
        rest = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        told.append(
            problem if len(labels) == len({label for label, _ in found}) else f"{problem} (at {labels[0]}{rest})"
        )
    return told


def _grid_problems(grid: Grid) -> Iterator[str]:
    for key, values in grid.items():
        if key == "seed":
            yield "--grid seed is not a point of its own: give --seeds, over which points are compared"
        if not values:
            yield f"--grid {key} has no values; give at least one"
        texts = [canonical_json(value) for value in values]
        yield from (
            f"--grid {key} has the value {value_text(value)} twice; leave one out"
            for i, value in enumerate(values)
            if texts[i] in texts[:i]
        )
    for one, other in itertools.combinations(grid, 2):
        if _overlap(one, other):
            yield f"--grid {one} and --grid {other} are of the same key; leave one of them out"


def _seed_problems(seeds: Sequence[int]) -> Iterator[str]:
    if not seeds:
        yield "--seeds is empty; give at least one seed"
    yield from (f"--seeds has {seed} twice; leave one out" for i, seed in enumerate(seeds) if seed in seeds[:i])


def _built(
    config: RunConfig, points: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> dict[tuple[int, int], RunConfig]:
    """(point, seed) -> its config. Raises UserError with all mistakes of all of them."""
    built: dict[tuple[int, int], RunConfig] = {}
    found: list[tuple[str, Sequence[str]]] = []
    for (index, point), seed in itertools.product(enumerate(points), seeds):
        try:
            built[index, seed] = with_values(config, {**point, "seed": seed})
            found.append((point_label(point), ()))
        except UserError as error:
            found.append((point_label(point), error.problems))
    if problems := together(found):
        raise UserError(*problems)
    return built


def _refuse_equal(points: Sequence[Mapping[str, Any]], configs: Sequence[RunConfig]) -> None:
    """Raise UserError if two points are the same run: tracking.*, say, changes no number."""
    first: dict[str, int] = {}
    for index, config in enumerate(configs):
        same = first.setdefault(config_digest(config), index)
        if same != index:
            raise UserError(
                f"--grid: the points {point_label(points[same])} and {point_label(points[index])} are the same run: "
                "what differs between them changes no number of it"
            )


def _as_trial(config: RunConfig, name: str) -> RunConfig:
    """What only the tracker sees of a trial: a name of its own, and no word in which policy others load."""
    tracking = config.tracking
    changes = {
        "run_name": name if tracking.run_name is None else f"{tracking.run_name} {name}",
        "registered_model": f"{tracking.registered_model[: 200 - len(TRIALS)]}{TRIALS}",
    }
    return config.model_copy(update={"tracking": tracking.model_copy(update=changes)})


def _names(points: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[tuple[int, int], str]:
    """(point, seed) -> the name of its run folder: its values where they fit into a name, else their number."""
    heads = ["_".join(f"{key}={_fit(value_text(value))}" for key, value in point.items()) for point in points]
    folded = {head.casefold() for head in heads}  # some disks take two names for one that differ by case alone
    if len(folded) < len(heads) or max(map(len, heads)) > LONGEST_NAME:
        heads = [f"point={i:03d}" for i in range(len(points))]
    return {
        (i, seed): f"{head}_seed={seed}".lstrip("_") for i, head in enumerate(heads) for seed in seeds
    }  # fmt: skip


def _fit(text: str) -> str:
    return _UNFIT.sub("-", text).strip("-.")


def _overlap(one: str, other: str) -> bool:
    """Whether two keys are the same, or one is a section that holds the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
