"""The outbox: it never makes training wait, tries again, ends in a bounded time, and says what is missing."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.records import write_record
from tasks.tracking import outbox
from tasks.tracking.outbox import Ledger, Outbox, Patient, RefusalError, Sending, reason

PATIENCE_S = 20.0


class Tracker:
    """A tracker that does what a test says: takes, fails so often, or hangs."""

    def __init__(self, *, failures: int = 0, hang: bool = False) -> None:
        self.failures, self.go = failures, threading.Event()
        if not hang:
            self.go.set()
        self.took: list[int] = []
        self.ended: list[bool] = []
        self.connections = 0

    def connect(self, is_over: Callable[[], bool]) -> Any:
        self.connections += 1
        return Conversation(self, is_over)


class Conversation:
    run_id, experiment_id = "r", "1"

    def __init__(self, tracker: Tracker, is_over: Callable[[], bool]) -> None:
        self.tracker, self.is_over = tracker, is_over
        self.next = len(tracker.took)

    def _ask(self) -> None:
        self.tracker.go.wait()
        if self.tracker.failures:
            self.tracker.failures -= 1
            raise ConnectionError("no http://me:secret@host\nsecond line")

    def send_up_to(self, finished: int) -> None:
        for iteration in range(self.next, finished):
            self._ask()
            self.tracker.took.append(iteration)
            self.next = iteration + 1

    def finish(self, *, brief: bool) -> None:
        self._ask()
        self.tracker.ended.append(brief)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FIRST_PAUSE_S", 0.01), ("LONGEST_PAUSE_S", 0.05), ("CLOSE_TIMEOUT_S", 0.5), ("BRIEF_S", 0.1)):
        monkeypatch.setattr(outbox, name, value)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Callable[[Tracker], Outbox]:
    class Logger(logging.Logger):
        def warning(self, msg: object, *values: object, **_: Any) -> None:
            said.append(str(msg) % values)

    return lambda tracker: Outbox(tracker.connect, tmp_path, Logger("test"))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_was_not_sent_before_goes_first_and_everything_in_order(make: Any, said: list[str]) -> None:
    tracker = Tracker()
    box = make(tracker)
    box.start(2)
    until(lambda: tracker.took == [0, 1])
    box.put(3)
    box.put(4)
    box.close(brief=False)
    assert (tracker.took, tracker.ended, said) == ([0, 1, 2, 3], [False], [])


def test_a_failing_tracker_is_tried_again_without_a_new_iteration_and_told_once(make: Any, said: list[str]) -> None:
    tracker = Tracker(failures=4)
    box = make(tracker)
    box.start(3)
    until(lambda: tracker.took == [0, 1, 2])
    until(lambda: len(said) == 2)
    box.close(brief=False)
    assert said == [
        "MLflow did not take iteration 2 (it is tried again): no http://***@host",
        "MLflow takes metrics again; it has the iterations below 3",
    ]


def test_nothing_waits_for_a_tracker_that_hangs(make: Any, said: list[str], tmp_path: Path) -> None:
    tracker = Tracker(hang=True)
    box = make(tracker)
    began = time.monotonic()
    box.start(0)
    for iteration in range(1000):
        box.put(iteration + 1)
    assert time.monotonic() - began < 0.4
    box.close(brief=False)
    assert 0.5 <= time.monotonic() - began < 5
    assert said == [
        f"MLflow has not taken 1000 of 1000 iterations; nothing is lost: `rlhf resume {tmp_path}` sends the rest"
    ]
    tracker.go.set()


def test_a_signal_waits_only_briefly_for_a_tracker_that_hangs(make: Any, said: list[str]) -> None:
    tracker = Tracker(hang=True)
    box = make(tracker)
    box.start(1)
    began = time.monotonic()
    box.close(brief=True)
    assert time.monotonic() - began < 0.4
    assert len(said) == 1
    tracker.go.set()


def test_a_tracker_that_is_down_at_the_end_is_given_up_after_a_few_tries(make: Any, said: list[str]) -> None:
    tracker = Tracker(failures=10_000)
    box = make(tracker)
    box.start(2)
    until(lambda: tracker.connections >= 2)
    began = time.monotonic()
    box.close(brief=False)
    assert time.monotonic() - began < 0.4
    assert said[-1].startswith("MLflow has not taken 2 of 2 iterations")


def test_the_message_counts_what_the_ledger_knows_to_have_arrived(make: Any, said: list[str], tmp_path: Path) -> None:
    Ledger().change(tmp_path, sent=4)
    tracker = Tracker()
    tracker.connect = lambda is_over: 1 / 0
    box = make(tracker)
    box.start(5)
    box.close(brief=False)
    assert said[-1].startswith("MLflow has not taken 1 of 5 iterations")


def test_the_message_counts_what_arrives_while_it_waits(make: Any, said: list[str]) -> None:
    tracker = Tracker(hang=True)

    class OneByOne(Conversation):
        def _ask(self) -> None:
            if len(self.tracker.took) == 2:
                self.tracker.go.wait()

    tracker.connect = lambda is_over: OneByOne(tracker, is_over)
    box = make(tracker)
    box.start(3)
    box.close(brief=False)
    assert said[-1].startswith("MLflow has not taken 1 of 3 iterations")
    tracker.go.set()


class TestARefusal:
    @pytest.fixture
    def box(self, tmp_path: Path, said: list[str]) -> Callable[[Exception], Outbox]:
        class Logger(logging.Logger):
            def warning(self, msg: object, *values: object, **_: Any) -> None:
                said.append(str(msg) % values)

        def make(error: Exception) -> Outbox:
            def connect(_: Any) -> Any:
                raise error

            return Outbox(
                connect, tmp_path, Logger("test"),
                refusal=lambda error: str(error) if isinstance(error, RefusalError) else None,
            )  # fmt: skip

        return make

    def test_is_told_with_its_remedy_and_promises_nothing(self, box: Any, said: list[str]) -> None:
        refused = box(RefusalError("the run is deleted there: restore it"))
        refused.start(2)
        refused.close(brief=False)
        assert said == [
            "MLflow did not take iteration 1: the run is deleted there: restore it",
            "MLflow has not taken 2 of 2 iterations: the run is deleted there: restore it",
        ]

    def test_an_outage_is_none(self, box: Any, said: list[str]) -> None:
        down = box(ConnectionError("no"))
        down.start(2)
        down.close(brief=False)
        assert "nothing is lost" in said[-1]


class TestClaiming:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        (tmp_path / "home").mkdir()
        Ledger(is_described=False).claimed(tmp_path / "home", "http://t").change(tmp_path / "home", run_id="r", sent=3)
        return tmp_path / "home"

    def test_a_ledger_at_home_is_the_same(self, home: Path) -> None:
        assert Ledger.of(home).claimed(home, "http://t") == Ledger.of(home)

    def test_a_copy_in_the_same_tracker_begins_again(self, home: Path) -> None:
        other = Path(shutil.copytree(home, home.with_name("copy")))
        claimed = Ledger.of(other).claimed(other, "http://t")
        assert (claimed.run_id, claimed.sent, claimed.home) == (None, 0, str(other))
        assert claimed.outbox != Ledger.of(home).outbox

    def test_a_moved_one_goes_on(self, home: Path) -> None:
        moved = home.rename(home.with_name("moved"))
        claimed = Ledger.of(moved).claimed(moved, "http://t")
        assert (claimed.run_id, claimed.sent) == ("r", 3)
        assert claimed.was_moved(moved)
        assert not claimed.settled(moved, "http://t").was_moved(moved)

    def test_a_copy_with_a_tracker_of_its_own_looks_there_first(self, home: Path) -> None:
        other = Path(shutil.copytree(home, home.with_name("copy")))
        assert Ledger.of(other).claimed(other, "sqlite:///beside").run_id == "r"


def test_a_damaged_ledger_does_not_fail_the_end_of_a_run(make: Any, said: list[str], tmp_path: Path) -> None:
    (tmp_path / outbox.LEDGER).write_text("{")
    box = make(Tracker(failures=10_000))
    box.start(5)
    box.close(brief=False)
    assert said[-1].startswith("MLflow has not taken 5 of 5 iterations")


def test_a_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Ledger.of(tmp_path) == Ledger(is_described=False)
    named = Ledger.of(tmp_path).named(tmp_path)
    assert len(named.outbox) == 32
    assert Ledger.of(tmp_path) == named == named.named(tmp_path)
    changed = named.change(tmp_path, run_id="r", experiment_id="1", sending=Sending(3, 5, 99), sent=3)
    assert Ledger.of(tmp_path) == changed


def test_a_ledger_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / outbox.LEDGER, {"run_id": "r", "experiment_id": "1"})
    assert Ledger.of(tmp_path) == Ledger(run_id="r", experiment_id="1")


class TestPatient:
    class Client:
        def __init__(self) -> None:
            self.calls = 0

        def ask(self, value: int, *, failures: int) -> int:
            self.calls += 1
            if self.calls <= failures:
                raise ConnectionError
            return value

        create = ask

    def test_repeats_what_may_be_repeated(self) -> None:
        client = self.Client()
        assert Patient(client, {"create"}, lambda: False).ask(7, failures=2) == 7
        assert client.calls == 3

    def test_gives_up_after_three_tries(self) -> None:
        client = self.Client()
        with pytest.raises(ConnectionError):
            Patient(client, {"create"}, lambda: False).ask(7, failures=3)

    def test_never_repeats_what_would_be_done_twice(self) -> None:
        client = self.Client()
        with pytest.raises(ConnectionError):
            Patient(client, {"create"}, lambda: False).create(7, failures=1)
        assert client.calls == 1

    def test_takes_an_answer_for_an_answer(self) -> None:
        client = self.Client()
        with pytest.raises(ConnectionError):
            Patient(client, {"create"}, lambda: False, lambda error: True).ask(7, failures=2)
        assert client.calls == 1

    def test_asks_nothing_once_it_is_over(self) -> None:
        client = self.Client()
        with pytest.raises(InterruptedError):
            Patient(client, {"create"}, lambda: True).ask(7, failures=0)
        assert client.calls == 0


def test_a_reason_is_one_line_without_credentials() -> None:
    assert reason(ValueError("at https://me:pw@host/x?api_key=1234\nmore")) == "at https://***@host/x?api_key=***"
    assert reason(ValueError()) == "ValueError"
