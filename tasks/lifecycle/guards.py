"""The guards of a run: what they have said, what a person has decided, and how both are kept.

    RUN/guards.json    {"tripped": {"12": ["kl_ceiling"]}, "accepted": {"kl_ceiling": 12}, "stopped": "..."}

The verdicts follow from the metrics on disk (:mod:`rlhf_core.guards`); only what was accepted is new in that file.
It appears when a guard trips for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.typed import typed
from rlhf_core.guards import Finding, Metrics, findings, last_good
from tasks.session.session import open_session

FILE = "guards.json"


@dataclass(frozen=True)
class GuardRecord:
    """The content of ``RUN/guards.json``."""

    tripped: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """Iteration, in decimal -> guards that were beyond their thresholds for long enough."""
    accepted: Mapping[str, int] = field(default_factory=dict[str, int])
    """Guard -> the newest iteration in which a person has accepted that."""
    stopped: str | None = None
    """Why the run was stopped; None while it goes on."""

    @classmethod
    def of(cls, run: RunFolder) -> GuardRecord:
        """The record of a run. Raises IntegrityError if it is damaged."""
        path = run.path / FILE
        if not path.is_file():
            return cls()
        try:
            return typed(cls, read_record(path))
        except ValueError:
            raise IntegrityError(f"{path} is not the record of a run's guards") from None

    def write(self, run: RunFolder) -> None:
        """Put it on disk, unless it stands there."""
        if self != GuardRecord.of(run):
            write_record(run.path / FILE, asdict(self))


class Guards:
    """Watches one run. Looks at its newest finished iteration at once, since a killed process may not have.

    Args:
        run: the run folder, locked by this process.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._history: list[Metrics] = []
        self._found: list[Finding] = []
        self.check(run.num_finished() - 1)

    def check(self, iteration: int) -> list[Finding]:
        """What the guards say of a finished iteration, also recorded; nothing before the first."""
        while len(self._history) <= iteration:
            self._history.append(_metrics(self.run, len(self._history)))
        if iteration < 0:
            return []
        record = GuardRecord.of(self.run)
        self._found = findings(self._history[: iteration + 1], self.run.config, record.accepted)
        tripped = {i: names for i, names in record.tripped.items() if int(i) < iteration}
        if self._found:
            tripped[str(iteration)] = [finding.guard for finding in self._found]
        stopped = record.stopped if any(finding.acts for finding in self._found) else None
        replace(record, tripped=tripped, stopped=stopped).write(self.run)
        return self._found

    def last_good(self) -> int | None:
        """The newest iteration whose state satisfies every guard that may stop the run."""
        return last_good(self._history, self.run.config, GuardRecord.of(self.run).accepted)

    def accept(self) -> list[str]:
        """Take what is stopping the run for accepted, until its number is back within the threshold.

        Returns: the guards that were accepted.
        """
        record = GuardRecord.of(self.run)
        acting = {finding.guard: finding.iteration for finding in self._found if finding.acts}
        replace(record, accepted={**record.accepted, **acting}, stopped=None).write(self.run)
        return list(acting)

    def stop(self, reason: str) -> None:
        """Record why the run ends here."""
        replace(GuardRecord.of(self.run), stopped=reason).write(self.run)


def guard_metrics(run: RunFolder, iteration: int) -> dict[str, float]:
    """1 for each guard that had tripped in an iteration, 0 for each other one that is on."""
    tripped = GuardRecord.of(run).tripped.get(str(iteration), ())
    return {f"guard/{name}": float(name in tripped) for name in run.config.guards.active}


def accept_tripped(run_dir: str) -> list[str]:
    """Accept what stopped a run. Returns: the guards. Raises UserError if nothing did."""
    run = RunFolder.open(Path(run_dir))
    with run.locked():
        accepted = Guards(run).accept()
    if not accepted:
        raise UserError(f"--accept-guards: no guard is stopping {run_dir}; leave it out")
    return accepted


def change_guards(run_dir: str, overrides: Sequence[str]) -> None:
    """Change guards of a run, as ``guards.kl_ceiling.threshold=20``: they decide no number of it.

    Raises: UserError if an override is wrong, or of any other section.
    """
    foreign = [override for override in overrides if not override.strip().startswith("guards.")]
    if foreign:
        raise UserError(
            *(
                f"--set {o.partition('=')[0]} cannot be changed on resume: only guards.* and execution.update.* can"
                for o in foreign
            )
        )
    run = RunFolder.open(Path(run_dir))
    with run.locked():
        run.with_guards(build_config(run.config.model_dump(), overrides).guards)
    open_session.cache_clear()


def _metrics(run: RunFolder, iteration: int) -> Metrics:
    return {name: value for manifest in run.manifests(iteration).values() for name, value in manifest.metrics.items()}
