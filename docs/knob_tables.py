"""Writes the README's tables of knobs from the config tree, between the two marks.

python docs/knob_tables.py
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlhf_core.contracts.config import RunConfig

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- knobs: written by docs/knob_tables.py -->", "<!-- end of knobs -->"


def tables() -> str:
    """A table a section: knob, default, meaning."""
    top = [(n, f) for n, f in RunConfig.model_fields.items() if not _models(f.annotation)]
    parts = [_table("run", RunConfig.__doc__ or "", [_row(n, f) for n, f in top])]
    parts += [
        _table(name, model.__doc__ or "", list(_rows(model, f"{name}.")))
        for name, field in RunConfig.model_fields.items()
        for model in _models(field.annotation)
    ]
    return "\n".join(parts)


def _table(name: str, about: str, rows: list[str]) -> str:
    head = f"<details><summary><code>{name}</code>: {about.splitlines()[0].rstrip('.')}</summary>"
    return "\n".join([head, "", "| knob | default | meaning |", "|---|---|---|", *rows, "", "</details>", ""])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        children = _models(field.annotation)
        in_list = get_origin(field.annotation) is list
        for child in children:
            kind = child.model_fields["kind"].default if "kind" in child.model_fields and len(children) > 1 else None
            place = f"{prefix}{name}.N" if in_list else f"{prefix}{name}"
            yield from _rows(child, f"{place}({kind})." if kind and in_list else f"{place}.")
        if not children:
            yield _row(f"{prefix}{name}", field)


def _row(name: str, field: Any) -> str:
    choices = _choices(field.annotation)
    meaning = " · ".join(part for part in (choices, field.description) if part) or "—"
    return f"| `{name}` | {_shown(field)} | {meaning.replace('|', chr(92) + '|')} |"


def _shown(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return "a section"
    plain = default is None or isinstance(default, bool | list | dict) or default == ""
    return f"`{json.dumps(default) if plain else default}`"


def _choices(annotation: Any) -> str:
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal and len(get_args(part)) > 1:
            return ", ".join(f"`{choice}`" for choice in get_args(part))
    return ""


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections inside an annotation, through lists, unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    is_container = get_origin(annotation) in (list, Union, types.UnionType) or hasattr(annotation, "__metadata__")
    return [m for part in get_args(annotation) for m in _models(part)] if is_container else []


def rewritten() -> str:
    """The README with fresh tables."""
    head, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return f"{head}{BEGIN}\n{tables()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(rewritten(), encoding="utf-8")
