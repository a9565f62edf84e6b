"""The same config gives the same bytes, whatever decides no number: hash seed, working directory, time zone, locale."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter

from torture.alone import run_alone
from torture.battery import Effort, Outcome
from torture.runs import battery_config

NAME = "baseline"
GOAL = "50/50 same hash over hash seed, working directory, time zone"
ZONES = ("UTC", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati", "Pacific/Marquesas")
LOCALES = ("C", "C.UTF-8")


def measure(effort: Effort) -> Outcome:
    """Each run is an interpreter of its own, since Python reads the hash seed once."""
    runs = effort.size(2, 50)
    config = effort.folder / "config.json"
    config.write_text(json.dumps(battery_config(effort.tiny).model_dump()))
    dice = random.Random(50)
    found: Counter[str] = Counter()
    failures: list[str] = []
    conditions: set[tuple[str, ...]] = set()
    for number in range(runs):
        cwd = effort.folder / f"from {number}" / ("deeper" if number % 2 else "")
        cwd.mkdir(parents=True)
        run_dir = "run" if number % 2 else str(effort.folder / f"run{number}")
        changes = {
            "PYTHONHASHSEED": str(dice.randrange(2**32)),
            "TZ": ZONES[number % len(ZONES)],
            "LC_ALL": LOCALES[number % len(LOCALES)],
        }
        conditions.add((*changes.values(), str(cwd)))
        done = run_alone(config, run_dir, os.environ | changes, cwd=cwd)
        if done.returncode:
            failures.append(f"{changes}: {_last_line(done.stderr)}")
        else:
            found[json.loads(done.stdout.splitlines()[-1])["fingerprint"]] += 1
            shutil.rmtree(cwd / run_dir)
        effort.progress(number + 1, runs)
    same = max(found.values(), default=0)
    failures += [f"{count} of {runs} runs gave {digest[:12]}…" for digest, count in found.items() if len(found) > 1]
    return Outcome(
        tried=runs,
        passed=same,
        figure=f"{same}/{runs} same hash, over {len(conditions)} settings of hash seed, working directory, time zone",
        goal_size=50,
        failures=failures[:20],
        numbers={"hashes": dict(found)},
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]
