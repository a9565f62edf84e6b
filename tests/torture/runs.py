"""Runs of the tiny world for the battery: the real loop without Prefect, in children that may die.

The parent has imported everything (:func:`warm`), so a child is forked in milliseconds. It must have started no
thread before: torch computes on one, and neither a Prefect client nor MLflow is used in the parent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iteration import tiny_tree
from tiny_world import Tiny

from flows.calling import without_prefect
from flows.ppo import iterate
from rlhf_core.contracts.artifacts import locate_artifact
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config, digest_json
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import source_digest
from tasks.lifecycle.start import check_resumable, start_run
from tasks.reports import report
from tasks.session.session import open_session

A_PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel. Drawing the real one is a third of a tiny run, and no number depends on it."""


def warm(config: RunConfig, folder: Path) -> None:
    """Import into this process whatever a run of this config imports, as a child has found; draw no pictures.

    Nothing but modules, a table of constants and the digest of the sources is kept: what a run reads or computes, its
    child forgets. (So an edit of the sources does not make the battery's own runs drift.)

    Args:
        config: its run is made once, in a child, in ``folder``.
        folder: empty; there is a finished run in it afterwards.
    """

    def run_and_tell() -> None:
        start(config, folder / "run")
        (folder / "modules").write_text("\n".join(sys.modules))

    if in_child(run_and_tell, log=folder / "log"):
        raise RuntimeError(f"the tiny world does not run here:\n{(folder / 'log').read_text()}")
    for module in (folder / "modules").read_text().split("\n"):
        importlib.import_module(module)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("gpt2")
    source_digest()
    report.draw_run = _draw_a_pixel


def _draw_a_pixel(_run: RunFolder, path: Path) -> bool:
    write_file(path, A_PICTURE)
    return True


def battery_config(tiny: Tiny, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Three iterations with an adaptive β, a checkpoint after each second one, retention at work."""
    tree = tiny_tree(tiny) | {
        "kl": {"horizon": 50.0, "target": 0.5},
        "checkpoint": {"every": 2, "keep_last": 1},
    }
    return build_config(tree | dict(changes or {}))


def start(config: RunConfig, run_dir: Path) -> None:
    """Begin a run and finish it, in this process."""
    with without_prefect():
        start_run(config, str(run_dir))
        iterate(str(run_dir))


def go_on(run_dir: Path) -> None:
    """Resume a run and finish it, in this process, with nothing remembered."""
    open_session.cache_clear()
    with without_prefect():
        check_resumable(str(run_dir), accept_drift=False)
        iterate(str(run_dir))


def start_or_go_on(config: RunConfig, run_dir: Path) -> None:
    """What a person does after any death: resume if there is a run, else start it."""
    if (run_dir / "run.json").is_file():
        go_on(run_dir)
    else:
        start(config, run_dir)


def in_child(work: Callable[[], object], *, log: Path | None = None) -> int:
    """Do something in a forked child and wait for it.

    Returns: 0 if it came back, 1 if it raised (the traceback is in ``log``), -N if signal N killed it.
    """
    child = fork(work, log=log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork(work: Callable[[], object], *, log: Path | None = None) -> int:
    """Begin something in a forked child; returns its pid, which the caller waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        status = 0
    except BaseException:
        with contextlib.suppress(OSError):
            (log or Path(os.devnull)).write_text(traceback.format_exc())
    finally:
        os._exit(status)


def fingerprint(run_dir: Path) -> str:
    """sha256 of all that a finished run has computed: artifacts, manifests but for their seconds, checkpoints.

    An archived artifact counts as its bytes when it was loose, so that compaction changes nothing here.
    """
    run = RunFolder.open(run_dir)
    found: dict[str, Any] = {
        str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(run_dir.glob("checkpoints/[0-9]*/**/*"))
        if p.is_file()
    }
    for iteration in range(run.config.num_iterations):
        for stage, manifest in run.manifests(iteration).items():
            found[manifest.artifact.path] = hashlib.sha256(locate_artifact(run_dir, manifest.artifact)[1]).hexdigest()
            found[f"{iteration}/{stage}"] = [manifest.key, dict(manifest.metrics), dict(manifest.state)]
    found["finished"] = run.num_finished()
    found["before_after"] = (run_dir / "before_after.json").read_text()
    return digest_json(found)
