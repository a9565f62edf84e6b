"""The outbox of a run: what the tracker has not got yet, sent from a thread of its own. Knows no tracker.

It holds no metrics. They are on disk; a number says how far the run has come, and whatever is beyond what has
arrived is read again when it is sent: an outage of any length costs no memory. Training never waits for it.

    RUN/mlflow.json    the ledger: which run of the tracker this is, and what is being sent just now

Exactly once, although an answer may be lost or come too late: *before* a batch is sent, the ledger says durably
which iterations are in it and which time stamp they carry. A batch whose fate is unknown is compared with what the
tracker has, metric by metric, and the rest is sent again with the same time stamp: should the first one be
committed after all, the tracker takes both for one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rlhf_core.contracts.errors import RlhfError
from rlhf_core.contracts.locking import holding
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.secrets import without_secrets
from rlhf_core.store.address import shown

LEDGER = "mlflow.json"
CLOSE_TIMEOUT_S = 60.0
"""How long the end of a run waits for the tracker while it takes what is left."""
BRIEF_S = 1.0
"""How long a run waits that a signal or an error has ended."""
LAST_TRIES = 3
"""Tries in a row that may fail at the end of a run, before it is left to the next resume."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Between deliveries while the tracker fails; doubled each time."""
PAUSES_S = (0.05, 0.2)
"""Between the tries of one call."""


class RefusalError(Exception):
    """What a tracker does not take until a person has done something: the message says what, in a sentence."""


class GoneError(RefusalError):
    """The tracker has no such run or experiment."""


@dataclass(frozen=True)
class Sending:
    """A batch under way: iterations ``first`` to ``after`` - 1, with the time stamp of their metrics."""

    first: int
    after: int
    timestamp_ms: int


@dataclass(frozen=True)
class Ledger:
    """What is known on disk about a run in the tracker. ``sent`` iterations have surely arrived."""

    outbox: str = ""
    """A name of our own for it, by which it is found if the answer to its creation was lost."""
    run_id: str | None = None
    experiment_id: str | None = None
    is_described: bool = True
    """Whether its params and files have arrived."""
    sent: int = 0
    sending: Sending | None = None
    traced: int = 0
    """Iterations below have their traces there."""
    home: str = ""
    """The folder that it describes: a copied ledger is known by another one."""
    tracker: str = ""
    """Where ``run_id`` is, without credentials: compared and shown, never contacted."""

    @classmethod
    def of(cls, run_dir: Path) -> Ledger:
        """The ledger of a run; of a new one, where there is none."""
        path = run_dir / LEDGER
        if not path.is_file():
            return cls(is_described=False)
        values: dict[str, Any] = read_record(path)
        if values.get("sending"):
            values["sending"] = Sending(**values["sending"])
        return cls(**values)

    def change(self, run_dir: Path, **changes: Any) -> Ledger:
        """The ledger with changes, written durably."""
        changed = replace(self, **changes)
        write_record(run_dir / LEDGER, asdict(changed))
        return changed

    def named(self, run_dir: Path) -> Ledger:
        """The ledger with a name for the tracker's run."""
        return self if self.outbox else self.change(run_dir, outbox=uuid.uuid4().hex)

    def claimed(self, run_dir: Path, tracker: str) -> Ledger:
        """The ledger of this folder and tracker: one that was copied gets a run of the tracker of its own.

        Args:
            run_dir: where it was read.
            tracker: as it may be shown.
        """
        here = shown(run_dir.resolve())
        if self.was_moved(run_dir) and self.tracker == tracker and self._is_still_at_home():
            return Ledger(is_described=False, home=here, tracker=tracker).named(run_dir)
        if self.run_id is None and (self.home, self.tracker) != (here, tracker):
            return self.change(run_dir, home=here, tracker=tracker).named(run_dir)
        return self.named(run_dir)

    def was_moved(self, run_dir: Path) -> bool:
        """Whether it was written in another folder than the one it is in."""
        return bool(self.home) and self.home != shown(run_dir.resolve())

    def settled(self, run_dir: Path, tracker: str) -> Ledger:
        """The ledger once ``run_id`` was found in a tracker."""
        here = shown(run_dir.resolve())
        same = (self.home, self.tracker) == (here, tracker)
        return self if same else self.change(run_dir, home=here, tracker=tracker)

    def _is_still_at_home(self) -> bool:
        with contextlib.suppress(RlhfError, OSError, TypeError):
            return Ledger.of(Path(self.home)).outbox == self.outbox
        return False


class Patient:
    """A client whose calls are tried again at once, where doing a thing twice is doing it once.

    Args:
        client: of a tracker.
        once: its calls that would do it twice; the next delivery looks whether they have, before it repeats them.
        is_over: whether nothing more may be sent.
        is_final: whether an error is an answer, which another try gets again.
    """

    def __init__(
        self,
        client: Any,
        once: Collection[str],
        is_over: Callable[[], bool],
        is_final: Callable[[Exception], bool] = lambda _: False,
    ) -> None:
        self._client, self._once, self._is_over, self._is_final = client, once, is_over, is_final

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)

        def patiently(*arguments: Any, **named: Any) -> Any:
            for pause_s in (*PAUSES_S, None):
                if self._is_over():
                    raise InterruptedError("the run has ended")
                try:
                    return call(*arguments, **named)
                except Exception as error:
                    if pause_s is None or name in self._once or self._is_final(error):
                        raise
                    time.sleep(pause_s)
            raise AssertionError("the last turn returns or raises")

        return patiently


