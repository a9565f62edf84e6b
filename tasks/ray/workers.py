"""Actors of a Ray cluster that compute shards, each with models of its own, for as long as a run goes on.

An actor finds models, prompts and artifacts by the run folder, as any process does: what crosses the network is a
reference, and nothing comes back but an error. A run in an object store is found by its address, so that nodes need no
disk in common. It needs neither Prefect nor the address of its API, since the task runs
of Prefect stay in the process of the run. One that dies with its process or its node is replaced wherever there is
room, and what it was doing is done again; the others do not notice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.contracts.errors import StorageError, UserError, WorkerError
from rlhf_core.contracts.execution_config import StageResources
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.search_path import ROOT, settle_search_path
from rlhf_core.contracts.trust import accept_config, check_door, cluster
from rlhf_core.identity import identity_drift, machine_identity
from rlhf_core.models.devices import resolve_device, usable_cores
from rlhf_core.store.helping import compute_at, joining, share
from tasks.shards.stages import SHARDED
from tasks.shards.workers import MAX_DEATHS

logger = logging.getLogger(__name__)

ALONE = "local"
"""Address of a Ray that is begun here, for this run: its workers have the disk of the run's process."""
OBJECT_STORE_BYTES = 100_000_000
"""Of a Ray that is begun here: nothing of size goes through it, and by default it takes a third of the memory."""
LOOK_S = 1.0
"""How often who waits for a worker looks whether there is hope."""
KNOCK_S = 10.0
"""For a cluster's address to take a connection."""


