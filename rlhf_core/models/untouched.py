"""Whether a module is still what our own passes were written for: they would not see what was built into it since."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def is_untouched(modules: Iterable[nn.Module], parameter: Tensor) -> bool:
    """Return whether no module has a hook or another forward, and the parameters are still on a CPU.

    Args:
        modules: all of a trunk's.
        parameter: one of its parameters.
    """
    return parameter.device.type == "cpu" and not any(
        module._forward_hooks or "forward" in module.__dict__ for module in modules
    )
