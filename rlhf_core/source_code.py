"""Identity of Python source by what it computes: comments, docstrings, layout and the places of files do not count."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from rlhf_core.contracts.durable import read_file

_UNREAD: Final = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
"""Fields of a syntax tree that follow from the others, or that only tools read."""


def files_digest(files: Iterable[Path]) -> str:
    """sha256 over the code of some files, wherever they lie and in whatever order."""
    digests = sorted(code_digest(read_file(file).decode()) for file in files)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def code_digest(source: str) -> str:
    """sha256 over the syntax tree of a module.

    Docstrings do not count, nor where a name of this package is imported from. The form is written out here, because
    that of ``ast.dump`` changes with the version of Python.

    Raises: SyntaxError.
    """
    parts: list[str] = []
    _write(ast.parse(source), parts)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _write(node: Any, parts: list[str]) -> None:
    if isinstance(node, ast.AST):
        parts.append(f"{type(node).__name__}(")
        is_ours = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf_core"
        for name in node._fields:
            value = getattr(node, name, None)
            if value is None or value == [] or name in _UNREAD or (is_ours and name == "module"):
                continue
            parts.append(f"{name}=")
            _write(value, parts)
        parts.append(")")
    elif isinstance(node, list):
        parts.append("[")
        for item in node:
            if not _is_bare_string(item):
                _write(item, parts)
        parts.append("]")
    else:
        parts.append(f"{node!r},")


def _is_bare_string(node: Any) -> bool:
    """Whether a statement is a string alone: the docstring of a module, class, function or attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
