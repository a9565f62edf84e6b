"""One writer at a time: whoever renews keeps the lease, whoever does not loses it and writes no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from s3_server import S3Server

from rlhf_core.contracts.errors import IntegrityError, RunLockedError, StorageError, UserError
from rlhf_core.store import lease
from rlhf_core.store.address import Address
from rlhf_core.store.objects import Objects


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.LEASE, "2")


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """Leases that are given back at the end of the test."""
    with ExitStack() as stack:
        yield stack


def take(url: str, place: str = "here", told: list[str] | None = None, *, began: bool = True):
    tell = (told if told is not None else []).append
    return lease.taken(Objects(Address.of(url), tries=1), place, tell, began=lambda: began)


def stop_renewing(held_lease: lease.Lease) -> None:
    """As if its process were killed."""
    held_lease._over.set()
    held_lease._thread.join()
    held_lease._over.clear()


def test_it_is_renewed_and_refuses_another_by_name(url: str, objects: Objects, held: ExitStack) -> None:
    mine = held.enter_context(take(url))
    before = objects.read(lease.NAME)
    told: list[str] = []
    with pytest.raises(RunLockedError, match=rf"process \d+ of .* is working on {url}; wait for it, or stop it"):
        held.enter_context(take(url, "another machine", told))
    assert len(told) == 1
    assert "watching for 2 s whether that process lives" in told[0]
    assert objects.read(lease.NAME) != before
    mine.check()


def test_given_back_it_is_free_at_once(url: str, objects: Objects) -> None:
    with take(url):
        pass
    assert lease.is_live(objects, 0.0) is False
    told: list[str] = []
    with take(url, "another machine", told):
        assert told == []
        assert lease.is_live(objects, 2.5)
        assert not lease.is_live(objects, 3.5)


def test_where_no_run_was_begun_nothing_stays(url: str, objects: Objects) -> None:
    with take(url, began=False):
        assert list(objects.list().entries) == [lease.NAME]
    assert objects.list().entries == {}


def test_the_lease_of_a_dead_process_is_taken_over_when_it_was_watched_long_enough(url: str, held: ExitStack) -> None:
    dead = held.enter_context(take(url))
    stop_renewing(dead)
    begun, told = time.monotonic(), list[str]()
    held.enter_context(take(url, "another machine", told))
    assert time.monotonic() - begun >= 2.0
    assert len(told) == 1
    with pytest.raises(RunLockedError, match=f"{url} was taken over by process "):
        dead.check()


def test_on_the_same_machine_the_lock_proves_the_death_and_nobody_waits(url: str, held: ExitStack) -> None:
    stop_renewing(held.enter_context(take(url)))
    told: list[str] = []
    held.enter_context(take(url, told=told))
    assert told == []


def test_who_cannot_renew_in_time_writes_no_more_until_he_can(
    url: str, held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = held.enter_context(take(url))

    def fail(*_: object) -> None:
        raise StorageError("no network")

    with monkeypatch.context() as cut:
        cut.setattr(Objects, "put_over", fail)
        time.sleep(1.6)
        with pytest.raises(StorageError, match=r"could not be renewed for 1\.33333 s, so that another process may"):
            mine.check()
    mine.check()


def test_a_process_that_slept_renews_before_it_writes(url: str, held: ExitStack) -> None:
    mine = held.enter_context(take(url))
    stop_renewing(mine)
    time.sleep(1.5)
    mine.check()


def test_an_answer_that_was_lost_is_no_loss(url: str, held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    new, over = Objects.put_new, Objects.put_over
    monkeypatch.setattr(Objects, "put_new", lambda *arguments: new(*arguments) and None)
    mine = held.enter_context(take(url))
    monkeypatch.setattr(Objects, "put_over", lambda *arguments: over(*arguments) and None)
    time.sleep(1.5)
    mine.check()


def test_of_many_that_begin_at_once_one_is_first(url: str, store: S3Server) -> None:
    start, over = threading.Barrier(6), threading.Event()
    outcomes: list[str] = []

    def race(number: int) -> None:
        start.wait()
        try:
            with take(url, f"machine {number}"):
                outcomes.append("won")
                over.wait(20)
        except RunLockedError:
            outcomes.append("refused")
        if len(outcomes) == 6:
            over.set()

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 5 + ["won"]


def test_what_is_no_lease_is_refused(url: str, objects: Objects) -> None:
    objects.put(lease.NAME, b"{}")
    with pytest.raises(IntegrityError, match=f"{url}/lease.json is no lease"), take(url):
        pass


@pytest.mark.parametrize("text", ["0", "x", "-5", "nan", "1e9"])
def test_a_time_that_is_none_is_refused(text: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.LEASE, text)
    with pytest.raises(UserError, match=f"RLHF_FLOW_LEASE_S is '{text}'; give seconds from 1 to 3600"), take(url):
        pass
