"""Names of hardware, and what they stand for."""

from __future__ import annotations

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.costs.hardware import KINDS, Hardware, parse_hardware


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "kind"),
    [("H200", 1, 1, "H200"), ("1xH200", 1, 1, "H200"), ("8xh100", 1, 8, "H100"), ("4x8xH100", 4, 8, "H100"),
     ("cpu2", 1, 1, "CPU2"), (" 2x1xA100 ", 2, 1, "A100")],
)  # fmt: skip
def test_a_name_is_nodes_devices_kind(text: str, nodes: int, devices: int, kind: str) -> None:
    assert parse_hardware(text) == Hardware(nodes, devices, kind)


@pytest.mark.parametrize("text", ["", "8xB9000", "H100x8", "x8xH100", "2x2x2xH100", "8 x H100", "-1xH100"])
def test_an_unknown_name_is_told_the_known_ones(text: str) -> None:
    with pytest.raises(UserError) as told:
        parse_hardware(text)
    (sentence,) = told.value.problems
    assert all(part in sentence for part in (repr(text), "4x8xH100", *KINDS))


def test_there_is_at_least_one_device_and_one_such_cpu() -> None:
    with pytest.raises(UserError, match="no device at all; use 1xH100"):
        parse_hardware("0xH100")
    with pytest.raises(UserError, match="use 1xCPU2"):
        parse_hardware("2xCPU2")


def test_a_ring_over_nodes_is_as_fast_as_a_nodes_network() -> None:
    """H100: 450 GB/s in a node; eight network cards of 50 GB/s each, but never more than the links give."""
    assert parse_hardware("8xH100").collective_bytes_per_s == 450e9
    assert parse_hardware("4x8xH100").collective_bytes_per_s == 400e9
    assert parse_hardware("4x1xH100").collective_bytes_per_s == 50e9


def test_more_fills_a_node_first() -> None:
    assert parse_hardware("4xH100").times(2).name == "8xH100"
    assert parse_hardware("8xH100").times(2).name == "2x8xH100"
    assert parse_hardware("2x4xH100").times(2).name == "4x4xH100"
