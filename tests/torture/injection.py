"""What must come of a planted fault, and whether it did: one real run in a child for each."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file
from torture.faults import ITERATION, Plan, plant, stop_before_the_iteration
from torture.runs import fingerprint, go_on, in_child, start

from rlhf_core.contracts.artifacts import artifact_path
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import RlhfError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import artifact_rows
from tasks.lifecycle.repair import repair_run

LONGEST_S = 90
"""Seconds after which a run hangs."""


@dataclass(frozen=True)
class Refused:
    """The run ends with this error, and its message holds these words (a pattern)."""

    error: str
    words: str
    by: str = ""
    """The stage that refuses it, where it is a later one; ``start``: before anything is written; ``open``: who opens
    the artifact."""


@dataclass(frozen=True)
class Handled:
    """The run goes on to its end with finite numbers."""

    how: str
    same: bool = False
    """It ends with the fingerprint of the undisturbed run."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the iteration's metrics say of it."""


@dataclass(frozen=True)
class Impossible:
    """The stage has nothing that the fault could hit."""

    because: str


Cell = tuple[Plan, Refused | Handled] | Impossible


class Injector:
    """Runs one planned fault after the other.

    Args:
        folder: empty, of this injector.
        configure: from overrides to the config of a run.
    """

    def __init__(self, folder: Path, configure: Callable[[tuple[str, ...]], RunConfig]) -> None:
        self.folder, self.configure = folder, configure
        self.begun, self.messages = folder / "begun", dict[str, str]()
        calm = folder / "calm"

        def begin() -> None:
            stop_before_the_iteration()
            start(configure(()), self.begun)

        self._must(in_child(begin, log=folder / "log"))
        shutil.copytree(self.begun, calm)
        self._must(in_child(lambda: go_on(calm), log=folder / "log"))
        self.undisturbed = fingerprint(calm)

    def try_out(self, name: str, stage: str, plan: Plan, expected: Refused | Handled) -> str:
        """What went otherwise than expected; empty if nothing."""
        place = self.folder / "cell"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        run_dir = place / "run"
        is_new = bool(plan.changes or plan.world)
        changes = plan.changes
        if plan.world is not None:
            knob, make = plan.world
            changes = (*changes, f"{knob}={make(place)}")
        if not is_new:
            shutil.copytree(self.begun, run_dir)

        def disturbed() -> None:
            plant(stage, plan)
            start(self.configure(changes), run_dir) if is_new else go_on(run_dir)

        ended, error, message = self._child(place, disturbed)
        if plan.on_resume is not None:
            if ended:
                return f"it should have died after {stage}, and did not: {error} {message}"
            plan.on_resume(run_dir)
            look = lambda: artifact_rows(RunFolder.open(run_dir), ITERATION, stage, 5)  # noqa: E731
            ended, error, message = self._child(place, look if plan.looks else lambda: go_on(run_dir))
        if error == "raw":
            return f"a raw end ({ended}): {message}"
        self.messages[f"{name} | {stage}"] = message and f"{error}: {message}"
        if isinstance(expected, Handled):
            return (message and f"it was refused: {message}") or self._handled(run_dir, expected)
        if not message:
            return "nobody refused it"
        if error != expected.error or not re.search(expected.words, message, re.DOTALL):
            return f"the words are others: {error}: {message}"
        return self._refused(place, run_dir, plan, expected.by or stage, goes_on=not is_new)

    def _handled(self, run_dir: Path, expected: Handled) -> str:
        run = RunFolder.open(run_dir)
        if run.num_finished() != run.config.num_iterations:
            return "the run is not finished"
        if found := not_finite_in(run):
            return f"silently kept: {found}"
        if expected.same and fingerprint(run_dir) != self.undisturbed:
            return "another fingerprint than the undisturbed run's"
        manifests = run.manifests(ITERATION).values()
        metrics = {name: value for manifest in manifests for name, value in manifest.metrics.items()}
        for name, value in expected.metrics.items():
            if not math.isclose(metrics[name], value, rel_tol=1e-6, abs_tol=1e-9):
                return f"{name} is {metrics[name]}, not {value}"
        return ""

    def _refused(self, place: Path, run_dir: Path, plan: Plan, by: str, *, goes_on: bool) -> str:
        """Nothing is committed of the refusing stage; and once what is broken is deleted, all goes on as it would."""
        if by == "start":
            return f"{run_dir} was begun" if run_dir.exists() else ""
        if by != "open" and not plan.on_resume and _is_committed(run_dir, by, newest=not goes_on):
            return f"{by} is committed"
        if plan.spoils.endswith("/"):
            shutil.rmtree(run_dir / plan.spoils)
        elif plan.spoils:
            for suffix in (".json",) if plan.spoils.endswith(".json") else (".arrow", ".json"):
                (run_dir / plan.spoils).with_suffix(suffix).unlink()
        planted = "" if plan.reads is None else Path(artifact_path(ITERATION, plan.reads[0])).name
        if not plan.looks and (found := not_finite_in(RunFolder.open(run_dir), planted)):
            return f"silently kept: {found}"
        if (not goes_on and not plan.on_resume) or plan.looks:
            return ""
        ended, error, message = self._child(place, lambda: (repair_run(str(run_dir)), go_on(run_dir)))
        if ended:
            return f"it does not go on without the fault: {error}: {message}"
        if found := not_finite_in(RunFolder.open(run_dir)):
            return f"silently kept: {found}"
        if goes_on and fingerprint(run_dir) != self.undisturbed:
            return "without the fault, it ends with another fingerprint than the undisturbed run"
        return ""

    def _child(self, place: Path, work: Callable[[], object]) -> tuple[int, str, str]:
        """(how it ended, error, message): 0 and nothing where it came back; ``raw``: a traceback or signal."""
        said = place / "said.json"
        said.unlink(missing_ok=True)

        def listened() -> None:
            signal.alarm(LONGEST_S)
            try:
                work()
            except RlhfError as error:
                said.write_text(json.dumps([type(error).__name__, str(error)]))
                raise

        log = place / "log"
        log.unlink(missing_ok=True)
        ended = in_child(listened, log=log)
        if not ended:
            return 0, "", ""
        if said.is_file():
            error, message = json.loads(said.read_text())
            return ended, error, message
        return ended, "raw", " / ".join(log.read_text().splitlines()[-6:]) if log.is_file() else "no word"

    def _must(self, ended: int) -> None:
        if ended:
            raise RuntimeError(f"the undisturbed run does not end:\n{(self.folder / 'log').read_text()}")


