"""The files that importing a reward function runs, found by reading source text: no line of it is executed.

    team_rewards/__init__.py  →  from .politeness import score
    team_rewards/politeness.py  →  from . import lexicon; import torch
    team_rewards/lexicon.py

gives the three files of ``team_rewards``. Followed are modules of the function's own top-level package, wherever it
is installed, and modules outside of Python's library and of ``site-packages``: of the config's folder, the working
folder and ``PYTHONPATH``. Other libraries are not followed.

Limitations: a module that imports by computed names, or that changes ``sys.path``, stands for all Python files of its
package (of its folder, if it is in none). Data files that a function opens are not found.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.contracts.run_places import run_around

OWN = frozenset({"rlhf_core", "tasks", "flows"})
"""Packages of this project: their source has an entry of its own in the identity."""
MAX_SOURCE_BYTES = 4 << 20
"""A larger file is hashed and not parsed."""
_LIBRARIES = tuple(
    Path(folder).resolve() for folder in {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_COMPUTING = frozenset(
    {"spec_from_file_location", "exec_module", "SourceFileLoader", "iter_modules", "walk_packages", "run_path"}
)
"""Names of functions that load code which no import statement names."""


@dataclass(frozen=True)
class Module:
    """A module that can be imported.

    Example: ``Module("team", Path(".../team/__init__.py"), (".../team",))``
    """

    name: str
    file: Path | None
    """None of a namespace package."""
    folders: tuple[str, ...] | None
    """Where a package's modules are; None if it is no package."""

    @property
    def label(self) -> str:
        """Its file, relative to the folder it is imported from: ``team_rewards/lexicon.py``."""
        assert self.file is not None
        parts = self.name.split(".") if self.file.stem == "__init__" else self.name.split(".")[:-1]
        return "/".join([*parts, self.file.name])


def make_importable(folder: str | None) -> None:
    """Append a config's folder and the working folder to ``sys.path``, last, so that they hide no library.

    A run folder holds data: it is left out, so that no library finds a part of itself there.
    """
    for place in ([folder] if folder else []) + [str(Path.cwd())]:
        if place not in sys.path and run_around(Path(place)) is None:
            sys.path.append(place)
    importlib.invalidate_caches()


def find_module(name: str, folder: str | None = None) -> Module | None:
    """The module that ``import name`` would load, without running it or its packages; None if there is none.

    Args:
        name: dotted.
        folder: in which its top-level module is looked up before the working folder; None: nowhere else.
    """
    make_importable(folder)
    return _find(name, folder)


def imported_modules(name: str, folder: str | None = None) -> dict[str, Path]:
    """Every file of the user's own that importing a module runs, sooner or later.

    Args:
        name: of the function's module.
        folder: as in :func:`find_module`.
    Returns: label -> file, sorted; empty if there is no such module.
    """
    files: dict[str, Path] = {}
    for module in walk(name, folder):
        if module.file is not None:
            files[module.label] = module.file
            if _computes_imports(module.file):
                files |= _all_beside(module)
    return dict(sorted(files.items()))


def walk(name: str, folder: str | None = None) -> Iterator[Module]:
    """The modules that importing ``name`` loads and that are the user's own, each once."""
    make_importable(folder)
    own = name.partition(".")[0]
    is_followed: dict[str, bool] = {own: own not in sys.stdlib_module_names}
    wanted, seen = [name], set[str]()
    while wanted:
        asked = wanted.pop()
        top = asked.partition(".")[0]
        if top not in is_followed:
            found = None if top in OWN or top in sys.stdlib_module_names else _find(top, folder)
            is_followed[top] = found is not None and _is_users(found)
        if not is_followed[top]:
            continue
        ends = [at for at, sign in enumerate(asked) if sign == "."] + [len(asked)]
        for each in (asked[:end] for end in ends):
            if each not in seen:
                seen.add(each)
                if (module := _find(each, folder)) is not None:
                    yield module
                    wanted += _imports(module)


def user_modules(folder: str | None) -> list[str]:
    """Top-level modules and packages in a config's folder and the working folder."""
    places = [Path(place) for place in (folder, Path.cwd()) if place is not None]
    files = [file for place in places if place.is_dir() for file in place.glob("*.py")]
    packages = [file.parent for place in places if place.is_dir() for file in place.glob("*/__init__.py")]
    return sorted({path.stem for path in (*files, *packages)})


def is_library(file: Path) -> bool:
    """Whether a file belongs to Python or to an installed library."""
    where = file.resolve()
    return bool(_INSTALLED & set(where.parts)) or any(where.is_relative_to(library) for library in _LIBRARIES)


