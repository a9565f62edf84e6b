"""Runs compared: opened, checked, told apart by name, grouped where they differ by their seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rlhf_core.comparing.outcome import AVERAGED, LAST, Outcome, Spread, newest_evaluation, outcome
from rlhf_core.contracts.config_io import config_digest, flat_params
from rlhf_core.contracts.errors import IntegrityError, RlhfError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import FINGERPRINT, flat_identity

ABSENT: Final = "(absent)"
"""Stands for a key that a config lacks, as a list of components may be shorter."""
SHOWN_DIGITS: Final = 12
"""Of a digest."""


@dataclass(frozen=True)
class Difference:
    """A key of the config whose values differ."""

    key: str
    values: Sequence[Any]
    """One for each run, in order."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one config with several seeds."""

    name: str
    """What tells it from the other groups."""
    runs: Sequence[str]
    seeds: Sequence[int]
    num_finished: Sequence[int]
    end: Mapping[str, Spread]
    """Mean and standard deviation over the runs, each counted by its own mean at its end."""
    gain_per_nat: Spread | None
    best_score: Spread


@dataclass(frozen=True)
class Comparison:
    """What is printed and drawn."""

    outcomes: Sequence[Outcome]
    last: int
    differences: Sequence[Difference]
    groups: Sequence[SeedGroup]
    """Only where at least one config was run with two seeds."""
    notes: Sequence[str]
    """Other conditions: machine, libraries, threads, models, source."""


def compare(paths: Sequence[Path], last: int = LAST) -> Comparison:
    """Compare runs, finished or going.

    Args:
        paths: at least two run folders.
        last: iterations averaged at the end of each.
    Raises: UserError with every problem found.
    """
    runs = _opened(paths)
    names = _names([run.path for run in runs])
    outcomes = [outcome(run, name, last, newest_evaluation(run)) for run, name in zip(runs, names, strict=True)]
    differences = config_differences(runs)
    return Comparison(outcomes, last, differences, _groups(outcomes, differences), identity_notes(outcomes))


def config_differences(runs: Sequence[RunFolder]) -> list[Difference]:
    """The keys of the configs whose values are not the same in all runs, in the order of the config."""
    flat = [flat_params(run.config) for run in runs]
    keys = dict.fromkeys(key for params in flat for key in params)
    table = {key: [params.get(key, ABSENT) for params in flat] for key in keys}
    return [Difference(key, values) for key, values in table.items() if any(v != values[0] for v in values)]


def identity_notes(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each entry of the identities that differs, beside the config itself."""
    flat = [{k: v for k, v in flat_identity(o.run.identity).items() if k != "config"} for o in outcomes]
    notes: list[str] = []
    if len({identity.get("num_threads") for identity in flat}) > 1 or not all(FINGERPRINT in each for each in flat):
        flat = [{key: value for key, value in each.items() if key != FINGERPRINT} for each in flat]  # it follows
    for key in sorted({key for identity in flat for key in identity}):
        of_value: dict[str, list[str]] = {}
        for each, identity in zip(outcomes, flat, strict=True):
            of_value.setdefault(_short(identity.get(key, "none")), []).append(each.name)
        if len(of_value) > 1:
            notes.append(f"{key} differs: " + "; ".join(f"{v} in {', '.join(names)}" for v, names in of_value.items()))
    return notes


def _opened(paths: Sequence[Path]) -> list[RunFolder]:
    problems: list[str] = []
    if len(paths) < 2:
        alone = paths[0] if paths else "RUN"
        problems.append(f"compare takes two runs or more, and was given one; `rlhf inspect {alone}` looks into one run")
    seen: dict[Path, Path] = {}
    runs: list[RunFolder] = []
    for path in paths:
        if (place := path.resolve()) in seen:
            problems.append(f"{path} is the same run as {seen[place]}: name each run once")
            continue
        seen[place] = path
        try:
            runs.append(_open(path))
        except RlhfError as error:
            problems.append(str(error).replace("\n", "; "))
    if problems:
        raise UserError(*problems)
    return runs


def _open(path: Path) -> RunFolder:
    """A run with at least one finished iteration. Raises RlhfError."""
    try:
        run = RunFolder.open(path)
    except UserError as error:
        if not (path / "run.json").is_file():
            raise
        raise UserError(f"{path} was written by another version of rlhf-flow, whose config differs: {error}") from None
    try:
        finished = run.num_finished()
    except IntegrityError as error:
        raise IntegrityError(f"{path} cannot be compared: {error}") from None
    if finished == 0:
        at_work = "wait for it" if run.is_locked() else f"`rlhf resume {path}` goes on with it"
        raise UserError(f"{path} has not finished its first iteration, so there is nothing to compare yet: {at_work}")
    return run


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for num in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-num:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("two paths are the same")


def _groups(outcomes: Sequence[Outcome], differences: Sequence[Difference]) -> list[SeedGroup]:
    alike: dict[str, list[int]] = {}
    for i, each in enumerate(outcomes):
        alike.setdefault(config_digest(each.run.config.model_copy(update={"seed": 0})), []).append(i)
    if all(len({outcomes[i].run.config.seed for i in members}) < 2 for members in alike.values()):
        return []
    return [_group(outcomes, members, differences) for members in alike.values()]


def _group(outcomes: Sequence[Outcome], members: Sequence[int], differences: Sequence[Difference]) -> SeedGroup:
    inside = [outcomes[i] for i in members]
    # what is the same within the group, and not in all runs, names it
    telling = [d for d in differences if d.key != "seed" and all(d.values[i] == d.values[members[0]] for i in members)]
    shown = [f"{d.key}={d.values[members[0]]}" for d in telling if not d.key.startswith("tracking.")]
    gains = [each.gain_per_nat for each in inside if each.gain_per_nat is not None]
    return SeedGroup(
        name=", ".join(shown) or "the same config",
        runs=[each.name for each in inside],
        seeds=[each.run.config.seed for each in inside],
        num_finished=[len(each.rows) for each in inside],
        end={column: Spread.of([each.end[column].mean for each in inside]) for column in AVERAGED},
        gain_per_nat=Spread.of(gains) if len(gains) == len(inside) else None,
        best_score=Spread.of([each.best_score for each in inside]),
    )


def _short(value: Any) -> str:
    text = str(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:SHOWN_DIGITS]}…" if is_digest else text
