"""One run in an interpreter of its own.

    python -m torture.alone CONFIG.json RUN_DIR [--until END_OF_PATH]

Starts or resumes the run, and prints the clock's year and the run's fingerprint. ``--until`` kills the process
before the rename to that path.
"""

# ruff: noqa: E402 - the environment stands above the imports that read it
from __future__ import annotations

from environment import be_quiet_and_private

be_quiet_and_private()

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_alone(
    config: Path, run_dir: str, environment: Mapping[str, str], *options: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Start this program; its last line of output is what it found."""
    return subprocess.run(
        [sys.executable, "-m", "torture.alone", str(config), run_dir, *options],
        env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--until")
    asked = parser.parse_args()
    import torch
    from torture.deaths import MortalDisk
    from torture.runs import fingerprint, start_or_go_on

    from rlhf_core.contracts.config_io import build_config
    from rlhf_core.contracts.durable import using_disk

    torch.set_num_threads(1)
    config = build_config(json.loads(asked.config.read_text()))
    with using_disk(MortalDisk(asked.run_dir.parent / f"{asked.run_dir.name}.ledger", asked.until)):
        start_or_go_on(config, asked.run_dir)
    year = datetime.datetime.now().year
    sys.stdout.write("\n" + json.dumps({"year": year, "fingerprint": fingerprint(asked.run_dir)}) + "\n")


if __name__ == "__main__":
    main()
