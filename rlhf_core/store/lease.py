"""A lease on a run in an object store: one writer at a time, across machines, without a clock that they share.

    RUN/lease.json    {"owner": …, "host": …, "pid": …, "place": …, "lease_s": 15, "renewals": 7, "released": false}

It is made only where there is none (If-None-Match), and replaced only by who has seen what it replaces (If-Match). The
holder renews it, so that its ETag changes; whoever has *watched* it unchanged for the whole time of the lease, on his
own clock, takes it over. The holder stops writing long before: when two thirds of that time have gone by since he
began to renew it last, on his. Clocks are only compared with themselves, and they count the time a machine sleeps.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rlhf_core.contracts.errors import IntegrityError, RunLockedError, StorageError, UserError
from rlhf_core.contracts.records import seal, unseal
from rlhf_core.contracts.typed import typed
from rlhf_core.store.objects import Objects

NAME: Final = "lease.json"
LEASE: Final = "RLHF_FLOW_LEASE_S"
"""Environment variable: how long a lease lasts that its holder does not renew; default: 15 seconds."""
USED: Final = 2 / 3
"""Of the time of a lease: how long its holder relies on it."""
RENEWALS: Final = 6
"""In the time of a lease."""
GRAIN_S: Final = 1.0
"""The times that a store tells are whole seconds."""


@dataclass(frozen=True)
class Holder:
    """What the lease says."""

    owner: str
    """A name that no other process ever has."""
    host: str
    pid: int
    place: str
    """Digest of the copy's lock: whoever holds that lock knows that its former holder is dead."""
    lease_s: float
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}"


class Lease:
    """The right to write below an address. Made by :func:`taken`."""

    def __init__(self, objects: Objects, holder: Holder, etag: str, begun: float) -> None:
        self._objects, self._holder, self._etag = objects, holder, etag
        self._until = begun + USED * holder.lease_s
        self._lost_to = ""
        """Whom, once it is."""
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise unless this process may write: before each request that changes something, and after it.

        Raises:
            RunLockedError: another process has taken over.
            StorageError: the lease could not be renewed in time, so that another may.
        """
        if self._over.is_set():
            raise RunLockedError(f"{self._objects.address} was given back by this process, which writes no more there")
        if now() >= self._until:
            self._renew()
        if self._lost_to:
            raise RunLockedError(
                f"{self._objects.address} was taken over by {self._lost_to}, since this process did not renew its "
                f"lease for {self._holder.lease_s:g} s; this one writes no more there"
            )
        if now() >= self._until:
            raise StorageError(
                f"{self._objects.url(NAME)} could not be renewed for {USED * self._holder.lease_s:g} s, so that "
                "another process may take the run over and nothing more is written; nothing is lost: look whether "
                "this machine reaches the store, then resume"
            )

    def release(self, *, forget: bool) -> None:
        """Give it back. ``forget``: remove it, since nothing was begun there."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(StorageError), self._lock:
            released = replace(self._holder, released=True)
            etag = self._objects.put_over(NAME, seal(asdict(released)), self._etag)
            if etag is not None and forget:
                self._objects.delete_this(NAME, etag)

    def _keep(self) -> None:
        while not self._over.wait(self._holder.lease_s / RENEWALS) and not self._lost_to:
            self._renew()

    def _renew(self) -> None:
        with self._lock, contextlib.suppress(StorageError):  # tried again; who relies on it sees when it is too late
            begun = now()
            self._holder = replace(self._holder, renewals=self._holder.renewals + 1)
            etag = self._objects.put_over(NAME, seal(asdict(self._holder)), self._etag)
            if etag is None:
                found = _read(self._objects)
                if found is None or found[0].owner != self._holder.owner:
                    self._lost_to = str(found[0]) if found else "whoever removed its lease"
                    return
                etag = found[1]  # ours: only the answer was lost
            self._etag, self._until = etag, begun + USED * self._holder.lease_s


@contextlib.contextmanager
def taken(objects: Objects, place: str, tell: Callable[[str], None], *, began: Callable[[], bool]) -> Iterator[Lease]:
    """Hold the lease.

    Args:
        objects: of the run; with few tries and short ones, so that a renewal fails before the lease ends.
        place: digest of the lock that the caller holds.
        tell: hears why it waits.
        began: whether there is a run at the end, whose lease stays there as released.
    Raises: RunLockedError if another process is at work there.
    """
    holder = Holder(secrets.token_hex(16), socket.gethostname(), os.getpid(), place, _lease_s())
    lease = Lease(objects, holder, *_take(objects, holder, tell))
    try:
        yield lease
    finally:
        lease.release(forget=not began())


def is_live(objects: Objects, age_s: float) -> bool:
    """Whether a process of whatever machine is at work there.

    Args:
        objects: of the run.
        age_s: since the lease was renewed, by the clock of the store.
    """
    found = _read(objects)
    return found is not None and not found[0].released and age_s < found[0].lease_s + GRAIN_S


def now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _take(objects: Objects, holder: Holder, tell: Callable[[str], None]) -> tuple[str, float]:
    """Its ETag, and when it was asked for."""
    mine, watched, since = seal(asdict(holder)), "", 0.0
    begun = now()
    if (made := objects.put_new(NAME, mine)) is not None:
        return made, begun
    while True:
        found = _read(objects)
        if found is None:  # released and removed in between
            begun = now()
            if (made := objects.put_new(NAME, mine)) is not None:
                return made, begun
            continue
        other, etag = found
        if other.owner == holder.owner:  # only the answer was lost
            return etag, begun
        if watched and etag != watched:
            raise RunLockedError(f"{other} is working on {objects.address}; wait for it, or stop it")
        is_over = bool(watched) and now() - since >= other.lease_s
        if other.released or other.place == holder.place or is_over:
            begun = now()
            if (made := objects.put_over(NAME, mine, etag)) is not None:
                return made, begun
        if not watched:
            watched, since = etag, now()
            tell(f"{objects.address} is held by {other}: watching for {other.lease_s:g} s whether that process lives")
        time.sleep(other.lease_s / RENEWALS / 2)


def _read(objects: Objects) -> tuple[Holder, str] | None:
    found = objects.read(NAME)
    if found is None:
        return None
    try:
        holder = typed(Holder, unseal(found[0], origin=objects.url(NAME)))
    except (ValueError, IntegrityError) as error:
        raise IntegrityError(f"{objects.url(NAME)} is no lease: {error}; remove it if nobody works there") from None
    return holder, found[1]


def _lease_s() -> float:
    text: Any = os.environ.get(LEASE, "15")
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= 3600:
            return float(text)
    raise UserError(f"{LEASE} is {text!r}; give seconds from 1 to 3600")
