"""Whatever a library loads, it loads from a folder: by a name it would take the newest commit of the hub."""

from __future__ import annotations

import ast
from pathlib import Path

import rlhf_core

ROOT = Path(rlhf_core.__file__).parent
FOLDERS = ("folder", "path", "folder_of(", "place_of(", "str(folder", "str(path", "Path(", "None")
"""How an expression begins that is a folder, or no place at all where the weights are given."""


def loads(source: str) -> list[str]:
    """The first argument of each call of ``from_pretrained``."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained" and call.args
    ]


def test_no_library_is_given_a_name() -> None:
    found = {
        str(file.relative_to(ROOT)): wrong
        for file in sorted(ROOT.rglob("*.py"))
        if (wrong := [first for first in loads(file.read_text(encoding="utf-8")) if not first.startswith(FOLDERS)])
    }

    assert found == {}, "give it the folder that rlhf_core.models.hub.folder_of finds"


def test_a_name_is_seen() -> None:
    assert loads("AutoConfig.from_pretrained(name, trust_remote_code=False)") == ["name"]
