"""Reading, overriding, printing and naming a config.

YAML 1.2 by ruamel: ``1e-5`` is a number, ``no`` stays text, duplicate keys are refused; aliases and files
above 1 MiB are refused here. Every problem of a config is reported at once, by field.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent

from rlhf_core.contracts import execution_config, generation_config
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_mistakes import sentences
from rlhf_core.contracts.config_places import functions_located, located, lookup_folders
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import RewardConfig

MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 20_000
"""Keys and values: a second of reading; the longest config of this project has 600."""
_REMEDIES = {
    r"found character '\t'": "; indent with spaces, not with tabs",
    "mapping values are not allowed": "; put a value that holds a colon and a space in quotes, and a key on a line of "
    "its own",
    "expected <block end>": "; look at how far that line and those above it are indented",
    "found undefined": "; put text that holds a backslash in single quotes",
    "unknown escape": "; put text that holds a backslash in single quotes",
}
"""Part of what the YAML reader says -> what to do about it."""


class _PlainConstructor(SafeConstructor):
    """JSON's types alone: a date stays text; binary, set and omap are refused."""


_PlainConstructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)
for _kind in ("binary", "set", "omap", "pairs"):
    _PlainConstructor.add_constructor(f"tag:yaml.org,2002:{_kind}", SafeConstructor.construct_undefined)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply ``a.b=c`` overrides, and make relative paths absolute.

    Paths in the file are looked up in its folder, then in the working folder; those of overrides the other way round.

    Args:
        path: YAML (or JSON) file; an empty file gives all defaults.
        overrides: ``dotted.key=value``, later ones win; numbers in the key reach into lists.
    Raises:
        UserError: the file or an override is unreadable, or the values are refused; all problems at once.
    """
    tree = parse_yaml(_read_text(path), origin=str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"--config {path} holds a {type(tree).__name__}; a mapping of sections is needed")
    folders = lookup_folders(path)
    values = _with_overrides(located(cast("dict[str, Any]", tree), folders), overrides)
    return _validated(functions_located(located(values, folders[::-1]), folders))


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a plain tree, with overrides applied. Raises UserError with every problem."""
    return _validated(_with_overrides(tree, overrides))


def _with_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values = cast("dict[str, Any]", copy.deepcopy(tree))
    for override in overrides:
        _apply_override(values, override)
    return values


def _validated(values: dict[str, Any]) -> RunConfig:
    try:
        values = cast("dict[str, Any]", json.loads(json.dumps(values)))  # joins the surrogate pairs that YAML leaves
        json.dumps(values, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"the config holds what is not plain JSON: {error}") from None
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(*sentences(error)) from None


def parse_yaml(text: str, *, origin: str) -> Any:
    """Parse one YAML 1.2 document strictly. Raises UserError naming ``origin`` and the place."""
    yaml = YAML(typ="safe", pure=True)
    try:
        depth = 0
        for number, event in enumerate(cast("Iterator[Any]", yaml.parse(text))):
            if number > MAX_VALUES:
                raise UserError(
                    f"{origin} holds more than {MAX_VALUES} keys and values; leave out what is not a config"
                )
            if isinstance(event, DocumentStartEvent) and event.explicit and (event.version or event.tags):
                raise UserError(
                    f"{origin} begins with a YAML directive (%YAML or %TAG), which changes what its words mean; "
                    "leave it out"
                )
            if isinstance(event, AliasEvent):
                raise UserError(f"{origin} uses a YAML alias (*name), which is not accepted; write the value out")
            depth += type(event).__name__.endswith("StartEvent")
            depth -= type(event).__name__.endswith("EndEvent")
            if depth > MAX_DEPTH:
                raise UserError(f"{origin} is nested more than {MAX_DEPTH} levels deep")
        loader = YAML(typ="safe", pure=True)
        loader.Constructor = _PlainConstructor
        return loader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = (error.problem or "not valid YAML").split("\n")[0].strip()
        remedy = next((remedy for part, remedy in _REMEDIES.items() if part in problem), "")
        raise UserError(f"{origin} is not valid YAML{place}: {problem}{remedy}") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{origin} is not valid YAML: {str(error).splitlines()[0]}") from None


def config_digest(config: RunConfig) -> str:
    """Identity of a config: sha256 of its canonical JSON, but for the knobs that change no number."""
    numberless: dict[str, Any] = dict.fromkeys(("tracking", "frozen_models", "guards", "artifacts"), True)
    numberless["execution"] = set(execution_config.NUMBERLESS)
    numberless["reward"] = {"components": {"__all__": {"folder"}}}  # a function's files have an entry of their own
    numberless["generation"] = {"vllm": set(generation_config.NUMBERLESS)}
    return digest_json(config.model_dump(exclude=numberless))


