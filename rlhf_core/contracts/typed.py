"""From plain JSON to a dataclass, each value of the type that the class declares: the last check of a record."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def typed(kind: type[Record], values: object) -> Record:
    """A dataclass of plain values, nested ones included.

    Args:
        kind: a dataclass of numbers, texts, mappings, sequences, and such classes.
        values: its fields, as JSON has them; those with a default may be left out.
    Raises: ValueError that names the first field that is unknown, missing or of another type.

    Example: ``typed(Cursor, {"epoch": 0, "position": 8})`` is ``Cursor(0, 8)``
    """
    return cast("Record", _build(kind, values, kind.__name__))


def _build(kind: type[Any], values: object, place: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{place} is a {type(values).__name__}, not an object")
    table = cast("dict[str, object]", values)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(table.keys() - fields.keys()):
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in table:
            raise ValueError(f"{place}.{name} is missing")
    hints = _hints(kind)
    return kind(**{name: _value(hints[name], value, f"{place}.{name}") for name, value in table.items()})


def _value(hint: Any, value: object, place: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(cast("type[Any]", hint), value, place)
    if origin in (Union, types.UnionType):
        present = next(h for h in inner if h is not type(None))
        return None if value is None else _value(present, value, place)
    if origin is Mapping and isinstance(value, dict):
        return {k: _value(inner[1], v, f"{place}.{k}") for k, v in cast("dict[str, object]", value).items()}
    if origin in (Sequence, list, tuple) and isinstance(value, list):
        items = [_value(inner[0], v, place) for v in cast("list[object]", value)]
        return tuple(items) if origin is tuple else items
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_float = hint is float and is_number and math.isfinite(cast("float", value))
    is_int = hint is int and is_number and isinstance(value, int)
    if hint is Any or is_float or is_int or (hint in (str, bool) and isinstance(value, hint)):
        return value
    raise ValueError(f"{place} is {str(value)[:40]!r}, which is not {getattr(hint, '__name__', hint)}")


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)
