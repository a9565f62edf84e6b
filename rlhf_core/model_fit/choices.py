"""Values of a config with the reason of each, and the YAML that a person reads."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rlhf_core.contracts.config import RunConfig

WIDTH: Final = 80
"""Columns of what is printed."""


@dataclass(frozen=True)
class Choice:
    """A value of a config, and why it was chosen.

    Example: ``Choice("policy.lora.rank", 16, "…")``
    """

    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Fit:
    """A config for a model."""

    title: str
    """One line on the model: its type, size, context and the machine."""
    choices: list[Choice]
    config: RunConfig | None
    """As checked; None where prompts are still to be named."""

    def to_yaml(self) -> str:
        """Return the config as YAML, a reason above each value."""
        lines = textwrap.wrap(self.title, WIDTH, initial_indent="# ", subsequent_indent="# ")
        open_sections: list[str] = []
        for choice in _in_sections(self.choices):
            *sections, name = choice.field.split(".")
            same = next(
                (i for i, (a, b) in enumerate(zip(open_sections, sections, strict=False)) if a != b),
                min(len(open_sections), len(sections)),
            )
            lines += [f"{'  ' * depth}{sections[depth]}:" for depth in range(same, len(sections))]
            open_sections = sections
            indent = "  " * len(sections)
            is_float = isinstance(choice.value, float)
            value = number(choice.value) if is_float else json.dumps(choice.value, ensure_ascii=False)
            lines += textwrap.wrap(choice.reason, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(f"{indent}{name}: {value}")
        return "\n".join(lines) + "\n"


def _in_sections(choices: Sequence[Choice]) -> list[Choice]:
    """Choices in their order, those of a section together, plain values before its inner sections."""
    order = list(dict.fromkeys(choice.field.split(".")[0] for choice in choices))
    return sorted(choices, key=lambda choice: (order.index(choice.field.split(".")[0]), choice.field.count(".")))


def tree_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the choices as a nested mapping, as YAML would be read."""
    tree: dict[str, Any] = {}
    for choice in choices:
        *sections, name = choice.field.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = choice.value
    return tree


def number(value: float) -> str:
    """Return a number as short as YAML reads it: 3e-4, 0.05."""
    return f"{value:g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.0e}".replace("e-0", "e-")
