"""A small faulty HTTP proxy on loopback, a process of its own: what can go wrong between a client and a server.

    python tests/torture/proxy.py PORT UPSTREAM_PORT FAULT [SEED]

Each request meets the fault with a seeded chance, so that any sequence of good and bad ones happens.

    none      the answer of the server
    errors    HTTP 500, and nothing was done
    busy      HTTP 503, as of a server whose sqlite is locked; nothing was done
    lost      done, and the connection breaks before the answer
    late      given to the server only when the client has given up: a commit after the client's next try, perhaps
    hang      accepted, and never answered; nothing was done
    slow      done, and answered after half a second
    garbage   HTTP 200 with the page of somebody else
    mixed     any of them
"""

from __future__ import annotations

import http.client
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHANCE = 0.3
"""Of a fault, a request; ``hang`` and ``slow`` meet every one."""
LATE_S, SLOW_S, HANG_S = 2.5, 0.5, 600.0
FAULTS = ("errors", "lost", "late", "hang", "slow", "garbage")


class Proxy(ThreadingHTTPServer):
    """Forwards to a server on loopback."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, upstream: int, fault: str, seed: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.upstream, self.fault = upstream, fault
        self._random, self._lock = random.Random(seed), threading.Lock()

    def fault_of_request(self) -> str:
        """What the next request meets."""
        with self._lock:
            if self.fault in ("none", "hang", "slow"):
                return self.fault
            if self._random.random() >= CHANCE:
                return "none"
            return self._random.choice(FAULTS) if self.fault == "mixed" else self.fault


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle_one_request(self) -> None:
        """As the base does, for every method."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self._serve()
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Say nothing."""

    def _serve(self) -> None:
        body = self._body()
        fault = self.server.fault_of_request()
        if fault == "hang":
            time.sleep(HANG_S)
        elif fault == "errors":
            self._answer(500, {"Content-Type": "text/plain"}, b"on purpose")
        elif fault == "busy":
            self._answer(503, {"Content-Type": "application/json"}, b'{"exception_message": "Service Unavailable"}')
        elif fault == "garbage":
            self._answer(200, {"Content-Type": "text/html"}, b"<html>please log in</html>")
        elif fault == "late":
            time.sleep(LATE_S)
            self._forward(body)
            self.close_connection = True
        elif fault == "lost":
            self._forward(body)
            self.close_connection = True
        else:
            if fault == "slow":
                time.sleep(SLOW_S)
            self._answer(*self._forward(body))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        dropped = ("connection", "transfer-encoding", "content-length", "accept-encoding")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            found = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
            return answer.status, found, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Quiet(Proxy):
    """A client that has gone is no news."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    port, upstream, fault, *seed = sys.argv[1:]
    Quiet(int(port), int(upstream), fault, int(*seed or [0])).serve_forever()
