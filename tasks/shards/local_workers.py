"""Processes of this machine that compute shards, each with models of its own, for as long as a run goes on.

A worker is a process like this one: it finds models, prompts and artifacts by the run folder, and keeps them. One that
dies is replaced, and what it was doing is done again by its successor; the others do not notice. When this process
dies, however that happens, its workers end.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rlhf_core.contracts.errors import WorkerError
from rlhf_core.contracts.search_path import settle_search_path
from tasks.shards.workers import MAX_DEATHS

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often a worker looks whether the process that it works for is there."""


class LocalWorkers:
    """So many processes, each doing one call at a time.

    Args:
        count: of processes, at least 1.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: queue.Queue[ProcessPoolExecutor] = queue.Queue()
        self._all = [_new_worker() for _ in range(count)]
        self._is_closed = False
        for worker in self._all:
            worker.submit(os.getpid)  # begins its process, which loads the libraries meanwhile
            self._idle.put(worker)

    def call(self, stage: str, what: str, function: Callable[..., None], *arguments: Any) -> None:  # noqa: ARG002
        """Let the next idle process do something, as :class:`tasks.shards.workers.Workers` says."""
        worker = self._idle.get()
        try:
            for deaths in range(1, MAX_DEATHS + 1):
                try:
                    worker.submit(function, *arguments).result()
                    return
                except BrokenProcessPool:
                    if self._is_closed:
                        raise
                    worker = self._replaced(worker)
                    logger.warning("a worker died computing %s; another one does it again (%d)", what, deaths)
            raise WorkerError(
                f"{MAX_DEATHS} workers in a row died computing {what}: out of memory, most likely; use fewer "
                "execution.num_workers, or more shards"
            )
        finally:
            self._idle.put(worker)

    def process_ids(self) -> list[int]:
        """Of the workers that are there now."""
        return [pid for worker in self._all for pid in _processes(worker)]

    def close(self) -> None:
        """End all processes now; what they were doing is lost."""
        self._is_closed = True
        for worker in self._all:
            _end(worker)

    def _replaced(self, dead: ProcessPoolExecutor) -> ProcessPoolExecutor:
        _end(dead)
        new = _new_worker()
        self._all[self._all.index(dead)] = new
        return new


def _new_worker() -> ProcessPoolExecutor:
    settle_search_path()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """What a worker does first: leave signals of the terminal to its parent, and not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def _processes(worker: ProcessPoolExecutor) -> list[int]:
    return list(worker._processes or {})  # there is no public name for them


def _end(worker: ProcessPoolExecutor) -> None:
    for pid in _processes(worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    worker.shutdown(wait=False, cancel_futures=True)