def stands_in(folder: str | Path, top: str) -> bool:
    """Whether a folder has a top-level module or package of this name."""
    spec = _quietly(importlib.machinery.PathFinder, top, [str(folder)])
    return spec is not None


def _find(name: str, folder: str | None) -> Module | None:
    top, *inner = name.split(".")
    spec = _find_top(top, folder)
    found = top
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        found = f"{found}.{part}"
        spec = _quietly(importlib.machinery.PathFinder, found, list(spec.submodule_search_locations))
    if spec is None:
        return None
    file = Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None
    locations = spec.submodule_search_locations
    if file is None and locations is None:  # built in
        return None
    return Module(name, file, None if locations is None else tuple(locations))


def _find_top(top: str, folder: str | None) -> importlib.machinery.ModuleSpec | None:
    spec = _first_spec(top)
    if folder is None or spec is None or spec.origin is None or Path(spec.origin).is_relative_to(folder):
        return spec
    if not stands_in(folder, top) or is_library(Path(spec.origin)) or spec.origin in ("built-in", "frozen"):
        return spec
    # another folder of the user's comes first on Python's path, as with `python -m`: the config's own comes before it
    entry = next((i for i, place in enumerate(sys.path) if Path(spec.origin).is_relative_to(place or ".")), 0)
    if folder not in sys.path:
        return spec
    sys.path.remove(folder)
    sys.path.insert(entry, folder)
    return _first_spec(top)


def _first_spec(top: str) -> importlib.machinery.ModuleSpec | None:
    """As the import system finds it, whatever has been imported under that name before."""
    for finder in sys.meta_path:
        if (spec := _quietly(finder, top, None)) is not None:
            return spec
    return None


def _quietly(finder: object, name: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    try:
        return finder.find_spec(name, path)  # type: ignore[attr-defined]
    except Exception:  # of a finder of somebody else, or a path with a zero byte in it
        return None


def _is_users(module: Module) -> bool:
    places = [module.file] if module.file is not None else [Path(folder) for folder in module.folders or ()]
    return not any(is_library(place) for place in places)


def _imports(module: Module) -> list[str]:
    """Absolute names of what a module may import, of its package and of others; also names that are no modules."""
    tree = _parsed(module.file)
    if tree is None:
        return []
    package = module.name if module.folders is not None else module.name.rpartition(".")[0]
    names: list[str] = []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names if alias.name != "*")] if base else []
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            literal = _literal(node)
            if literal is not None:
                dots = len(literal) - len(literal.lstrip("."))
                names.append(_absolute(literal.lstrip("."), dots, package))
    return names


def _absolute(name: str, level: int, package: str) -> str:
    """A name of an import statement with ``level`` dots, seen from a package."""
    if level == 0:
        return name
    parts = package.split(".") if package else []
    if level > len(parts):
        return ""
    return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])


def _computes_imports(file: Path) -> bool:
    """Whether a module imports what its source does not name."""
    tree = _parsed(file)
    for node in _statements(tree) if tree is not None else ():
        if isinstance(node, ast.Call):
            called = _called(node)
            if called in _COMPUTING or (called in ("import_module", "__import__") and _literal(node) is None):
                return True
        elif isinstance(node, ast.Attribute) and (node.attr, _name_of(node.value)) == ("path", "sys"):
            return True
    return False


def _all_beside(module: Module) -> Mapping[str, Path]:
    """Every Python file of a module's top-level package; of a module in no package, of its folder and those in it."""
    assert module.file is not None
    depth = module.name.count(".") + (module.folders is not None)
    root = module.file.parents[depth]
    top = module.name.partition(".")[0]
    if depth:
        found = (root / top).rglob("*.py")
    else:
        found = (file for pattern in ("*.py", "*/*.py") for file in root.glob(pattern))
    files = {file.relative_to(root): file for file in found if file.is_file()}
    return {label.as_posix(): file for label, file in files.items() if not _INSTALLED & set(label.parts)}


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, but for what only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and _name_of(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _called(call: ast.Call) -> str:
    return _name_of(call.func)


def _name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _literal(call: ast.Call) -> str | None:
    """The module that ``import_module("name")`` names; None if it is computed."""
    named = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "name"), None)
    return named.value if isinstance(named, ast.Constant) and isinstance(named.value, str) else None


def _parsed(file: Path | None) -> ast.AST | None:
    """The syntax tree of a source file; None of anything else, and of what is no Python."""
    if file is None or file.suffix != ".py":
        return None
    try:
        if file.stat().st_size > MAX_SOURCE_BYTES:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when it is imported
            return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
