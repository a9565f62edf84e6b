"""Griffe extension: show Sphinx roles of docstrings, as ``:func:`name```, as plain code."""

from __future__ import annotations

import re
from typing import Any, Final

import griffe

ROLE: Final = re.compile(r":(?:func|class|data|mod|meth):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Rewrites docstrings while sources are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
