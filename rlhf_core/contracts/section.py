"""The base of every section of the config, and the types that its knobs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


def _expand_home(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~/") else name


ModelName = Annotated[str, AfterValidator(_expand_home)]
"""Folder or hub id."""


def _number_fields(schema: dict[str, Any]) -> None:
    """Keep the order of the fields in their schema, as ``position``: forms go by it, and a database may lose order."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Section(BaseModel):
    """Base of all sections: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it might be a secret
        json_schema_extra=_number_fields,
    )
