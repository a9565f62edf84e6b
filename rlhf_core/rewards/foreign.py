"""Functions that a run names, looked at before they are imported: a run folder may come from somebody else.

A function runs with the rights of whoever resumes or evaluates the run. So its files must be those that the run was
started with, which are found and compared without running a line of them; they are never taken from the run folder
itself, which holds data; and a function that the run's record alone names is used once the person has accepted it:
:mod:`rlhf_core.contracts.trust`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import DriftError
from rlhf_core.contracts.reward_config import FunctionReward
from rlhf_core.contracts.trust import check_place, check_recorded
from rlhf_core.rewards.imports import find_module, imported_modules
from rlhf_core.rewards.ready_made import READY_MADE

DEFINES = " (defines it)"
"""End of the label of a file that is found after the import alone."""


def changed_functions(config: RunConfig, identity: Mapping[str, Any], run_dir: Path) -> list[str]:
    """What differs between the functions that a run names and those it was started with. Imports nothing.

    Args:
        config: of the run.
        identity: as the run recorded it.
        run_dir: its folder.
    Returns: one line for each file that is another one: ``rewards.mine (…/lexicon.py): 9f2c… -> 51d3…``.
    Raises: UserError if a function would be imported from a run folder, or is one that nobody here has accepted.
    """
    check_recorded(config, run_dir, ("function",))
    recorded: Any = identity.get("rewards")
    changed: list[str] = []
    for index, (name, component) in enumerate(zip(config.reward.names, config.reward.components, strict=True)):
        if not isinstance(component, FunctionReward) or component.function in READY_MADE:
            continue
        module, field = component.function.partition(":")[0], f"reward.components.{index}.function"
        files = imported_modules(module, component.folder)
        for file in files.values():
            check_place(file, f"{field} {component.function!r}", run_dir)
        then: Any = recorded.get(name, "") if isinstance(recorded, Mapping) else ""
        main = module_file(module, component.folder)
        if main is None:  # told when it is imported
            continue
        if isinstance(then, Mapping):
            changed += _changes(name, cast("Mapping[str, Any]", then), files)
        elif (now := hash_file(main)) not in str(then).split():
            changed.append(f"rewards.{name} ({main}): {str(then)[:12] or 'unknown'} -> {now[:12]}")
    return changed


def check_functions(config: RunConfig, identity: Mapping[str, Any], run_dir: Path) -> None:
    """Raise DriftError if a run names a function that is not the one it was started with; as changed_functions."""
    if changed := changed_functions(config, identity, run_dir):
        raise DriftError(
            f"{run_dir} names a reward function whose file is not the one that the run was started with:\n  "
            + "\n  ".join(changed)
            + "\nput that file back, or accept it for this run with `rlhf resume --accept-drift`"
        )


def module_file(name: str, folder: str | None = None) -> Path | None:
    """The file that ``import name`` would run, without running it or its packages; None if there is none.

    Args:
        name: of a module.
        folder: of the config, in which it is looked up before the working folder.
    """
    module = find_module(name, folder)
    return None if module is None else module.file


def _changes(name: str, then: Mapping[str, Any], files: Mapping[str, Path]) -> list[str]:
    """One line for each file that a function imports and that was another one, was not there, or is gone."""
    now = {label: hash_file(file) for label, file in files.items()}
    labels = sorted(now.keys() | {label for label in then if not label.endswith(DEFINES)})
    return [
        f"rewards.{name} ({files.get(label, label)}): {str(then.get(label, 'absent'))[:12]} -> "
        f"{now.get(label, 'absent')[:12]}"
        for label in labels
        if then.get(label) != now.get(label)
    ]
