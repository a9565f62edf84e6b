"""Prefect's temporary server ends with the process that has started it, however that ends.

Prefect ends it at the interpreter's exit, which a kill -9 never reaches: the server would keep its port, its memory and
this user's database for good.
"""

from __future__ import annotations

import subprocess
from typing import Any

from prefect.settings import PREFECT_API_URL, get_current_settings

from rlhf_core.contracts.bound_processes import start_bound


class _BoundSubprocess:
    """The module ``subprocess`` as Prefect's server module sees it: what it starts is bound to this process."""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    @staticmethod
    def Popen(args: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a server."""
        return start_bound(args, **options)


def bind_temporary_server() -> None:
    """Let a temporary server that Prefect will start end with this process. Does nothing where there will be none."""
    if PREFECT_API_URL.value() is None and get_current_settings().server.ephemeral.enabled:
        from prefect.server.api import server

        if not isinstance(server.subprocess, _BoundSubprocess):
            server.subprocess = _BoundSubprocess()
