"""The ranks that make a run's updates: processes that torchrun starts once, and that are asked from here.

A rank is a process like this one: it finds checkpoint, artifacts and models by the run folder, keeps its part of the
trainer from update to update, and computes again what was committed since the last checkpoint. So a rank that dies, or
does not answer, costs time alone: all are ended, started again and asked again. They end when this process does.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.contracts import errors
from rlhf_core.contracts.bound_processes import start_bound
from rlhf_core.contracts.errors import RlhfError, StorageError, UserError, WorkerError
from rlhf_core.contracts.search_path import child_environment
from rlhf_core.contracts.trust import check_door, meeting
from rlhf_core.contracts.update_config import UpdateConfig
from tasks.ranks.channel import ADDRESS, ALIVE_S, KEY, Channel

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""How often the ranks may be lost over one request: more often than that, it is the request."""
START_S = 120.0
"""For torchrun and its ranks to import their libraries, where the deadline is shorter."""
LOOK_S = 0.2
BLAME_S = 2.0
"""A rank whose neighbour has died fails as well, and may be heard first: for so long the dead one is looked for."""
END_S = 5.0
"""For processes to end by themselves."""
MEET_S = 20.0
"""For agents of several nodes to end, who wait for each other: one that is left alone does so for five minutes."""
NAMES = {"update": "ppo_update", "hand_out": "the weights before generate", "save": "the checkpoint"}
"""What is asked of ranks, in words."""


class _LostError(Exception):
    """Ranks are gone; the message says which."""


@dataclass
class _Member:
    """A rank, as this process knows it."""

    rank: int
    of: int
    pid: int
    host: str
    channel: Channel
    heard: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.of} (pid {self.pid} on {self.host})"


