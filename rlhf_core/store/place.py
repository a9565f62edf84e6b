"""A run in a store and its copy on this machine, with what stands beside the copy.

~/.cache/rlhf-flow/…/run-7          the copy
~/.cache/rlhf-flow/…/.run-7.copy/   writer, copying: locks; known: which object a file is the same as
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.contracts.durable import make_folder
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.locking import holding
from rlhf_core.store import lease
from rlhf_core.store.address import Address, known_as, shown
from rlhf_core.store.copying import bring_in_line
from rlhf_core.store.known import Known
from rlhf_core.store.layout import RECORD, is_local
from rlhf_core.store.objects import Listing, Objects

FEW = 10
"""Objects that tell whether there is anything."""


@dataclass(frozen=True)
class Place:
    """A run in a store, and its copy here."""

    address: Address
    objects: Objects
    copy: Path

    @classmethod
    def of(cls, text: str) -> Place:
        """The place of an address. Raises UserError if it is none, or the store cannot be asked from here."""
        address = Address.of(text)
        objects = Objects(address)
        place = cls(address, objects, address.copy(objects.endpoint))
        known_as(place.copy, address)
        make_folder(place.state)
        return place

    @property
    def state(self) -> Path:
        """Folder of locks and of what is known of the copy."""
        return self.copy.with_name(f".{self.copy.name}.copy")

    @property
    def writer(self) -> Path:
        """Lock of the process that works on the run here."""
        return self.state / "writer"

    def known(self) -> Known:
        """What is known of the copy."""
        return Known(self.state / "known")

    def refuse_foreign(self, *, new: bool = False) -> None:
        """Raise UserError if there is something else than a run; or, unless it may be new, nothing."""
        if self.objects.list(RECORD, at_most=1).entries.keys() == {RECORD}:
            return
        there = self.objects.list(at_most=FEW).entries.keys() - {lease.NAME}
        if there and new:
            raise UserError(
                f"--run-dir {self.address} is neither empty nor a run: it holds {min(there)}; choose a new one"
            )
        if not new:
            raise UserError(f"{self.address} is not a run: it has no {RECORD}")

    def bring_in_line(
        self,
        *,
        under: str = "",
        wanted: Callable[[str], bool] = lambda _name: True,
        local: Callable[[str], bool] = is_local,
    ) -> Listing:
        """Make the copy one, or one folder of it, as :func:`rlhf_core.store.copying.bring_in_line` says."""
        return bring_in_line(self.objects, self.copy, self.known(), under=under, wanted=wanted, local=local)

    def copying(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of who brings the copy in line; waits for it."""
        return holding(self.state / "copying", str(self.address), waits=True)

    def digest(self) -> str:
        """Of the writer's lock, the same for all who hold it and for nobody else."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        found = self.writer.stat()
        where = [boot.read_text() if boot.is_file() else "", found.st_dev, found.st_ino, str(self.writer)]
        return hashlib.sha256(repr(where).encode()).hexdigest()


@contextlib.contextmanager
def in_addresses() -> Iterator[None]:
    """What goes wrong is told by the address, not by the copy."""
    try:
        yield
    except RlhfError as error:
        error.args = tuple(shown(each) if isinstance(each, str) else each for each in error.args)
        if isinstance(error, UserError):
            error.problems = [shown(problem) for problem in error.problems]
        raise
