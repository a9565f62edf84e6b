"""Power loss at every moment of a run, on a model of a disk: see ``power.py``.

Recorded are a run from beginning to end, and runs that are killed and resumed: what the first process had renamed and
not synced, the second one builds on. Every crash state is checked for what was promised before the cut; those that
look alike to a reader are resumed once, on a real disk, with their leftovers, and must end with the same hash.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from torture.battery import Effort, Outcome
from torture.power import (
    CORNERS,
    FOREIGN,
    TALK,
    Contents,
    Model,
    Operation,
    RecordingDisk,
    cuts,
    digest_of,
    materialise,
    read_trace,
    record,
    visible,
)
from torture.runs import battery_config, fingerprint, in_child, start_or_go_on

from rlhf_core.contracts.config import RunConfig

NAME = "power loss"
GOAL = ">= 20,000 crash states, 0 unrecoverable"
STATES = 20_000
SEED = 4


@dataclass
class Found:
    """The crash states of all traces so far."""

    states: set[str] = field(default_factory=set[str])
    looks: dict[str, Contents] = field(default_factory=dict[str, Contents])
    """Digest of what a reader sees -> one such disk, with leftovers if there is one."""
    broken: dict[str, str] = field(default_factory=dict[str, str])
    """Crash state -> a promise that it breaks."""
    resumed: int = 0
    failures: list[str] = field(default_factory=list[str])


def measure(effort: Effort) -> Outcome:
    """Record runs, cut their power everywhere, resume whatever a reader could find."""
    dice = random.Random(SEED)
    config = battery_config(effort.tiny)
    traces = [effort.folder / "whole"]
    expected = _record(config, effort.folder, traces[0], None)
    whole = read_trace(traces[0])
    deaths, found, durable_operations = _deaths(whole), Found(), 0
    for number, death in enumerate(dice.sample(deaths, effort.size(1, min(12, len(deaths))))):
        traces.append(effort.folder / f"killed-{number}")
        if _record(config, effort.folder, traces[-1], death) != expected:
            found.failures.append(f"killed after operation {death}: not resumed to the same hash")
    for trace in traces:
        operations = read_trace(trace)
        durable_operations += len(operations)
        _cut_everywhere(operations, dice, effort.size(3, 60), found)
    looks = sorted(found.looks)
    for number, look in enumerate(looks if effort.full else dice.sample(looks, min(6, len(looks)))):
        effort.progress(number, len(looks))
        _resume(config, effort.folder, found.looks[look], expected, found, look)
    failures = [*found.broken.values(), *found.failures]
    lost = len(found.broken) + len(found.failures)
    return Outcome(
        tried=len(found.states),
        passed=max(0, len(found.states) - lost),
        figure=(
            f"{len(found.states):,} different crash states at {durable_operations:,} points of {len(traces)} recorded "
            f"runs, {len(found.broken)} break a promise or look whole and are not; {len(looks):,} of them differ to a "
            f"reader, {found.resumed:,} of those resumed, {len(found.failures)} not to the same hash"
        ),
        goal_size=STATES,
        failures=failures[:10],
        numbers={"looks": len(looks), "resumed": found.resumed, "points": durable_operations, "traces": len(traces)},
    )


def _record(config: RunConfig, folder: Path, trace: Path, die_after: int | None) -> str:
    """Write the trace of a run, killed and resumed if so wanted.

    Returns: its fingerprint; of one that did not go on, its last word.
    """
    root = folder / "disk"
    root.mkdir()
    log = folder / "log"

    def run(die_after: int | None) -> int:
        return in_child(
            lambda: record(lambda: start_or_go_on(config, root / "run"), RecordingDisk(root, trace, die_after)), log=log
        )

    if die_after is not None:
        assert run(die_after) == 9, "the run outlived its death"
    result = fingerprint(root / "run") if run(None) == 0 else log.read_text().splitlines()[-1]
    shutil.rmtree(root)
    return result


def _deaths(whole: list[Operation]) -> list[int]:
    """Number of operations after which a name is visible and not synced yet."""
    ours = [op for op in whole if op.kind not in TALK and op.other != FOREIGN]
    return [i for i, op in enumerate(ours) if op.kind in ("rename", "mkdir")]


def _cut_everywhere(operations: list[Operation], dice: random.Random, each: int, found: Found) -> None:
    model = Model(operations)
    for op in operations:
        model.do(op)
        if op.kind in ("begin", "remove"):
            continue
        for choice in cuts(dice, (1, len(CORNERS) + 4, len(CORNERS) + each)[model.num_ways()]):
            contents = model.after_cut(choice)
            broken = [*model.broken_promises(contents), *model.torn(contents)]
            state = digest_of(contents)
            found.states.add(state)
            if broken:
                found.broken[state] = f"after {op.kind} {op.path}: {broken[0]}"
            seen = visible(contents)
            look = digest_of(seen)
            if look not in found.looks or len(found.looks[look]) == len(seen) < len(contents):
                found.looks[look] = contents


def _resume(config: RunConfig, folder: Path, contents: Contents, expected: str, found: Found, look: str) -> None:
    root, log = folder / "disk", folder / "log"
    root.mkdir()
    try:
        materialise(contents, root)
        found.resumed += 1
        status = in_child(lambda: start_or_go_on(config, root / "run"), log=log)
        if status:
            found.failures.append(f"state {look[:12]}: {log.read_text().splitlines()[-1]}")
        elif fingerprint(root / "run") != expected:
            found.failures.append(f"state {look[:12]}: the resumed run gives other numbers")
    finally:
        shutil.rmtree(root)
