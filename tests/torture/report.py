"""The table as JSON: what a battery has measured, on which code; and what of it still holds.

A battery takes hours. One that was stopped goes on: rows met in full on the very code that is here now are not measured
again.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torture.battery import ROWS
from torture.running import Finished

from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.durable import hash_file

ROOT = Path(__file__).parents[2]
ROOMS = ("rlhf_core", "tasks", "flows", "tests/torture")
"""A change of any file of code in there makes every row worth measuring again."""


def code_digest() -> str:
    """sha256 over the code that the battery measures, and its own."""
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    return digest_json({str(file.relative_to(ROOT)): hash_file(file) for file in files})


def report(finished: Sequence[Finished], *, small: bool, code: str) -> dict[str, Any]:
    """Everything that is worth keeping of the rows that are done, plain JSON."""
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "cpus_usable": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "code": code,
        "small": small,
        "rows": [row.to_json() for row in sorted(finished, key=lambda row: ROWS.index(row.name))],
    }


def still_valid(path: Path | None, *, small: bool, code: str) -> list[Finished]:
    """Rows of an earlier report that are met, at this size, on this code and this torch; none without a report."""
    if path is None or not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    same = (earlier.get("code"), earlier["small"], earlier["machine"]["torch"]) == (code, small, torch.__version__)
    rows = [Finished.from_json(row) for row in earlier["rows"]] if same else []
    return [row for row in rows if row.name in ROWS and row.is_good(full=not small)]
