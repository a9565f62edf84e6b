"""What a replay found: stage by stage, and whether all of it is what was stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_core.replay.comparison import TableDifference

Row = dict[str, Any]


@dataclass(frozen=True)
class StageReplay:
    """One stage, computed again from what is stored before it, or why it was not."""

    stage: str
    rows: int
    stored: str
    """sha256 of the artifact, as committed."""
    replayed: str | None = None
    """sha256 of the artifact, as computed again; None where there is none."""
    seconds: float = 0.0
    skipped: str | None = None
    """Why it cannot be computed here."""
    failed: str | None = None
    """What computing it has raised."""
    difference: TableDifference | None = None
    """Where the two tables differ; of one sample where one was asked for."""
    others: Sequence[str] = ()
    """What else differs, one line each: metrics, loop state, what the artifact says of itself."""
    weights: tuple[str, str] | None = None
    """Digest of the weights after the update: as committed, as computed again."""

    @property
    def is_identical(self) -> bool | None:
        """Whether it came back bit for bit; None if it was not computed."""
        if self.skipped is not None:
            return None
        if self.failed is not None or self.difference is not None:
            return False
        return not self.others

    def to_json(self) -> Row:
        """As plain JSON."""
        return {
            "stage": self.stage,
            "rows": self.rows,
            "stored": self.stored,
            "replayed": self.replayed,
            "identical": self.is_identical,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "failed": self.failed,
            "differences": [] if self.difference is None else self.difference.to_json(),
            "others": list(self.others),
            "weights": None if self.weights is None else dict(zip(("stored", "replayed"), self.weights, strict=True)),
        }


@dataclass(frozen=True)
class Weights:
    """The weights that an iteration starts from."""

    stored: str
    """Digest that the update before has committed; "initial" before the first."""
    replayed: str
    """Digest of those that were computed with here."""
    checkpoint: int | None
    """Where they come from; None: the models of the config."""
    updates: int
    """Computed again from there."""
    seconds: float


@dataclass(frozen=True)
class Replay:
    """One iteration, computed again."""

    run: str
    iteration: int
    stages: Sequence[StageReplay]
    num_threads: int
    """That it was computed with."""
    threads_of_run: int
    weights: Weights | None = None
    """None where no stage needed them, or they could not be had."""
    conditions: Sequence[str] = ()
    """Where something differs: what differs between the run's identity and this machine's, one line each."""
    sample: str | None = None
    """The only one that was compared."""
    tokens: Sequence[Row] = ()
    """Of that sample, one row a token: name -> {stored, replayed}."""

    @property
    def is_identical(self) -> bool:
        """Whether everything that was computed came back bit for bit."""
        return all(stage.is_identical is not False for stage in self.stages)

    def to_json(self) -> Row:
        """As plain JSON."""
        return {
            "run": self.run,
            "iteration": self.iteration,
            "identical": self.is_identical,
            "num_threads": self.num_threads,
            "threads_of_run": self.threads_of_run,
            "weights": None if self.weights is None else asdict(self.weights),
            "stages": [stage.to_json() for stage in self.stages],
            "conditions": list(self.conditions),
            "sample": self.sample,
            "tokens": list(self.tokens),
        }


def changed_entries(stored: Mapping[str, Any], replayed: Mapping[str, Any], what: str) -> list[str]:
    """One line for each entry of two plain mappings that differs: ``metric objective/kl: 0.1 -> 0.2``."""
    return [
        f"{what} {name}: {stored.get(name, 'absent')} -> {replayed.get(name, 'absent')}"
        for name in sorted(stored.keys() | replayed.keys())
        if stored.get(name) != replayed.get(name)
    ]
