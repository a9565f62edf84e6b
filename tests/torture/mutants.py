"""Mutants: bytes and JSON trees with a few things wrong, each from its own seed."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, 5e-324, "", "a", "0", "null", "../x",
    "/etc/passwd", "\x00", "\ud800".encode("utf-8", "replace").decode(), "é" * 300, "x" * 5000, [], {}, [[]], [None],
    {"": None}, {"seal": 1}, [1, "a", None], [[[[[[1]]]]]], {"a": {"b": {"c": []}}}, "inf", "nan", "1e5", "no",
)  # fmt: skip
TOKENS = (
    b"null", b"true", b"NaN", b"Infinity", b"-1", b"1e999", b"0x10", b"0o7", b"{}", b"[]", b"[[", b"}}", b'"', b"'",
    b",", b":", b": ", b"\n", b"\r\n", b"\r", b"\t", b"  ", b"- ", b"&a ", b"*a", b"!!set ", b"<<: ",
    b"---\n", b"...\n", b"|\n",
    b">-\n", b"? ", b"#", b"%YAML 1.1\n", b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800",
    b"\\u0000", b"\xe2\x80\xa8", b"9" * 400, b"~", b"@", b"`", b"=", b"1_000", b"1:30", b"2020-01-01",
    b"ARROW1", b"PAR1",
)  # fmt: skip


def mutate_bytes(random_: random.Random, data: bytes, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """The bytes with one to four changes; never the same bytes."""
    changed = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 2, 3, 4))):
        _change(random_, changed, tokens)
    if bytes(changed) == data:
        changed += b"\x01"
    return bytes(changed)


def _change(random_: random.Random, data: bytearray, tokens: Sequence[bytes]) -> None:
    size = len(data)
    at = random_.randrange(size + 1)
    end = min(size, at + random_.choice((1, 2, 4, 8, 16, 64, 256)))
    kind = random_.randrange(10)
    if kind == 0 and at < size:
        data[at] ^= 1 << random_.randrange(8)
    elif kind == 1 and at < size:
        data[at] = random_.randrange(256)
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end]
    elif kind == 4:
        data[at:at] = random_.choice(tokens)
    elif kind == 5:
        data[at:end] = random_.choice(tokens)
    elif kind == 6:
        del data[at:]
    elif kind == 7:
        number = struct.pack("<Q", random_.choice(NUMBERS))[: random_.choice((1, 2, 4, 8))]
        data[at : at + len(number)] = number
    elif kind == 8:
        start = random_.randrange(size + 1)
        data[at:end] = data[start : start + end - at]
    else:
        data[at:at] = random_.randbytes(random_.choice((1, 3, 9)))


def mutate_tree(random_: random.Random, tree: Any) -> Any:
    """A JSON tree with one to three values, keys or branches changed."""
    changed = copy.deepcopy(tree)
    for _ in range(random_.choice((1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return changed
        holder, key = random_.choice(places)
        kind = random_.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[random_.choice(("", "seal", "x", "../x", key + key, key.upper()))] = holder.pop(key)
        elif kind == 2:
            holder[key] = copy.deepcopy(random_.choice(places)[0])
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random_.choice(
                (-holder[key], holder[key] + 1, holder[key] * 1e6, str(holder[key]), [holder[key]])
            )
        else:
            holder[key] = copy.deepcopy(random_.choice(ODD))
    return changed


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in list(children):
        found.append((tree, key))
        found += _places(child)
    return found
