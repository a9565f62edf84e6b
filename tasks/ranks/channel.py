"""What a run's process and its ranks say to each other: lines of JSON over a socket.

    to a rank      {"do": "update", "iteration": 3, "run": {...}, ...}, at last {"do": "end"}
    from a rank    {"rank": 1, "of": 2, "pid": 4711, "host": "node0", "key": "..."}   first
                   {"alive": true}                                                      each second
                   {"done": {...}}  or  {"failed": "NumericalError", "problems": [...]}

Files carry everything else. Who has not the key, which the environment of the first node's ranks has, is not heard.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

ADDRESS, KEY = "RLHF_RANKS_ADDRESS", "RLHF_RANKS_KEY"
"""Names of environment variables of the ranks on the run's node."""
ALIVE_S = 1.0
"""How often a rank says that it is there."""
MAX_BYTES = 1 << 26
"""Of a message: beyond any update's statistics."""


class Channel:
    """One end of a connection. Any thread may send, one may receive.

    Args:
        connection: a connected socket.
        timeout_s: of everything that waits for the other end; None: for ever.
    """

    def __init__(self, connection: socket.socket, timeout_s: float | None = None) -> None:
        connection.settimeout(timeout_s)
        self._socket, self._lock, self._rest = connection, threading.Lock(), b""

    def fileno(self) -> int:
        """Of the socket, to wait for it."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError if nobody is there any more."""
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has come since: waits for a part of a message at least. Raises EOFError where nobody is left."""
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data or len(self._rest) > MAX_BYTES:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def receive_one(self, within_s: float | None = None) -> dict[str, Any]:
        """The next message, where the other end waits for an answer before it says more.

        Args:
            within_s: seconds for the whole message, however its bytes come, after which TimeoutError is raised; None:
                for ever.
        Raises: EOFError, OSError.
        """
        until = None if within_s is None else time.monotonic() + within_s
        before = self._socket.gettimeout()
        try:
            while True:
                if until is not None:
                    if (left := until - time.monotonic()) <= 0:
                        raise TimeoutError(f"no whole message within {within_s:g} s")
                    self._socket.settimeout(left)
                if messages := self.receive():
                    return messages[0]
        finally:
            self._socket.settimeout(before)

    def close(self) -> None:
        """The other end hears of it."""
        self._socket.close()
