"""What ``rlhf clean`` has removed from a run that stays: a record, so that nobody takes it for damage.

    RUN/cleaned.json    {"date": "2026-11-30", "checkpoints": [10, 20], "artifacts_from": 1,
                         "artifacts_before": 40}, sealed

The record is written before anything is removed: what it names may still be there after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.typed import typed

FILE: Final = "cleaned.json"


@dataclass(frozen=True)
class Cleaned:
    """Parts of a run that a person has removed."""

    date: str = ""
    """The day of the newest removal, as 2026-11-30."""
    checkpoints: Sequence[int] = field(default=())
    """Iterations whose checkpoints were removed, ascending."""
    artifacts_from: int = 0
    """The first iteration whose artifacts were removed. Manifests stay, with every metric and digest."""
    artifacts_before: int = 0
    """The first iteration after it whose artifacts are there; 0: none were removed."""

    @classmethod
    def of(cls, run_dir: Path) -> Cleaned:
        """The record of a run; an empty one where nothing was removed. Raises IntegrityError if it is damaged."""
        path = run_dir / FILE
        if not path.is_file():
            return cls()
        try:
            return typed(cls, read_record(path))
        except ValueError as error:
            raise IntegrityError(f"{path} is not the record of a cleaning: {error}; put it back from a copy") from None

    def write(self, run_dir: Path) -> None:
        """Put it on disk. The caller holds the lock of the run."""
        write_record(run_dir / FILE, asdict(self))

    def lacks(self, iteration: int) -> bool:
        """Whether the artifacts of an iteration were removed."""
        return self.artifacts_from <= iteration < self.artifacts_before
