"""Small JSON files that commit something: sealed, so that damage is seen before a byte is parsed.

    {"artifact":{...},"identity":"9f2c...","seal":"0a51..."}

The seal, always the last key, is the sha256 of the same JSON without it. Any JSON reader opens the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.durable import read_file, write_file
from rlhf_core.contracts.errors import IntegrityError

MAX_BYTES: Final = 1 << 28
"""Of a record: the files of a checkpoint or bundle with their digests are the longest."""
_SEAL: Final = re.compile(rb',"seal":"([0-9a-f]{64})"\}\n\Z')


def write_record(path: Path, values: Mapping[str, Any]) -> str:
    """Write a sealed record durably and atomically; returns the sha256 of the file."""
    return write_file(path, seal(values))


def read_record(path: Path) -> dict[str, Any]:
    """The values of a sealed record, its seal checked first.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: damaged, or no record at all.
        StorageError: the disk does not give it.
    """
    return unseal(read_file(path, MAX_BYTES), origin=str(path))


def seal(values: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed record. Raises ValueError for no values, or a key named seal."""
    if not values or "seal" in values:
        raise ValueError("a record has values, and none of its own keys is named seal")
    body = canonical_json(dict(values))
    return body[:-1] + b',"seal":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def unseal(data: bytes, *, origin: str) -> dict[str, Any]:
    """The values of a sealed record. Raises IntegrityError if the seal is broken or missing."""
    found = _SEAL.search(data)
    if found is None:
        raise IntegrityError(f"{origin} is damaged or foreign: it does not end with the seal of its content")
    body = data[: found.start()] + b"}"
    if hashlib.sha256(body).hexdigest() != found[1].decode():
        raise IntegrityError(f"{origin} is damaged: its content is not what was sealed")
    return read_json(body, origin=origin)


def read_json(data: bytes, *, origin: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no NaN, no duplicate keys. Raises IntegrityError."""

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"{digits} is too large for a number")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key stands twice")
        return table

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{origin} is not valid JSON: {error}; `rlhf verify` says what of its run can be recovered"
        ) from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{origin} does not hold a JSON object")
    return cast("dict[str, Any]", value)
