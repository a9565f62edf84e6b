"""Finished runs that many tests read: each is made once a process, and every caller gets a copy of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_digest

_made: dict[tuple[str, str], Path] = {}
"""Config digest and name of the maker -> the run that is copied."""


def copy_of_run(config: RunConfig, run_dir: Path, make: Callable[[RunConfig, Path], object]) -> Path:
    """Copy the finished run of a config into ``run_dir``.

    Args:
        config: names the folders of its models, so runs on other models are other runs.
        run_dir: a folder that does not exist yet.
        make: trains the run into a folder, at the first call for this config.
    """
    key = (config_digest(config), f"{make.__module__}.{make.__qualname__}")
    if key not in _made:
        folder, made_by = Path(tempfile.mkdtemp(prefix="rlhf-tests-run-")), os.getpid()
        atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == made_by else None)
        make(config, folder / "run")
        _made[key] = folder / "run"
    shutil.copytree(_made[key], run_dir, symlinks=True)
    return run_dir
