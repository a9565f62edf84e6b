"""Relative paths of a config: looked up in the folder of its file, then in the working folder.

What is found becomes an absolute path, so that the run folder names places that work from anywhere. What is found in
neither stays as it is: it may be the id of a model or dataset of the hub.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.errors import UserError

_SECTIONS: Final = ("prompts", "policy", "reference", "reward")
_PLACES: Final[Mapping[str, Callable[[Path], bool]]] = {
    "source": Path.exists,
    "model": Path.is_dir,
    "adapter": Path.is_dir,
    "tokenizer": Path.is_dir,
    "chat_template": Path.is_file,
}
"""Keys of those sections that name a file or folder -> what has to be there."""
_NAMED: Final = re.compile(
    r"(?:prompts|policy|reference|reward)\.[\w.]+ (?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
)
_POINT: Final = re.compile(r" \(at [^()]+\)$")
"""End of a sentence about some points of a sweep."""
_NO_MODULE: Final = "neither installed nor in the working folder"


def located(tree: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """A config's tree with absolute paths where one of the folders has what a relative path names.

    Args:
        tree: as it is read; values of any type.
        folders: absolute; the first one that has it counts.
    """

    def walk(value: Any) -> None:
        if isinstance(value, list):
            for child in cast("list[Any]", value):
                walk(child)
        elif isinstance(value, dict):
            section = cast("dict[Any, Any]", value)
            for key, child in section.items():
                if key in _PLACES and isinstance(child, str):
                    section[key] = _found(child, folders, _PLACES[key]) or child
                elif key != "params":  # of a reward function: its own
                    walk(child)

    changed = cast("dict[str, Any]", copy.deepcopy(tree))
    for section in _SECTIONS:
        walk(changed.get(section))
    return changed


def functions_located(tree: dict[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """The tree with the folder of each reward function's module, where one of the folders has that module.

    ``rewards/my_reward.py:score``, a path, becomes ``my_reward:score`` in the folder ``rewards``.
    """
    reward: Any = tree.get("reward")
    components: Any = reward.get("components") if isinstance(reward, dict) else None
    for component in cast("list[Any]", components) if isinstance(components, list) else []:
        name = component.get("function") if isinstance(component, dict) else None
        if isinstance(name, str):
            _locate_function(component, name, folders)
    return tree


@contextlib.contextmanager
def naming_places(config: Path | None) -> Iterator[None]:
    """Say in a UserError where a relative path of a config was looked for.

    Args:
        config: its file; None: there is none.
    """
    try:
        yield
    except UserError as error:
        if config is None:
            raise
        folders = lookup_folders(config)
        raise UserError(*(_with_places(problem, folders) for problem in error.problems)) from error.__cause__


def lookup_folders(config: Path) -> list[Path]:
    """The folder of a config's file, then the working folder; absolute, and one of them if they are the same."""
    return list(dict.fromkeys([_absolute(config).parent, Path.cwd()]))


def _found(name: str, folders: Sequence[Path], is_there: Callable[[Path], bool]) -> str | None:
    """Absolute path of what a relative one names; None if it is nowhere, absolute already, or no path."""
    if not _is_relative(name):
        return None
    for folder in folders:
        path = _absolute(folder / name)
        with contextlib.suppress(OSError, ValueError):
            if is_there(path):
                return str(path)
    return None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - links stay: their target may be replaced


def _is_relative(name: str) -> bool:
    return bool(name.strip()) and not (
        name.startswith(("/", "~")) or "://" in name or re.search(r"[\n\0]|\{[{%]", name)
    )


def _locate_function(component: dict[str, Any], name: str, folders: Sequence[Path]) -> None:
    folder: Any = component.get("folder")
    if isinstance(folder, str) and _is_relative(folder):
        component["folder"] = folder = _found(folder, folders, Path.is_dir) or folder
    if isinstance(folder, str):
        folders = [Path(folder)]
    file, sign, path = name.partition(":")
    if file.endswith(".py") and sign:
        found = _found(file, folders, Path.is_file) or (file if Path(file).is_absolute() else None)
        if found is not None:
            component["function"], component["folder"] = _as_module(Path(found), path)
        return
    parts = file.split(".")
    if folder is None and sign and all(part.isidentifier() for part in parts):
        has_it = next((each for each in folders if _has_module(each, parts)), None)
        if has_it is not None:
            component["folder"] = str(has_it)


def _as_module(file: Path, function: str) -> tuple[str, str]:
    """(module:function, folder) of a Python file: of a package's file, the package is part of its name."""
    folder, parts = file.parent, [file.stem]
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        folder, parts = folder.parent, [folder.name, *parts]
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return f"{'.'.join(parts)}:{function}", str(folder)


def _has_module(folder: Path, parts: Sequence[str]) -> bool:
    path = folder.joinpath(*parts)
    try:
        compiled = any(path.parent.glob(f"{path.name}.*.so"))
        return path.with_name(f"{path.name}.py").is_file() or (path / "__init__.py").is_file() or compiled
    except OSError:
        return False


def _with_places(problem: str, folders: Sequence[Path]) -> str:
    beside, *working = folders
    where = [f"{beside} (the config's folder)", *(f"{folder} (the working folder)" for folder in working)]
    if not working:
        where = [f"{beside} (the folder of the config, and the working folder)"]
    if _NO_MODULE in problem:
        return problem.replace(_NO_MODULE, f"neither installed nor in {' nor in '.join(where)}")
    named = _NAMED.match(problem)
    if named is None or named[0].split(" ")[0].rpartition(".")[2] not in _PLACES:
        return problem
    value = ast.literal_eval(named["value"])
    if not _is_relative(value) or _found(value, folders, Path.exists):
        return problem
    at = _POINT.search(problem)
    end = at.start() if at else len(problem)
    return f"{problem[:end]}; looked for in {' and in '.join(where)}{problem[end:]}"
