"""Safetensors files whose headers lie, and indexes that name what is not there."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from iteration import tiny_tree
from tiny_world import Tiny, tiny_in

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.preflight import preflight
from rlhf_core.preflight.probe import Loaded, probe

FIRST, SECOND = "transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight"
TOP = 1 << 30


@pytest.fixture
def world(tiny: Tiny, tmp_path: Path) -> Tiny:
    shutil.copytree(tiny.root, tmp_path / "world")
    return tiny_in(tmp_path / "world")


def check(world: Tiny) -> None:
    """What `rlhf check` does with the folder."""
    config = build_config(tiny_tree(world))
    probe(config, preflight(config), Loaded())


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a file, and leave its numbers alone."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def set_to(key: str, **values: Any) -> Callable[[dict[str, Any]], object]:
    """An entry of a header that is to be changed."""
    return lambda header: header.setdefault(key, {}).update(values)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "beyond the file": (set_to(FIRST, data_offsets=[0, TOP]), "no safetensors file"),
    "over another one": (lambda h: h[FIRST].update(data_offsets=h[SECOND]["data_offsets"]), "no safetensors file"),
    "below zero": (set_to(FIRST, data_offsets=[-4, 4]), "no safetensors file"),
    "backwards": (lambda h: h[FIRST]["data_offsets"].reverse(), "no safetensors file"),
    "another shape": (set_to(FIRST, shape=[3, 96]), "no safetensors file"),
    "more than any memory": (set_to(FIRST, shape=[TOP, TOP, TOP]), "no safetensors file"),
    "another type": (set_to(FIRST, dtype="F64"), "no safetensors file"),
    "a type of nobody": (set_to(FIRST, dtype="Q9"), "no safetensors file"),
    "whole numbers": (set_to(FIRST, dtype="I32"), rf"{FIRST} as whole numbers \(I32\)"),
    "a hole": (lambda h: h.pop(FIRST), "no safetensors file"),
    "a path as name": (lambda h: h.update({"../../passwd": h.pop(FIRST)}), f"lacks 1 weights .* {FIRST}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header(lie: str, world: Tiny) -> None:
    change, said = LIES[lie]
    rewrite(world.policy / "model.safetensors", change)
    with pytest.raises(UserError, match=said):
        check(world)


@pytest.mark.parametrize("told", [0, 100 << 20, 1 << 63])
def test_a_header_of_a_length_that_is_none(told: int, world: Tiny) -> None:
    (world.policy / "model.safetensors").write_bytes(struct.pack("<Q", told) + b"{}")
    with pytest.raises(UserError, match="no safetensors file"):
        check(world)


def test_a_name_that_stands_twice_in_a_header_is_told_or_read_once(world: Tiny) -> None:
    file = world.policy / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = json.loads(header)[SECOND]
    raw = f'{header[:-1]},"{FIRST}":{json.dumps(entry)}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    with pytest.raises(UserError, match="no safetensors file"):
        check(world)


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("../../../../etc/passwd", "a shard is a .* file of that folder"),
        ("/etc/passwd", "a shard is a .* file of that folder"),
        ("more/model.safetensors", "a shard is a .* file of that folder"),
        (["model.safetensors"], "a shard is a .* file of that folder"),
        ("model-00002-of-00002.safetensors", "lacks 1 of the 1 shards"),
    ],
)
def test_an_index(shard: Any, said: str, world: Tiny) -> None:
    (world.policy / "model.safetensors").rename(world.policy / "model-00001-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {FIRST: shard}}
    (world.policy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=said):
        check(world)
