"""Reference pages of the documentation, written from the code at build time.

``docs/prepare.py`` puts a text where the page has its mark, ``<!-- generated: config -->``.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlhf_core.contracts import errors, schemas, stage_graph
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.metric_meanings import METRIC_MEANINGS

CONFIG_HEAD = ["| knob | default | meaning |", "|---|---|---|"]


def config() -> str:
    """A table of knobs for each section of the config: name, default, meaning."""
    top = [_row(n, f) for n, f in RunConfig.model_fields.items() if not _models(f.annotation)]
    parts = [_table("run", RunConfig.__doc__ or "", top)]
    for name, field in RunConfig.model_fields.items():
        parts += [_table(name, m.__doc__ or "", list(_rows(m, f"{name}."))) for m in _models(field.annotation)]
    return "\n\n".join(parts)


def _table(name: str, about: str, rows: list[str]) -> str:
    return "\n".join([f"## {name}", "", about.splitlines()[0].rstrip(".") + ".", "", *CONFIG_HEAD, *rows])


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
    return f"| `{name}` | {_shown(field)} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


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
    """Sections inside an annotation, through lists, unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    is_container = get_origin(annotation) in (list, Union, types.UnionType) or hasattr(annotation, "__metadata__")
    return [m for part in get_args(annotation) for m in _models(part)] if is_container else []


def metrics() -> str:
    """A row for each metric."""
    rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in METRIC_MEANINGS.items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows])


def artifacts() -> str:
    """A table of columns for each stage's artifact; the meaning is the comment beside the column."""
    comments = _column_comments(Path(schemas.__file__).read_text(encoding="utf-8"))
    parts: list[str] = []
    for stage, schema in stage_graph.SCHEMAS.items():
        known = comments[stage.upper()]
        rows = [f"| `{f.name}` | `{_arrow_type(f.type)}` | {_cell(known.get(f.name, ''))} |" for f in schema]
        head = [f"### {stage_graph.FILE_STEMS[stage]}.arrow", "", f"Written by `{stage}`.", ""]
        parts.append("\n".join([*head, "| column | type | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _arrow_type(kind: Any) -> str:
    return str(kind).replace("item: ", "").replace(" not null", "")


def _column_comments(source: str) -> Mapping[str, Mapping[str, str]]:
    """Name of a schema's constant -> column -> the comment on its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    on_line = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            columns = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == "_required"]
            found[node.target.id] = {
                ast.literal_eval(call.args[0]): on_line[call.lineno] for call in columns if call.lineno in on_line
            }
    return found


def cli() -> str:
    """Every command with its arguments and options."""
    import typer

    from flows.cli import PANELS, app

    commands: Any = typer.main.get_command(app)
    parts: list[str] = []
    for panel, functions in PANELS.items():
        parts.append(f"## {panel}")
        parts += [_command(commands.commands[function.__name__.replace("_", "-")]) for function in functions]
    return "\n\n".join(parts)


def _command(command: Any) -> str:
    import typer

    about = inspect.cleandoc(command.help or "").split("\f")[0].strip()
    context = typer.Context(command, info_name=command.name)
    usage = " ".join(["rlhf", command.name, *command.collect_usage_pieces(context)])
    records = [record for p in command.params if (record := p.get_help_record(context)) is not None]
    rows = [f"| `{names}` | {_cell(' '.join(said.split()))} |" for names, said in records]
    table = ["", "| argument | meaning |", "|---|---|", *rows] if rows else []
    return "\n".join([f"### rlhf {command.name}", "", about, "", "```text", usage, "```", *table])


def error_classes() -> str:
    """Every deliberate error with its base and its meaning."""
    found = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RlhfError) and value.__module__ == errors.__name__
    ]
    rows = [f"| `{e.__name__}` | `{e.__base__.__name__}` | {_cell(_summary(e))} |" for e in found if e.__base__]
    return "\n".join(["| error | base | meaning |", "|---|---|---|", *rows])


def _summary(value: type) -> str:
    return inspect.cleandoc(value.__doc__ or "").split("\n\n")[0]


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "config": config,
    "metrics": metrics,
    "artifacts": artifacts,
    "cli": cli,
    "errors": error_classes,
}
"""Word of the mark -> what writes the text."""