def not_finite_in(run: RunFolder, planted: str = "") -> str:
    """The first committed file of a run that holds NaN or infinity, read without the checks under test.

    Args:
        run: finished or refused.
        planted: name of an artifact of the faults' iteration that is known to be wrong.
    """
    for path in sorted(run.path.glob("iterations/*/*.json")):
        values: dict[str, Any] = json.loads(path.read_text())
        if found := _odd_number(values):
            return f"{found} in {path.name}"
        if path.with_suffix(".arrow").name == planted and int(path.parent.name) == ITERATION:
            continue
        table = pa.ipc.open_file(path.with_suffix(".arrow").read_bytes()).read_all()
        if "skipped" in table.column_names:
            table = table.filter(pa.array([not skipped for skipped in table["skipped"].to_pylist()]))
        if found := _odd_number(table.to_pydict()):
            return f"{found} in {path.name.replace('.json', '.arrow')}"
    for path in sorted(run.path.glob("checkpoints/[0-9]*/**/*.safetensors")):
        if any(not np.isfinite(tensor).all() for tensor in load_file(path).values()):
            return f"a number that is not finite in {path.name}"
    return ""


def _odd_number(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isfinite(value) else str(value)
    items: Any = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := _odd_number(item))), "")


def _is_committed(run_dir: Path, stage: str, *, newest: bool) -> bool:
    """In the iteration of the faults, or in the newest, where the fault is there from the beginning."""
    found = max((int(path.name) for path in run_dir.glob("iterations/*")), default=0) if newest else ITERATION
    return RunFolder.open(run_dir).manifest(stage, found) is not None
