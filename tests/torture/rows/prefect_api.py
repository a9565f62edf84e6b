"""Prefect's API absent, killed, hanging and restarted, at seeded moments of a run: the run ends the same, with code 0.

Real servers with real databases; the real command and the real flow. A server that hangs is stopped by SIGSTOP.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture.battery import Effort, Outcome
from torture.prefect_server import PrefectServer, free_port, rlhf
from torture.runs import battery_config, fingerprint, in_child, start, warm

from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.records import read_record
from rlhf_core.contracts.stage_graph import FILE_STEMS

NAME = "Prefect API killed, absent, restarted, hanging"
GOAL = "100 % finish with code 0, same hash"
LONGEST_S = 120.0
"""A run that takes longer hangs."""


@dataclass(frozen=True)
class Case:
    """What happens to the server, and when."""

    what: str
    """absent, none, killed, restarted, hangs, blinks."""
    mark: str = ""
    """File of the run whose appearance is the moment; empty: before the run begins."""
    slow_s: float = 0.0

    @property
    def name(self) -> str:
        """For people and for folders."""
        return f"{self.what}-{self.mark.replace('/', '-') or 'start'}"


def measure(effort: Effort) -> Outcome:
    """Every case, each a run of its own."""
    cases = _cases(full=effort.full)
    config = battery_config(effort.tiny)
    (effort.folder / "warm").mkdir()
    warm(config, effort.folder / "warm")
    if in_child(lambda: start(config, effort.folder / "wanted"), log=effort.folder / "log"):
        raise RuntimeError((effort.folder / "log").read_text())
    wanted = fingerprint(effort.folder / "wanted")
    (effort.folder / "run.yaml").write_bytes(canonical_json(config.model_dump()))
    failures: list[str] = []
    longest = 0.0
    server = PrefectServer(effort.folder / "prefect")
    is_up = False
    try:
        for done, case in enumerate(cases):
            if case.what not in ("absent", "none") and not is_up:
                server.start()
                server.wait()
            problem, seconds = _try(effort.folder, case, server, wanted)
            failures += [f"{case.name}: {problem}"] if problem else []
            longest = max(longest, seconds)
            is_up = case.what in ("restarted", "hangs", "blinks") or (is_up and case.what in ("absent", "none"))
            if is_up and case.what not in ("absent", "none"):
                server.wait()
            effort.progress(done + 1, len(cases))
    finally:
        server.send(signal.SIGKILL)
    return Outcome(
        tried=len(cases),
        passed=len(cases) - len(failures),
        figure=f"{len(cases)} runs through {len({case.what for case in cases})} kinds of outage: all end with code 0 "
        f"and the same hash, in {longest:.0f} s at most" if not failures else f"{len(failures)} runs went wrong",
        goal_size=len(_cases(full=True)),
        failures=failures[:10],
        numbers={"longest_s": round(longest, 1)},
    )  # fmt: skip


def _cases(*, full: bool) -> list[Case]:
    if not full:
        return [Case("absent")]
    pick = random.Random(4)
    marks = [f"iterations/{i:06d}/{stem}.json" for i in range(3) for stem in FILE_STEMS.values()]
    at_the_end = ["iterations/000002/06_update.json", "checkpoints/000003/manifest.json", "before_after.json"]
    return [
        Case("none"),
        Case("absent"),
        *(Case("killed", mark) for mark in ["run.json", *pick.sample(marks, 5), *at_the_end]),
        *(Case("restarted", mark, 0.8) for mark in ["run.json", *pick.sample(marks, 4), *at_the_end]),
        *(Case("hangs", mark) for mark in [*pick.sample(marks, 3), at_the_end[2]]),
        *(Case("blinks", mark, 0.8) for mark in pick.sample(marks, 3)),
    ]


def _try(folder: Path, case: Case, server: PrefectServer, wanted: str) -> tuple[str, float]:
    """What is wrong with the run of a case, and how long it took."""
    run_dir, log = folder / case.name, folder / f"{case.name}.log"
    api = {"absent": f"http://127.0.0.1:{free_port()}/api", "none": None}.get(case.what, server.url)
    began = time.monotonic()
    child = rlhf(
        ["train", "--config", str(folder / "run.yaml"), "--run-dir", str(run_dir)],
        api=api, log=log, slow_s=case.slow_s,
    )  # fmt: skip
    gone = threading.Event()
    upsetter: Any = threading.Thread(target=_upset, args=(server, case, run_dir / case.mark, gone))
    if case.mark:
        upsetter.start()
    code = _wait(child)
    seconds = time.monotonic() - began
    gone.set()
    if case.mark:
        upsetter.join()
    said = log.read_text() if log.is_file() else ""
    if code is None:
        return f"it did not end within {LONGEST_S:.0f} s", seconds
    if code:
        return f"exit code {code}: {' / '.join(said.strip().splitlines()[-3:])}", seconds
    if fingerprint(run_dir) != wanted:
        return "another hash", seconds
    if case.what in ("absent", "killed") and "warning: the Prefect API at" not in said:
        return "nobody was told", seconds
    if case.what == "blinks":
        server.wait()
        state = server.state(read_record(run_dir / "prefect.json")["flow_run_id"])
        return "" if state == "COMPLETED" else f"the flow run is {state}", seconds
    return "", seconds


def _upset(server: PrefectServer, case: Case, mark: Path, gone: threading.Event) -> None:
    """Wait for the moment, then do to the server what the case says."""
    while not mark.exists() and not gone.is_set():
        time.sleep(0.002)
    if case.what == "blinks":
        server.send(signal.SIGSTOP)
        time.sleep(3)
        server.send(signal.SIGCONT)
    elif case.what == "hangs":
        server.send(signal.SIGSTOP)
        gone.wait()
        server.send(signal.SIGCONT)
    else:
        server.send(signal.SIGKILL)
        if case.what == "restarted":
            server.start()


def _wait(child: int) -> int | None:
    """The exit code of a child; None if it had to be killed."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
