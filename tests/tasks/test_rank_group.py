"""Ranks as the run's process sees them: answers, errors, deaths, silence, and that none outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import lives, until

from rlhf_core.contracts.errors import NumericalError, StorageError, UserError, WorkerError
from rlhf_core.contracts.update_config import UpdateConfig
from tasks.ranks import group as rank_group
from tasks.ranks.channel import Channel
from tasks.ranks.group import RankGroup

ROOT = Path(__file__).parents[2]
REQUEST = {"do": "update", "iteration": 3, "run": {}}
Answer = Callable[[Channel, dict[str, Any]], None]


class Actors(RankGroup):
    """A group whose ranks are threads that say what a test lets them say."""

    def __init__(self, *answers: Answer, deadline_s: float = 30.0) -> None:
        update = UpdateConfig(launcher="torchrun", nproc_per_node=len(answers), deadline_s=deadline_s)
        super().__init__(update, "cpu", 1)
        self.answers, self.starts = answers, 0

    def _start(self) -> None:
        self.starts += 1
        for rank, answer in enumerate(self.answers):
            mine, its = socket.socketpair()
            member = rank_group._Member(rank, len(self.answers), 4711 + rank, "elsewhere", Channel(mine))
            self._members.append(member)
            threading.Thread(target=self._act, args=(Channel(its), answer), daemon=True).start()

    @staticmethod
    def _act(channel: Channel, answer: Answer) -> None:
        with contextlib.suppress(EOFError, OSError), contextlib.closing(channel):
            while (request := channel.receive_one())["do"] != "end":
                answer(channel, request)


def says(**message: Any) -> Answer:
    return lambda channel, _: channel.send(message)


def dies(channel: Channel, _: dict[str, Any]) -> None:
    channel.close()


def is_silent(_channel: Channel, _request: dict[str, Any]) -> None:
    """As a process that was stopped."""


@pytest.fixture(autouse=True)
def one_loss_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "MAX_LOSSES", 1)
    monkeypatch.setattr(rank_group, "BLAME_S", 0.5)


def test_all_are_asked_and_the_first_one_answers() -> None:
    asked: list[dict[str, Any]] = []

    def first(channel: Channel, request: dict[str, Any]) -> None:
        asked.append(request)
        channel.send({"alive": True})
        channel.send({"done": {"a": 1}})

    def second(channel: Channel, request: dict[str, Any]) -> None:
        asked.append(request)
        channel.send({"done": {}})

    with contextlib.closing(Actors(first, second)) as group:
        assert group.call(REQUEST) == {"a": 1}
        assert group.call(REQUEST) == {"a": 1}
        assert group.starts == 1
    expected = REQUEST | {"device": "cpu", "num_threads": 1, "deadline_s": 30.0}
    assert asked.count(expected) == 4


@pytest.mark.parametrize(
    ("told", "error", "sentence"),
    [
        ({"failed": "NumericalError", "problems": ["not finite"]}, NumericalError, "^not finite$"),
        ({"failed": "UserError", "problems": ["one", "two"]}, UserError, "^one\ntwo$"),
        ({"failed": "OSError", "problems": ["no space left"]}, StorageError, "no space left"),
        (
            {"failed": "crash", "problems": ["RuntimeError: oh"]},
            WorkerError,
            r"rank 0 of 2.*failed in ppo_update.*Error: oh",
        ),
        ({"failed": "RlhfError.__init__", "problems": ["x"]}, WorkerError, "failed in ppo_update of iteration 3: x"),
    ],
)
def test_what_a_rank_raises_is_raised_here(told: dict[str, Any], error: type[Exception], sentence: str) -> None:
    group = Actors(says(**told), is_silent)
    with pytest.raises(error, match=sentence):
        group.call(REQUEST)
    assert group.process_ids() == [], "they may be anywhere: the next request starts others"


def test_the_one_that_died_is_named_though_its_neighbour_fails_first() -> None:
    def dies_later(channel: Channel, _: dict[str, Any]) -> None:
        time.sleep(0.2)
        channel.close()

    group = Actors(says(failed="crash", problems=["RuntimeError: Connection closed by peer"]), dies_later)
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 \(pid 4712 on elsewhere\) died in ppo_update of iteration 3"):
        group.call(REQUEST)


def test_the_one_that_is_silent_is_named() -> None:
    def is_alive(channel: Channel, _: dict[str, Any]) -> None:
        for _turn in range(20):
            channel.send({"alive": True})
            time.sleep(0.1)

    group = Actors(is_alive, is_silent, deadline_s=0.6)
    with pytest.raises(WorkerError, match=r"^rank 1 of 2 .* has not answered for 0.6 s in ppo_update of iteration 3"):
        group.call(REQUEST)


def test_lost_ranks_are_started_again_and_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_group, "MAX_LOSSES", 3)
    turns = iter([dies, dies, says(done={"a": 1})])

    def in_turn(channel: Channel, request: dict[str, Any]) -> None:
        next(turns)(channel, request)

    with contextlib.closing(Actors(in_turn)) as group:
        assert group.call(REQUEST) == {"a": 1}
        assert group.starts == 3
    assert "died in ppo_update of iteration 3; all ranks are started again, and do it again (2)" in caplog.text


def test_who_does_not_know_the_key_is_no_rank() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        for hello, is_welcome in ((b'{"key": "guessed", "rank": 0}\n', False), (b"GET / HTTP/1.1\n", False)):
            with socket.create_connection(server.getsockname()) as stranger:
                stranger.sendall(hello)
                assert (rank_group._newcomer(server, "secret") is not None) is is_welcome
                assert stranger.recv(1) == b"", "it is hung up on"


def test_a_hello_has_one_deadline_however_its_bytes_drip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "END_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        with socket.create_connection(server.getsockname()) as stranger:
            is_over = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        if is_over.wait(0.05):
                            return
                        stranger.sendall(b" ")

            threading.Thread(target=drip, daemon=True).start()
            began = time.monotonic()
            assert rank_group._newcomer(server, "secret") is None
            assert time.monotonic() - began < 2
            is_over.set()


def test_a_rank_is_heard_for_longer_than_its_hello_took() -> None:
    mine, its = socket.socketpair()
    channel, other = Channel(mine, 5.0), Channel(its)
    other.send({"rank": 0})
    assert channel.receive_one(within_s=0.5) == {"rank": 0}
    assert mine.gettimeout() == 5.0
    with pytest.raises(TimeoutError, match=r"no whole message within 0\.1 s|timed out"):
        channel.receive_one(within_s=0.1)
    channel.close()
    other.close()


def test_ranks_that_do_not_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "_agent_options", lambda _: ["--standalone", "-m", "no.such.module"])
    group = RankGroup(UpdateConfig(launcher="torchrun", nproc_per_node=2), "cpu", 1)
    with pytest.raises(
        WorkerError, match=r"rank 0 and rank 1 of 2 did not start: torchrun ended with code 1 \(.*Error"
    ):
        group.call(REQUEST)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_none_outlives_the_process_that_asks(number: int, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from rlhf_core.contracts.update_config import UpdateConfig\nfrom tasks.ranks.group import rank_group\n"
        "group = rank_group(UpdateConfig(launcher='torchrun', nproc_per_node=2), 'cpu', 1)\n"
        "group._start()\n"
        "told = Path(sys.argv[1])\n"
        "told.with_suffix('.tmp').write_text(' '.join(map(str, [group._agent.pid, *group.process_ids()])))\n"
        "told.with_suffix('.tmp').rename(told)\n"
        "time.sleep(100)\n"
    )
    (tmp_path / "main.py").write_text(script)
    told = tmp_path / "pids"
    main = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(told)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        until(told.exists, 120)
        pids = list(map(int, told.read_text().split()))
        assert len(pids) == 3
        main.send_signal(number)
        main.wait(30)
        until(lambda: not any(map(lives, pids)), 30)
    finally:
        main.kill()