class RankGroup:
    """Ranks of one layout, started when they are first asked.

    Args:
        update: how many, and how long they may be silent.
        device: type of device that they compute on.
        num_threads: CPU threads of each.
    """

    def __init__(self, update: UpdateConfig, device: str, num_threads: int) -> None:
        self.update, self.device, self.num_threads = update, device, num_threads
        self._members: list[_Member] = []
        self._agent: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Let all ranks do something at the same time.

        Args:
            request: plain JSON: what to do, with which iteration of which run.
        Returns: what the first rank answers.
        Raises: what the ranks raise; WorkerError if they are lost again and again.
        """
        what = f"{NAMES[request['do']]} of iteration {request['iteration']}"
        lost = ""
        with self._lock:
            for losses in range(1, MAX_LOSSES + 1):
                try:
                    if not self._members:
                        self._start()
                    return self._ask(request, what)
                except _LostError as error:
                    self.end()
                    lost = str(error)
                    logger.warning("%s; all ranks are started again, and do it again (%d)", lost, losses)
                except BaseException:
                    self.end()  # they may be anywhere
                    raise
        raise WorkerError(
            f"{lost}: the ranks were lost {MAX_LOSSES} times in a row; where memory ran out, use more ranks or a "
            "smaller ppo.micro_batch_size, where one is slow, a longer execution.update.deadline_s"
        )

    def process_ids(self) -> list[int]:
        """Of the ranks, in their order; none before they are first asked."""
        return [member.pid for member in self._members]

    def close(self) -> None:
        """Let all processes end, which are doing nothing."""
        for member in self._members:
            with contextlib.suppress(OSError):
                member.channel.send({"do": "end"})
        if self._agent is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(END_S if self.update.nnodes == 1 else MEET_S)
        self.end()

    def end(self) -> None:
        """End all processes now; what they were doing is lost."""
        members, self._members = self._members, []
        agent, self._agent = self._agent, None
        for member in members:
            member.channel.close()
            if member.host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
        if agent is not None:  # without it, ranks that have not come as far as saying hello end, too
            agent.terminate()
            try:
                agent.wait(END_S / 2)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()

    def _start(self) -> None:
        update, key = self.update, secrets.token_hex(16)
        if update.nnodes > 1:
            check_door(meeting(update))
        host = "127.0.0.1" if update.nnodes == 1 else (update.endpoint or "").rpartition(":")[0]
        with socket.create_server((host, 0), backlog=update.num_ranks) as server, tempfile.TemporaryFile() as log:
            address = f"{host}:{server.getsockname()[1]}"
            own = {ADDRESS: address, KEY: key, "OMP_NUM_THREADS": str(self.num_threads)}
            self._agent = start_bound(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "torch.distributed.run",
                    *_agent_options(update),
                    "-m",
                    "tasks.ranks.process",
                ],
                env=child_environment() | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # signals of the terminal are for this process
            )
            self._members = self._welcome(server, key, log)

    def _welcome(self, server: socket.socket, key: str, log: Any) -> list[_Member]:
        """Wait until every rank has said who it is."""
        there: dict[int, _Member] = {}
        of, limit = self.update.num_ranks, max(START_S, self.update.deadline_s)
        deadline = time.monotonic() + limit
        server.settimeout(LOOK_S)
        while len(there) < of:
            if (member := _newcomer(server, key)) is not None:
                there[member.rank] = member
                if member.of != of:
                    raise WorkerError(
                        f"{member} came, but execution.update asks for {of}: start torchrun on every node with the "
                        f"same --nproc-per-node {self.update.nproc_per_node} --nnodes {self.update.nnodes}"
                    )
            missing = " and ".join(f"rank {rank}" for rank in range(of) if rank not in there)
            assert self._agent is not None, "it was started before"
            if (code := self._agent.poll()) is not None:
                raise _LostError(f"{missing} of {of} did not start: torchrun ended with code {code}{_last_words(log)}")
            if time.monotonic() > deadline:
                self._members = list(there.values())
                raise _LostError(f"{missing} of {of} did not start within {limit:.0f} s{_last_words(log)}")
        now = time.monotonic()
        for member in there.values():
            member.heard = now
        return [there[rank] for rank in range(of)]

    def _ask(self, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        settings = {"device": self.device, "num_threads": self.num_threads, "deadline_s": self.update.deadline_s}
        now = time.monotonic()
        for member in self._members:
            member.heard = now  # while nobody asked, nobody listened
            with contextlib.suppress(OSError):  # it has died, as will be seen below
                member.channel.send({**request, **settings})
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._members):
            for member, message in self._heard(what):
                if "done" in message:
                    answers[member.rank] = message["done"]
                elif "failed" in message:
                    self._fail(member, message, what)
        return answers[0]

    def _heard(self, what: str) -> Iterator[tuple[_Member, dict[str, Any]]]:
        """What has come from the ranks. Raises _LostError naming one that has died, or is silent for too long."""
        ready, _, _ = select.select([member.channel for member in self._members], [], [], LOOK_S)
        dead: list[_Member] = []
        for member in self._members:
            if member.channel in ready:
                member.heard = time.monotonic()
                try:
                    yield from ((member, message) for message in member.channel.receive())
                except EOFError:
                    dead.append(member)
        if dead:
            raise _LostError(f"{' and '.join(map(str, dead))} died in {what}")
        for member in self._members:
            if time.monotonic() - member.heard > self.update.deadline_s:
                raise _LostError(f"{member} has not answered for {self.update.deadline_s:g} s in {what}")

    def _fail(self, member: _Member, message: Mapping[str, Any], what: str) -> None:
        """Raise what a rank has raised; where that is no sentence of ours, it may be that another one has died."""
        kind, problems = str(message["failed"]), [str(problem) for problem in message["problems"]]
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, RlhfError):
            raise known(*problems) if known is UserError else known(problems[0])
        if kind == "OSError":
            raise StorageError(problems[0])
        until = time.monotonic() + BLAME_S
        while time.monotonic() < until:
            for _ in self._heard(what):
                pass
        silent = [m for m in self._members if time.monotonic() - m.heard > BLAME_S + ALIVE_S]
        named = f"{' and '.join(map(str, silent))} did not answer, and " if silent else ""
        raise _LostError(f"{named}{member} failed in {what}: {problems[0]}")


_current: RankGroup | None = None
_owner = 0


def rank_group(update: UpdateConfig, device: str, num_threads: int) -> RankGroup:
    """The ranks of this process, of a layout; those of another one are ended. None is started before it is asked."""
    global _current, _owner
    asked = (update, device, num_threads)
    is_mine = _owner == os.getpid()  # a fork has its parent's variables, and not its processes
    if _current is None or not is_mine or (_current.update, _current.device, _current.num_threads) != asked:
        if is_mine:
            end_ranks()
        _current, _owner = RankGroup(*asked), os.getpid()
    return _current


def end_ranks() -> None:
    """End the ranks of this process, if it has any."""
    global _current  # noqa: PLW0603 - one run a process
    if _current is not None and _owner == os.getpid():
        _current.close()
    _current = None


@contextlib.contextmanager
def ranks_end() -> Iterator[None]:
    """End the ranks behind it."""
    try:
        yield
    finally:
        end_ranks()


atexit.register(end_ranks)


def _agent_options(update: UpdateConfig) -> Sequence[str]:
    """Of torchrun: where ranks meet; that it starts none again, since we do."""
    each = ["--nnodes", str(update.nnodes), "--nproc-per-node", str(update.nproc_per_node), "--max-restarts", "0"]
    if update.nnodes == 1:
        return [*each, "--standalone"]
    return [*each, "--rdzv-backend", "c10d", "--rdzv-id", "rlhf", "--rdzv-endpoint", str(update.endpoint)]


def _newcomer(server: socket.socket, key: str) -> _Member | None:
    """Whoever knocks, if it is a rank of ours."""
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    channel = Channel(connection, END_S)
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError):  # whatever a stranger says
        hello = channel.receive_one(within_s=END_S)
        if hmac.compare_digest(str(hello["key"]), key):
            return _Member(int(hello["rank"]), int(hello["of"]), int(hello["pid"]), str(hello["host"]), channel)
    channel.close()
    return None


def _last_words(log: Any) -> str:
    """The last error among what torchrun and its ranks have printed."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    told = [line for line in lines if "Error" in line]
    return f" ({told[-1][:300]})" if told else ""
