"""What a verification says: one finding a file, each with what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["damaged", "missing", "surplus", "foreign", "leftover"]

HARMLESS: tuple[Kind, ...] = ("foreign", "leftover")
"""Nothing of a run reads these."""


def said(error: Exception, path: Path) -> str:
    """The first sentence of an error, without the path and the kind that stand beside it."""
    return str(error).split("\n")[0].removeprefix(f"{path} ").removeprefix("is damaged: ")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the run has written it."""

    path: str
    """Relative to the run folder."""
    kind: Kind
    problem: str
    """What is wrong."""
    remedy: str
    """What can be recovered, and how."""
    recoverable: bool = True
    stops_resume: bool = True
    """A resume is refused until it is repaired; otherwise it says so and goes on."""
    stages: tuple[tuple[int, str], ...] = field(default=(), repr=False)
    """For the repair: what is computed again, as (iteration, stage)."""
    checkpoint: int | None = field(default=None, repr=False)
    """For the repair: the checkpoint that is rebuilt."""
    moved_aside: bool = field(default=False, repr=False)
    """For the repair: the path itself goes to the quarantine."""

    @property
    def is_damage(self) -> bool:
        """Whether the run is not whole because of it."""
        return self.kind not in HARMLESS

    @property
    def is_repaired(self) -> bool:
        """Whether a repair does something about it; otherwise a resume does, or nobody."""
        return self.recoverable and bool(self.stages or self.checkpoint is not None or self.moved_aside)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without what only the repair needs."""
        hidden = {"stages", "checkpoint", "moved_aside"}
        return {name: value for name, value in asdict(self).items() if name not in hidden}


@dataclass(frozen=True)
class Verification:
    """Everything that was found in a run folder."""

    path: Path
    findings: Sequence[Finding]
    num_finished: int
    num_iterations: int
    num_files: int
    """Files that were read."""
    num_bytes: int
    num_checkpoints: int = 0
    newest_intact: int | None = None
    """The newest checkpoint without a finding; None: only the beginning."""

    @property
    def damage(self) -> list[Finding]:
        """The findings that make the run less than whole."""
        return [finding for finding in self.findings if finding.is_damage]

    @property
    def obstacles(self) -> list[Finding]:
        """The findings that a resume refuses to start on."""
        return [finding for finding in self.damage if finding.stops_resume]

    def summary(self) -> str:
        """The last line: how many files are damaged, and how many of them can be recovered."""
        damage = self.damage
        if not damage:
            return "whole"
        repaired = sum(finding.is_repaired for finding in damage)
        lost = sum(not finding.recoverable for finding in damage)
        resumed = len(damage) - repaired - lost
        parts = [f"{len(damage)} damaged"]
        if repaired:
            parts.append(f"{repaired} recoverable by  rlhf resume {self.path} --repair")
        if resumed:
            parts.append(f"{resumed} recoverable by  rlhf resume {self.path}")
        if lost:
            parts.append(f"{lost} only from a copy")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "run": str(self.path),
            "whole": not self.damage,
            "num_finished": self.num_finished,
            "num_iterations": self.num_iterations,
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "newest_intact_checkpoint": self.newest_intact,
            "damaged": len(self.damage),
            "recoverable": sum(finding.recoverable for finding in self.damage),
            "findings": [finding.to_json() for finding in self.findings],
        }
