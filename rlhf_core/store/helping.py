"""Other machines that compute shards of a run: the run's process and they meet below ``shards/`` in the store.

    the run's process                              a worker
    share(copy)         shards/ is in the store    joining(place)   run.json comes to its machine
    compute_at(copy)    what a worker is given     helping(place)   what a shard reads comes; its part goes to the store
    fetch_parts(copy)   parts come to the copy

A worker writes nothing but its part, and needs no lease for that: a part is named by its key, so that one which comes
too late is of no use and does no harm. On the machine of the run's process the copy is there already, and in line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_core.contracts.archive import FOLDER as ARCHIVE
from rlhf_core.contracts.archive import MANIFESTS
from rlhf_core.contracts.durable import using_disk
from rlhf_core.contracts.locking import is_held
from rlhf_core.contracts.shards import SHARDS, Shard, foreseen_path, handed_weights, part_path
from rlhf_core.store.address import is_url
from rlhf_core.store.layout import RECORD, is_local, is_record, is_shard
from rlhf_core.store.mirror import Mirror
from rlhf_core.store.place import Place, in_addresses

_open: dict[Path, Place] = {}
"""Copy -> place, of the runs that this process writes."""
_shared: set[Path] = set()
"""Copies of those whose shards are in the store."""


@contextlib.contextmanager
def open_to_helpers(there: Place) -> Iterator[Callable[[str], bool]]:
    """Around the writing of a run, which :func:`share` may then open. Yields: whether a name stays on this machine."""
    _open[there.copy] = there
    try:
        yield lambda name: is_local(name) and not (there.copy in _shared and is_shard(name))
    finally:
        del _open[there.copy]
        _shared.discard(there.copy)


def share(run_dir: Path) -> None:
    """From now on the shards of a run are in its store, from where those that a killed process has left come here.

    Args:
        run_dir: its folder. Where that is no copy that this process writes, nothing happens: all workers see it.
    Raises: StorageError if the store does not give them.
    """
    if (there := _open.get(run_dir)) is not None:
        there.bring_in_line(under=f"{SHARDS}/", local=_is_no_shard)
        _shared.add(run_dir)


def compute_at(run_dir: Path) -> str:
    """Where workers find a run: its address if its shards are shared, else its folder."""
    return str(_open[run_dir].address) if run_dir in _shared else str(run_dir.resolve())


def fetch_parts(run_dir: Path, iteration: int) -> None:
    """Bring what workers have made for an iteration into the folder of a run, where it is not there as it is.

    Raises: StorageError if the store does not give it.
    """
    if run_dir in _shared:
        _open[run_dir].bring_in_line(under=f"{SHARDS}/{iteration:06d}/", local=_is_no_shard)


def joining(place: str) -> Path:
    """The folder of a run, as a worker finds it; of an address, a copy on its machine, at first of ``run.json`` alone.

    Args:
        place: as :func:`compute_at` says.
    Raises:
        UserError: no run is there, or boto3 is not installed or configured here.
        StorageError: the store cannot be read.
    """
    if not is_url(place):
        return Path(place)
    there = Place.of(place)
    there.refuse_foreign()
    with in_addresses(), there.copying():
        if not is_held(there.writer):
            there.bring_in_line(under=RECORD)
    return there.copy


@contextlib.contextmanager
def helping(place: str, stage: str, iteration: int, shard: Shard) -> Iterator[Path]:
    """The folder of a run, in which a worker computes a shard and commits its part.

    Args:
        place: as :func:`compute_at` says.
        stage: that is computed.
        iteration: from 0.
        shard: of the stage.
    Raises: StorageError if the store cannot be read or written.
    """
    if not is_url(place):
        yield Path(place)
        return
    there = Place.of(place)
    with in_addresses():
        with there.copying():
            if not is_held(there.writer):
                _bring(there, stage, iteration, shard)
        to_store = Mirror(there.copy, there.objects, there.known(), check=lambda: None, local=_is_no_shard, etags=None)
        with using_disk(to_store):
            yield there.copy


def _bring(there: Place, stage: str, iteration: int, shard: Shard) -> None:
    """Bring what a shard reads: the artifacts of its iteration, and for answers weights and what commits them."""
    part = part_path(Path(), stage, iteration, shard)
    needed = {part, part.with_suffix(".json")}
    there.bring_in_line(under=RECORD)
    there.bring_in_line(under=_folder(iteration))
    if stage == "generate":
        needed |= {handed_weights(Path(), iteration), foreseen_path(Path(), iteration)}
        for before in range(max(0, iteration - 2), iteration):  # where stages overlap, the policy is one update older
            there.bring_in_line(under=_folder(before), wanted=is_record)
            if not any((there.copy / _folder(before)).glob("*.json")):
                there.bring_in_line(under=f"{ARCHIVE}/", wanted=lambda name: is_record(name) or _is_manifests(name))
    there.bring_in_line(
        under=f"{SHARDS}/",
        wanted=lambda name: any(Path(name).is_relative_to(path) for path in needed),
        local=_is_no_shard,
    )


def _folder(iteration: int) -> str:
    return f"iterations/{iteration:06d}/"


def _is_manifests(name: str) -> bool:
    return name.endswith(f"/{MANIFESTS}")


def _is_no_shard(name: str) -> bool:
    return not is_shard(name)
