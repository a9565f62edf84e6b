"""The wall clock is ten years off, or jumps by twenty between a kill and the resume: no number depends on it.

The whole battery wants libfaketime, which deceives every library (Debian: ``apt-get install faketime``; another
place: the environment variable LIBFAKETIME names the file). The small one moves the clock of Python code only.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from torture.alone import run_alone
from torture.battery import Effort, Outcome
from torture.deaths import KILLED, MortalDisk, last_words, log_of
from torture.runs import battery_config, fingerprint, in_child, start_or_go_on

from rlhf_core.contracts.durable import using_disk

NAME = "clock ±10 years"
GOAL = "same hash, also if the clock jumps between kill and resume"
YEARS = (-10, 0, 10)
YEAR_S = 365.25 * 86400
DIE_AT = "000001/04_ref_logprobs.json"
PLACES = (
    "/usr/lib/*/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
    "/usr/local/lib/faketime/*.so.1",
)


def measure(effort: Effort) -> Outcome:
    """Each pair of years before the kill and after it; the first pair, without a shift, is what all must equal."""
    library = _libfaketime()
    pairs = [(a, b) for a in YEARS for b in YEARS] if effort.full else [(-10, 10)]
    pairs = [(0, 0)] + [pair for pair in pairs if pair != (0, 0)]
    config = effort.folder / "config.json"
    config.write_text(json.dumps(battery_config(effort.tiny).model_dump()))
    expected, failures, years = "", list[str](), list[int]()
    kinds = ["libfaketime"] * (library is not None and effort.full) + ["Python's clock"]
    tries = [(kind, pair) for kind in kinds for pair in pairs]
    for number, (kind, pair) in enumerate(tries):
        run_dir = effort.folder / f"run{number}"
        if kind == "libfaketime" and library is not None:
            found = _run_alone(effort, config, run_dir, pair, library)
        else:
            found = _run_forked(effort, run_dir, pair)
        shutil.rmtree(run_dir, ignore_errors=True)
        if "error" in found:
            failures.append(f"{pair[0]:+d} years, then {pair[1]:+d} ({kind}): {found['error']}")
        elif abs(found["year"] - time.localtime().tm_year - pair[1]) > 1:
            failures.append(f"the clock was not moved by {pair[1]:+d} years ({kind}): it said {found['year']}")
        else:
            years.append(found["year"])
            expected = expected or found["fingerprint"]
            if found["fingerprint"] != expected:
                failures.append(f"{pair[0]:+d} years, then {pair[1]:+d} ({kind}): another hash")
        effort.progress(number + 1, len(tries))
    passed = len(tries) - len(failures)
    missing = "libfaketime is not here (Debian: apt-get install faketime): only the clock of Python code was moved"
    return Outcome(
        tried=len(tries),
        passed=passed,
        figure=f"{passed}/{len(tries)} same hash, run and resumed in the years {min(years, default=0)} to "
        f"{max(years, default=0)}, by {' and '.join(kinds)}",
        goal_size=len(YEARS) ** 2,
        failures=failures[:20],
        numbers={"kinds": kinds, "pairs": pairs},
        not_run=missing if effort.full and library is None else "",
    )


def _run_alone(effort: Effort, config: Path, run_dir: Path, pair: tuple[int, int], library: Path) -> dict[str, Any]:
    """Under libfaketime, run until the kill in one year, and resume in another."""
    before = _shared_memory()
    try:
        return _lives_alone(effort, config, run_dir, pair, library)
    finally:
        for path in _shared_memory() - before:  # a killed process leaves libfaketime's behind
            path.unlink(missing_ok=True)


def _shared_memory() -> set[Path]:
    return {*Path("/dev/shm").glob("faketime_*"), *Path("/dev/shm").glob("sem.faketime_*")}


def _lives_alone(effort: Effort, config: Path, run_dir: Path, pair: tuple[int, int], library: Path) -> dict[str, Any]:
    done: Any = None
    for part, years in enumerate(pair):
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "FAKETIME": f"{years:+d}y",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        options = [] if part else ["--until", DIE_AT]
        done = run_alone(config, str(run_dir), environment, *options, cwd=effort.folder)
        if done.returncode != (0 if part else KILLED):
            said = done.stderr.strip().splitlines() or ["no word"]
            return {"error": f"exit {done.returncode}: {said[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _run_forked(effort: Effort, run_dir: Path, pair: tuple[int, int]) -> dict[str, Any]:
    """The same with Python's clock moved, in children."""
    config, ledger = battery_config(effort.tiny), run_dir.with_suffix(".ledger")
    seen = run_dir.with_suffix(".year")
    for part, years in enumerate(pair):

        def work(years: int = years, at: str | None = None if part else DIE_AT) -> None:
            move_clock(years * YEAR_S)
            seen.write_text(str(time.localtime().tm_year))
            with using_disk(MortalDisk(ledger, at)):
                start_or_go_on(config, run_dir)

        ended = in_child(work, log=log_of(run_dir))
        if ended != (0 if part else KILLED):
            return {"error": f"exit {ended}: {last_words(run_dir)}"}
    return {"year": int(seen.read_text()), "fingerprint": fingerprint(run_dir)}


def move_clock(seconds: float) -> None:
    """Shift what Python code of this process is told of the date; libraries in C go on asking the kernel."""
    real_time, real_time_ns, real_datetime = time.time, time.time_ns, datetime.datetime
    real_localtime, real_gmtime = time.localtime, time.gmtime

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_datetime.now(tz) + datetime.timedelta(seconds=seconds)

    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: real_time_ns() + int(seconds * 1e9)
    time.localtime = lambda secs=None: real_localtime(time.time() if secs is None else secs)
    time.gmtime = lambda secs=None: real_gmtime(time.time() if secs is None else secs)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("flows", "tasks", "rlhf_core") and vars(module).get("datetime") is real_datetime:
            vars(module)["datetime"] = Moved


def _libfaketime() -> Path | None:
    named = os.environ.get("LIBFAKETIME")
    if named:
        return Path(named)
    return next((path for place in PLACES for path in Path("/").glob(place[1:])), None)