def canonical_json(value: Any) -> bytes:
    """Sorted, compact, NaN-free JSON: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def digest_json(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def config_template(config: RunConfig | None = None) -> str:
    """Every knob with its default (or the value in ``config``) and its documentation, as YAML."""
    out = io.StringIO()
    out.write("# rlhf-flow: every knob, with its default. Lines may be left out.\n")
    shown = config or RunConfig(reward={"components": [{"kind": "model"}]})  # pyright: ignore[reportArgumentType]
    _write_section(out, shown, indent=0, show_kinds=config is None)
    return out.getvalue()


def flat_params(config: RunConfig) -> dict[str, Any]:
    """``section.key`` -> value, lists flattened by index: what MLflow shows as params."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, child in cast("dict[str, Any]", value).items():
                yield from walk(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, child in enumerate(cast("list[Any]", value)):
                yield from walk(f"{prefix}.{index}", child)
        else:
            yield prefix, value

    return dict(walk("", config.model_dump()))


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"--config {path} is a folder; {_files_in(path)}")
    if not path.is_file():
        beside = {p.stem: p for p in _config_files(path.parent)}
        close = difflib.get_close_matches(path.stem, beside, n=1)
        hint = f"did you mean {beside[close[0]]}?" if close else f"`rlhf config > {path}` writes a template"
        raise UserError(f"--config {path} is not a file; {hint}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"--config {path} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 text (byte {error.start})") from None


def _files_in(folder: Path) -> str:
    if (folder / "run.json").is_file():
        return f"it holds a run, which goes on by `rlhf resume {folder}`; give a YAML file to start another one"
    files = _config_files(folder)
    if files:
        return f"name a file in it: {', '.join(map(str, files[:5]))}{', …' if len(files) > 5 else ''}"
    return f"`rlhf config > {folder / 'config.yaml'}` writes a template"


def _config_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml", ".json") and p.is_file())


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    key = key.strip()
    if not sign or not key:
        raise UserError(f"--set {override!r} is not of the form section.key=value")
    parts = key.split(".")
    node: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[: depth + 1])
        value = parse_yaml(text, origin=f"--set {key}") if last else {}
        if isinstance(node, list):
            items = cast("list[Any]", node)
            if not part.isdecimal() or int(part) > len(items):
                raise UserError(f"--set {key}: {where} does not exist; the list has {len(items)} items (from 0)")
            if int(part) == len(items):
                items.append(value)
            elif last:
                items[int(part)] = value
            node = items[int(part)]
        elif isinstance(node, dict):
            table = cast("dict[str, Any]", node)
            if last:
                table[part] = value
            elif table.get(part) is None:
                table[part] = [] if parts[depth + 1].isdecimal() else {}
            node = table[part]
        else:
            raise UserError(f"--set {key}: {'.'.join(parts[:depth])} is {node!r}, which has no keys")


def _write_section(
    out: io.StringIO, section: BaseModel, indent: int, *, first: str = "", show_kinds: bool = False
) -> None:
    pad = " " * indent
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lead, first = (first or pad), ""
        comment = f"  # {field.description}" if field.description else ""
        if isinstance(value, BaseModel):
            doc = (type(value).__doc__ or "").split("\n")[0]
            out.write(f"{'' if indent else chr(10)}{lead}{name}:  # {doc}\n")
            _write_section(out, value, indent + 2, show_kinds=show_kinds)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            out.write(f"{lead}{name}:{comment}\n")
            for item in cast("list[BaseModel]", value):
                _write_section(out, item, indent + 4, first=f"{pad}  - ")
            if show_kinds:
                _write_other_kinds(out, type(value[0]), pad)
        else:
            choices = _choices(field.annotation)
            comment = f"  # {choices}: {field.description or ''}".rstrip(": ") if choices else comment
            out.write(f"{lead}{name}: {_scalar(value)}{comment}\n")
        assert field.default is not PydanticUndefined, f"{name} has no default"


def _write_other_kinds(out: io.StringIO, shown: type[BaseModel], pad: str) -> None:
    """Components of the kinds that are not shown, commented out."""
    for kind in RewardConfig.KINDS.values():
        if kind is not shown:
            example = io.StringIO()
            _write_section(example, kind(), indent=2, first="- ")
            out.write("".join(f"{pad}  # {line}" for line in example.getvalue().splitlines(keepends=True)))


def _choices(annotation: Any) -> str:
    members = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, str)]
    return " | ".join(members) if len(members) > 1 else ""


def _scalar(value: Any) -> str:
    return "null" if value is None else json.dumps(value)