@dataclass(frozen=True)
class Needs:
    """What Ray reserves for a worker."""

    num_cpus: float
    num_gpus: float
    custom: tuple[tuple[str, float], ...]
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, given: StageResources, *, threads: int, has_gpu: bool) -> Needs:
        """As the config says, or what a shard takes anyway."""
        return cls(
            float(threads) if given.num_cpus is None else given.num_cpus,
            float(has_gpu) if given.num_gpus is None else given.num_gpus,
            tuple(sorted(given.custom.items())),
            tuple(sorted(given.labels.items())),
        )

    @property
    def amounts(self) -> dict[str, float]:
        """Of each resource, as Ray calls it."""
        return {k: v for k, v in {"CPU": self.num_cpus, "GPU": self.num_gpus, **dict(self.custom)}.items() if v}

    def fit(self, there: Mapping[str, float]) -> int | None:
        """How many of these the resources of a cluster allow; None: any number."""
        return min((int(there.get(name, 0) // amount) for name, amount in self.amounts.items()), default=None)

    def __str__(self) -> str:
        labels = [f"{name}={value}" for name, value in self.labels]
        return ", ".join([f"{name} {amount:g}" for name, amount in self.amounts.items()] + labels) or "nothing"


class RayWorkers:
    """Workers of a run on a Ray cluster; stages of equal needs share theirs.

    Args:
        run: the run folder, on storage that every node sees, or the copy of one in an object store.
    Raises:
        UserError: Ray is not installed, its cluster is not there, or has no room for what the config asks for.
        StorageError: an object store does not give what an earlier process has left.
    """

    def __init__(self, run: RunFolder) -> None:
        execution, threads = run.config.execution, int(run.identity["num_threads"])
        address = execution.ray.address or os.environ.get("RAY_ADDRESS") or ALONE
        self._disconnect = _connected(address)
        try:
            if address != ALONE:
                share(run.path)
            has_gpu = resolve_device(run.config.device).type == "cuda"
            self._pools: dict[str, _Pool] = {}
            by_needs: dict[Needs, _Pool] = {}
            for stage in SHARDED:
                given: StageResources = getattr(execution.ray, stage)
                needs = Needs.of(given, threads=execution.shard_threads(threads), has_gpu=has_gpu)
                if needs not in by_needs:
                    count = execution.num_workers or _room(needs, stage, execution.num_shards)
                    by_needs[needs] = _Pool(run, needs, count)
                self._pools[stage] = by_needs[needs]
        except BaseException:
            self._disconnect()
            raise

    @property
    def count(self) -> int:
        """Calls that are done at a time, at most."""
        return sum(pool.count for pool in self._different())

    def call(self, stage: str, what: str, function: Callable[..., None], *arguments: Any) -> None:
        """Let the stage's next idle worker do something, as :class:`tasks.shards.workers.Workers` says.

        Raises: also WorkerError if no node takes a worker, or one that does has other libraries or no run folder.
        """
        self._pools[stage].call(what, function, *arguments)

    def close(self) -> None:
        """End all workers now, and the Ray that was begun for them."""
        for pool in self._different():
            pool.close()
        self._disconnect()

    def _different(self) -> set[_Pool]:
        return set(self._pools.values())


class _Pool:
    """Workers of equal needs."""

    def __init__(self, run: RunFolder, needs: Needs, count: int) -> None:
        import ray

        self.count, self._needs, self._patience_s = count, needs, run.config.execution.ray.patience_s
        config = run.config.model_copy(update={"num_threads": int(run.identity["num_threads"])})
        self._expected = (compute_at(run.path), machine_identity(config), config)
        options = {"num_cpus": needs.num_cpus, "num_gpus": needs.num_gpus, "resources": dict(needs.custom)}
        selector = {"label_selector": dict(needs.labels)} if needs.labels else {}
        self._class: Any = ray.remote(_Worker).options(**options, **selector, scheduling_strategy="SPREAD")
        self._idle: queue.Queue[Any] = queue.Queue()
        self._at_work, self._is_closed, self._lock = 0, False, threading.Lock()
        self._all: list[Any] = []
        for _ in range(count):
            self._begin()

    def call(self, what: str, function: Callable[..., None], *arguments: Any) -> None:
        from ray.exceptions import RayError

        for deaths in range(1, MAX_DEATHS + 1):
            worker = self._next(what)
            try:
                with self._counted():
                    _result(worker.do.remote(function, *arguments))
            except RayError as error:
                if self._is_closed:
                    raise
                self._begin()
                logger.warning("a Ray worker died computing %s; another one does it again (%d)", what, deaths)
                logger.info("%s", error)
            except BaseException:
                self._idle.put(worker)
                raise
            else:
                self._idle.put(worker)
                return
        raise WorkerError(
            f"{MAX_DEATHS} Ray workers in a row died computing {what}: out of memory, most likely; give the stage more "
            "of a node in execution.ray, or use more shards"
        )

    def close(self) -> None:
        import ray

        self._is_closed = True
        for worker in self._all:
            with contextlib.suppress(Exception):
                ray.kill(worker)

    def _begin(self) -> None:
        threading.Thread(target=self._worker_begins, daemon=True).start()

    def _worker_begins(self) -> None:
        """Have one more worker, once a node has room for it; what keeps it from working is for who waits for it."""
        from ray.exceptions import RayError

        reason: BaseException | None = None
        for _ in range(MAX_DEATHS):
            if self._is_closed:
                return
            worker = self._class.remote()
            with self._lock:
                self._all.append(worker)
            try:
                _result(worker.ready.remote(*self._expected))
            except RayError as error:  # its process or its node is gone already
                reason = WorkerError(f"{MAX_DEATHS} Ray workers in a row died as they began: {_first_line(error)}")
                continue
            except Exception as error:
                reason = error
                break
            self._idle.put(worker)
            return
        self._idle.put(reason)

    def _next(self, what: str) -> Any:
        """An idle worker. Raises WorkerError if there is none, nor one at work, for too long."""
        hopeful_until = time.monotonic() + self._patience_s
        while True:
            try:
                worker = self._idle.get(timeout=LOOK_S)
            except queue.Empty:
                if self._is_closed:
                    raise WorkerError("the Ray workers of this run have been ended") from None
                if self._at_work:
                    hopeful_until = time.monotonic() + self._patience_s
                elif time.monotonic() > hopeful_until:
                    import ray

                    raise WorkerError(
                        f"no node of the Ray cluster has taken a worker for {what} in execution.ray.patience_s "
                        f"{self._patience_s:g} s: it needs {self._needs}, and the cluster has "
                        f"{_shown(ray.cluster_resources())}; add a node, or resume when there is room"
                    ) from None
                continue
            if isinstance(worker, BaseException):
                self._idle.put(worker)  # for whoever else waits
                raise worker
            return worker

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1


class _Worker:
    """What an actor is."""

    def ready(self, place: str, expected: Mapping[str, Any], config: Any) -> None:
        """Raise WorkerError if this node would compute something else, or nothing."""
        here = f"the Ray node {_node()}"
        accept_config(config)  # the run's process has looked at it
        try:
            folder = joining(place)
        except (UserError, StorageError) as error:
            raise WorkerError(f"{here} does not reach the run: {error}") from None
        if not (folder / "run.json").is_file():
            raise WorkerError(
                f"{here} does not see the run folder {place}: put it on storage that all nodes share, or under s3://"
            )
        if drift := identity_drift(expected, machine_identity(config)):
            raise WorkerError(
                f"{here} differs from the machine of the run, and would compute other bits ({'; '.join(drift)}): "
                "install the same versions there, or choose like nodes by execution.ray labels"
            )

    def do(self, function: Callable[..., None], *arguments: Any) -> None:
        """Do a call."""
        function(*arguments)


def _connected(address: str) -> Callable[[], None]:
    """Connect this process with Ray; returns what ends that."""
    if importlib.util.find_spec("ray") is None:
        raise UserError('execution.engine is ray, but Ray is not installed; pip install "rlhf-flow[ray]"')
    check_door(cluster(address))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells nobody
    settle_search_path()
    if address == ALONE and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # a token for this process and its workers: Ray would write one into the home folder, and say so
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read as Ray is imported
    import ray

    if ray.is_initialized():
        return lambda: None
    of_own: dict[str, Any] = {}
    if address == ALONE:
        of_own = {"num_cpus": usable_cores(), "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        _knock(address)
        with _own_signals():
            ray.init(
                address=address,
                job_config=_job_config(),
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **of_own,
            )
    except Exception as error:
        raise UserError(
            f"execution.ray.address {address!r} is no Ray cluster that this process can join: "
            f"{_first_line(error)}; start one (`ray start --head`; RAY_AUTH_MODE and RAY_AUTH_TOKEN as there), or "
            "leave the address out for a Ray of this machine alone"
        ) from None
    return ray.shutdown


class _Places(list[str]):
    """Folders that workers look for modules in: Ray's own additions, the script's and the working folder, are not."""

    def extend(self, places: Any) -> None:
        """Add nothing."""


def _job_config() -> Any:
    """Where workers find this package, and nothing in the folder that the command was typed in."""
    from ray.job_config import JobConfig

    found = JobConfig()
    found._py_driver_sys_path = _Places([] if Path(ROOT).name == "site-packages" else [ROOT])
    return found


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray would ask again for minutes before it says so."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """``ray.init`` puts a handler of its own in the place of whoever stops a run in time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _room(needs: Needs, stage: str, num_shards: int) -> int:
    """How many workers a cluster takes. Raises UserError if it takes none."""
    import ray

    there = ray.cluster_resources()
    fit = needs.fit(there)
    if fit == 0:
        raise UserError(
            f"execution.ray.{stage} asks for {needs}, and the Ray cluster has {_shown(there)}: ask for less, or start "
            "nodes that have it (with execution.num_workers given, a run waits for them)"
        )
    return num_shards if fit is None else min(num_shards, fit)


def _result(reference: Any) -> None:
    """Wait for a call. Raises what it raised, as it was, or RayError if its worker is gone."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(reference)
    except RayTaskError as error:
        cause: Any = error.cause
        if isinstance(cause, RayError):
            raise WorkerError(f"a Ray worker did not understand its call: {_first_line(cause)}") from error
        raise cause from error


def _node() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _shown(resources: Mapping[str, float]) -> str:
    counted = {k: v for k, v in resources.items() if not k.startswith("node:") and "memory" not in k}
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(counted.items())) or "nothing"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
