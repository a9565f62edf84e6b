"""One rank of an update: ``torchrun … -m tasks.ranks.process``, of a run's process, or by hand on further nodes.

It waits for requests (:mod:`tasks.ranks.channel`), and does with its part of the trainer what all ranks do. It ends
with the process that asks, with torchrun, and after an error, which is told first: the next ranks begin with what is
on disk.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contracts.bound_processes import BOUND_PID, end_with_parent
from tasks.ranks.channel import ADDRESS, ALIVE_S, KEY, Channel

if TYPE_CHECKING:
    from tasks.session.session import Session

MEETING_S = 300.0
"""For the ranks of other nodes to learn where the run's process is."""
GRACE_S = 30.0
"""A collective waits longer than the run's process, which knows who is missing."""


def main() -> None:
    """Serve until the run's process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    by_hand = os.environ.get(ADDRESS) is None
    end_with_parent(os.getppid() if by_hand else int(os.environ[BOUND_PID]))  # torchrun
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://"))
    channel = _connected(store, rank, size)
    threading.Thread(target=_say_alive, args=(channel,), daemon=True).start()
    me = _Rank(dist.PrefixStore("updates", store), rank, size)
    while True:
        try:
            request = channel.receive_one()
        except EOFError:
            os._exit(1)
        if request["do"] == "end":
            os._exit(0)  # without a word to the others, who are told as well
        try:
            channel.send({"done": me.obey(request)})
        except BaseException as error:  # whatever it is: it is told, not shown
            channel.send(_told(error))
            time.sleep(GRACE_S)  # the run's process ends all ranks, and learns of a dead one only before this one
            os._exit(1)


class _Rank:
    """What a rank keeps between two requests."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self._opened: tuple[Any, Session] | None = None
        self._ranks: Any = None

    def obey(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked. Returns: the answer, of which the first rank's counts."""
        from rlhf_core.models.devices import using_threads

        session = self._session(request)
        with using_threads(request["num_threads"]):
            return getattr(self, f"_{request['do']}")(session, **_arguments(request))

    def _update(self, session: Session, iteration: int, refs: list[dict[str, Any]]) -> dict[str, Any]:
        from rlhf_core.contracts.artifacts import ArtifactRef

        result = session.policy.update(iteration, [ArtifactRef(**ref) for ref in refs])
        if iteration + 1 < session.run.config.num_iterations and not session.run.config.execution.overlap:
            self._hand_out(session, iteration + 1)
        if self.rank > 0:
            return {}
        return {
            "steps": list(result.batch.steps),
            "metrics": dict(result.metrics),
            "digest": result.outputs["policy_after"],
        }

    def _hand_out(self, session: Session, iteration: int) -> dict[str, Any]:
        from rlhf_core.contracts.shards import handed_weights
        from rlhf_core.models.handed_weights import hand_out

        trainer = session.policy.trainer(iteration - session.run.updates_behind(iteration))
        hand_out(handed_weights(session.run.path, iteration), trainer.actor_critic, trainer.digest(), trainer.ranks)
        return {}

    def _save(self, session: Session, iteration: int, path: str) -> dict[str, Any]:
        session.policy.save(iteration, Path(path))
        return {}

    def _session(self, request: dict[str, Any]) -> Session:
        """Of the run as the run's process has it, which may know of a drift that is not on disk yet."""
        import torch

        from rlhf_core.contracts.run_folder import RunFolder
        from rlhf_core.contracts.trust import accept_config
        from rlhf_core.memory import settle_memory
        from tasks.ranks.policy import RankPolicyState
        from tasks.session.session import Session

        asked = request["run"]
        if self._ranks is None:
            settle_memory()
            self._ranks = self._group(request)
        if self._opened is None or self._opened[0] != asked:
            self._opened = None  # before the next one is loaded: there is room for one
            run = RunFolder.of_record(Path(asked["path"]), asked["record"])
            accept_config(run.config)  # the run's process has looked at it
            session = Session(run, torch.device("cpu"))
            session.policy = RankPolicyState(session, self._ranks)
            self._opened = (asked, session)
        return self._opened[1]

    def _group(self, request: dict[str, Any]) -> Any:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from rlhf_core.models.ranks import GroupRanks

        device = torch.device("cpu")
        if request["device"] == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=request["deadline_s"] + GRACE_S),
        )
        return GroupRanks(device)


def _arguments(request: dict[str, Any]) -> dict[str, Any]:
    return {name: request[name] for name in ("iteration", "refs", "path") if name in request}


def _connected(store: Any, rank: int, size: int) -> Channel:
    """The channel to the run's process: ranks of its node know where that is, and tell the others."""
    from datetime import timedelta

    store.set_timeout(timedelta(seconds=MEETING_S))
    if (address := os.environ.get(ADDRESS)) is not None:
        store.set("run", f"{address} {os.environ[KEY]}")
    address, key = store.get("run").decode().split()
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=MEETING_S)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    channel = Channel(connection)
    channel.send({"rank": rank, "of": size, "pid": os.getpid(), "host": socket.gethostname(), "key": key})
    return channel


def _say_alive(channel: Channel) -> None:
    """Until nobody hears it: then the run's process is gone, whatever this one is waiting for."""
    while True:
        time.sleep(ALIVE_S)
        try:
            channel.send({"alive": True})
        except OSError:
            os._exit(1)


def _told(error: BaseException) -> dict[str, Any]:
    from rlhf_core.contracts.errors import RlhfError, UserError

    if isinstance(error, UserError):
        return {"failed": "UserError", "problems": list(error.problems)}
    if isinstance(error, RlhfError):
        return {"failed": type(error).__name__, "problems": [str(error)]}
    if isinstance(error, OSError):
        return {"failed": "OSError", "problems": [str(error)]}
    reason = str(error).strip().split("\n")[0]
    return {"failed": "crash", "problems": [f"{type(error).__name__}: {reason}"]}


if __name__ == "__main__":
    main()