class Delivery(Protocol):
    """An open conversation with a tracker. Every method may raise whatever the tracker raises."""

    run_id: str
    experiment_id: str
    next: int
    """Iterations below have arrived."""

    def send_up_to(self, finished: int) -> None:
        """Send the iterations below ``finished`` that have not arrived, and what belongs to them."""
        ...

    def finish(self, *, brief: bool) -> None:
        """Say that the run has ended; unless ``brief``, also send what is made at its end."""
        ...


class Outbox:
    """Sends what is new from a daemon thread, and tries again while the tracker fails.

    Args:
        connect: opens the conversation; given a function that says whether nothing more may be sent.
        run_dir: the run folder, for the ledger and for messages.
        logger: where an outage is reported, once.
        item: what is counted, in those messages.
        remedy: what sends the rest, in those messages; default: resuming the run.
        refusal: what a person has to do about an error before anything is sent; None for an outage.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[], bool]], Delivery],
        run_dir: Path,
        logger: logging.Logger,
        *,
        item: str = "iteration",
        remedy: str | None = None,
        refusal: Callable[[Exception], str | None] = lambda _: None,
    ) -> None:
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._connect, self._run_dir, self._logger = connect, run_dir, logger
        self._item, self._remedy = item, remedy or f"`rlhf resume {shown(run_dir)}`"
        self._changed = threading.Condition()
        self._finished, self._is_closing, self._is_brief = 0, False, False
        self._given_up = threading.Event()
        self._delivery: Delivery | None = None
        self._delivered = False
        self._refusal, self._refused = refusal, ""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def page(self, uri: str) -> str | None:
        """Address of the run in the pages of the tracker at ``uri``, where that is a server and has answered."""
        if not uri.startswith("http") or self.run_id is None:
            return None
        return f"{uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def start(self, finished: int) -> None:
        """Begin sending: first the iterations below ``finished`` that have not arrived."""
        self._finished = finished
        self._thread.start()

    def put(self, finished: int) -> None:
        """The iterations below ``finished`` are committed. Returns at once."""
        with self._changed:
            self._finished = finished
            self._changed.notify()

    def close(self, *, brief: bool) -> None:
        """Wait a bounded time for what is left; say what has not arrived and how to send it."""
        with self._changed:
            self._is_closing, self._is_brief = True, brief
            self._changed.notify()
        self._thread.join(BRIEF_S if brief else CLOSE_TIMEOUT_S)
        self._given_up.set()
        if not self._delivered:
            missing = max(self._finished - self._num_arrived(), 0)
            what = f"{missing} of {self._finished} {self._item}s" if missing else "the end of the run"
            if self._refused:
                self._logger.warning("MLflow has not taken %s: %s", what, self._refused)
                return
            self._logger.warning("MLflow has not taken %s; nothing is lost: %s sends the rest", what, self._remedy)

    def _num_arrived(self) -> int:
        """Iterations that have surely arrived, also by now: a delivery may be under way."""
        if self._delivery is not None:
            return self._delivery.next
        with contextlib.suppress(RlhfError, OSError):  # the end of a run does not fail on a damaged ledger
            return Ledger.of(self._run_dir).sent
        return 0

    def _work(self) -> None:
        delivery: Delivery | None = None
        seen, failures, last_tries, arrived = -1, 0, 0, -1
        while not self._given_up.is_set():
            finished, is_closing = self._next_job(seen, failures)
            try:
                if delivery is None:
                    self._delivery = delivery = self._connect(self._given_up.is_set)
                    self.run_id, self.experiment_id = delivery.run_id, delivery.experiment_id
                delivery.send_up_to(finished)
                arrived = delivery.next
                if is_closing:
                    delivery.finish(brief=self._is_brief)
                    self._delivered = True
                    return
                if failures:
                    self._logger.warning("MLflow takes metrics again; it has the %ss below %d", self._item, finished)
                seen, failures, self._refused = finished, 0, ""
            except Exception as error:  # a tracker's failure must never reach training
                if self._given_up.is_set():
                    return
                self._tell(error, finished, is_first=not failures)
                failures += 1
                if delivery is not None and delivery.next != arrived:  # some have: it is worth going on
                    arrived, last_tries = delivery.next, 0
                last_tries += is_closing
                if is_closing and (self._is_brief or last_tries == LAST_TRIES):
                    return
                delivery = None

    def _tell(self, error: Exception, finished: int, *, is_first: bool) -> None:
        """Report the first failure of an outage, and what a person has to do once that is known."""
        before, self._refused = self._refused, self._refusal(error) or ""
        what = f"{self._item} {finished - 1}" if finished else "the run"
        if self._refused and self._refused != before:
            self._logger.warning("MLflow did not take %s: %s", what, self._refused)
        elif is_first:
            self._logger.warning("MLflow did not take %s (it is tried again): %s", what, reason(error))

    def _next_job(self, seen: int, failures: int) -> tuple[int, bool]:
        """Wait until there is something to send; after a failure, until it is time to try again.

        Returns: how far the run has come, and whether it ends.
        """
        with self._changed:
            if self._is_closing and failures:
                self._changed.wait(min(FIRST_PAUSE_S * failures, 1.0))
            elif failures:
                pause = min(FIRST_PAUSE_S * 2 ** min(failures - 1, 10), LONGEST_PAUSE_S)
                self._changed.wait_for(lambda: self._is_closing, pause)
            else:
                self._changed.wait_for(lambda: self._is_closing or self._finished != seen)
            return self._finished, self._is_closing


def reason(error: Exception) -> str:
    """What a tracker's error says, on one line and without credentials."""
    text = str(error).strip() or type(error).__name__
    return without_secrets(text.split("\n")[0])


@contextlib.contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """One process at a time creates and migrates a fresh sqlite store: two of them crash each other."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with holding(database.parent / f".{database.name}.lock", str(database), waits=True):
        yield
