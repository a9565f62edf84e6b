"""Functions that a run names, looked at before they are imported: a run folder may come from somebody else.

A function runs with the rights of whoever resumes or evaluates the run. So its file must be the one that the run
was started with, which is found and compared without running a line of it; and it is never taken from the run
folder itself, which holds data.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import DriftError, UserError
from rlhf_core.contracts.reward_config import FunctionReward
from rlhf_core.rewards.ready_made import READY_MADE


def changed_functions(config: RunConfig, identity: Mapping[str, Any], run_dir: Path) -> list[str]:
    """What differs between the functions that a run names and those it was started with. Imports nothing.

    Args:
        config: of the run.
        identity: as the run recorded it.
        run_dir: its folder.
    Returns: one line for each function whose file is another one: ``rewards.mine: 9f2c… -> 51d3…``.
    Raises: UserError if a function would be imported from the run folder.
    """
    recorded: Any = identity.get("rewards")
    changed: list[str] = []
    for index, (name, component) in enumerate(zip(config.reward.names, config.reward.components, strict=True)):
        if not isinstance(component, FunctionReward) or component.function in READY_MADE:
            continue
        file = module_file(component.function.partition(":")[0])
        if file is None:  # told when it is imported
            continue
        if file.resolve().is_relative_to(run_dir.resolve()):
            raise UserError(
                f"reward.components.{index}.function {component.function!r} would be imported from {file}, inside the "
                "run folder, which holds data and no code; if you trust it, put the file elsewhere and start from there"
            )
        then = str(recorded.get(name, "")) if isinstance(recorded, Mapping) else ""
        now = hash_file(file)
        if now not in then.split():
            changed.append(f"rewards.{name} ({file}): {then[:12] or 'unknown'} -> {now[:12]}")
    return changed


def check_functions(config: RunConfig, identity: Mapping[str, Any], run_dir: Path) -> None:
    """Raise DriftError if a run names a function that is not the one it was started with; as changed_functions."""
    if changed := changed_functions(config, identity, run_dir):
        raise DriftError(
            f"{run_dir} names a reward function whose file is not the one that the run was started with:\n  "
            + "\n  ".join(changed)
            + "\nput that file back, or accept it for this run with `rlhf resume --accept-drift`"
        )


def module_file(name: str) -> Path | None:
    """The file that ``import name`` would run, without running it or its packages; None if there is none."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # as the import does: last
    importlib.invalidate_caches()
    top, *inner = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    found = top
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        found = f"{found}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(found, spec.submodule_search_locations)
    origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and Path(origin).is_file() else None
