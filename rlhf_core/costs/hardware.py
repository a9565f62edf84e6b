"""Hardware by name: ``8xH100`` is a node of eight, ``4x8xH100`` four of them; with published peaks and bandwidths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rlhf_core.contracts.errors import UserError

NAME: Final = re.compile(r"(?:(?:(?P<nodes>\d{1,5})x)?(?P<count>\d{1,5})x)?(?P<kind>[A-Za-z][A-Za-z0-9]*)")


@dataclass(frozen=True)
class Kind:
    """One device. Peaks are without sparsity, bandwidths in one direction."""

    title: str
    memory_bytes: float
    flop_per_s: Mapping[str, float]
    """Compute type -> floating-point operations a second."""
    bytes_per_s: float
    """Of its memory."""
    link_bytes_per_s: float
    """To other devices of its node."""
    network_bytes_per_s: float
    """Of its share of the node's network."""
    source: str
    """Of these numbers."""

    @property
    def is_cpu(self) -> bool:
        """Whether two stages share it by cores, and a process by its memory."""
        return self.title.startswith("CPU")


KINDS: Final[Mapping[str, Kind]] = {
    "CPU2": Kind(
        "CPU, two cores of a shared virtual machine (AMD EPYC)",
        24e9, {"float32": 147e9}, 20e9, 0.0, 0.0,
        "peak measured by benchmarks.matmul; memory bandwidth nominal: coefficients are relative to it",
    ),
    "A100": Kind(
        "NVIDIA A100 SXM, 80 GB",
        80e9, {"float32": 19.5e12, "bfloat16": 312e12}, 2.039e12, 300e9, 25e9,
        "NVIDIA's data sheet; network of 200 Gb/s a device assumed",
    ),
    "H100": Kind(
        "NVIDIA H100 SXM, 80 GB",
        80e9, {"float32": 67e12, "bfloat16": 989e12}, 3.35e12, 450e9, 50e9,
        "NVIDIA's data sheet; network of 400 Gb/s a device assumed",
    ),
    "H200": Kind(
        "NVIDIA H200 SXM, 141 GB",
        141e9, {"float32": 67e12, "bfloat16": 989e12}, 4.8e12, 450e9, 50e9,
        "NVIDIA's data sheet; network of 400 Gb/s a device assumed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """So many nodes of so many devices of one kind."""

    nodes: int
    devices_per_node: int
    kind_name: str

    @property
    def kind(self) -> Kind:
        """What is known of a device."""
        return KINDS[self.kind_name]

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.devices_per_node

    @property
    def name(self) -> str:
        """As it is asked for."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.devices_per_node}x{self.kind_name}"

    @property
    def collective_bytes_per_s(self) -> float:
        """Of a ring over all devices: a node's network is shared by its devices, and each ring takes another one."""
        inside = self.kind.link_bytes_per_s
        return inside if self.nodes == 1 else min(inside, self.kind.network_bytes_per_s * self.devices_per_node)

    def times(self, factor: int) -> Hardware:
        """With as many times the nodes, or the devices of a single one up to eight."""
        if self.nodes == 1 and self.devices_per_node * factor <= 8:
            return Hardware(1, self.devices_per_node * factor, self.kind_name)
        return Hardware(self.nodes * factor, self.devices_per_node, self.kind_name)


def parse_hardware(text: str) -> Hardware:
    """Hardware of a name.

    Args:
        text: as ``H200``, ``8xH100`` or ``4x8xH100`` (nodes x devices x kind).
    Raises: UserError with the names that are known.
    """
    known = ", ".join(KINDS)
    found = NAME.fullmatch(text.strip())
    kind = found and next((name for name in KINDS if name.lower() == found["kind"].lower()), None)
    if found is None or kind is None:
        raise UserError(
            f"--hardware {text!r} is not known; name devices as 1xH200, 8xH100 or 4x8xH100 (nodes x devices x kind), "
            f"with one of the kinds {known}"
        )
    nodes, count = (int(found[part] or 1) for part in ("nodes", "count"))
    if nodes * count == 0:
        raise UserError(f"--hardware {text!r} is no device at all; use 1x{kind}, say")
    hardware = Hardware(nodes, count, kind)
    if hardware.kind.is_cpu and hardware.devices > 1:
        raise UserError(
            f"--hardware {text!r}: {kind} is a whole machine, and several of them are not modelled; use 1x{kind}"
        )
    return hardware
