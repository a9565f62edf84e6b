"""A reverse proxy on loopback as companies have them: its own certificate, a base path, and a header that lets in."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Door:
    """Where the proxy is, and what lets in."""

    url: str
    """With the base path, without a slash at its end."""
    certificate: Path
    header: tuple[str, str]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(place, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, secret


@contextlib.contextmanager
def tls_proxy(folder: Path, port: int, *, base: str, header: tuple[str, str]) -> Iterator[Door]:
    """A proxy to a server on a port of loopback, in threads of this process.

    Args:
        folder: for the certificate and its key.
        port: of the server behind it.
        base: path that it takes off, as "/prefect"; another one is not found.
        header: name and value without which it answers 403.
    """
    certificate, secret = self_signed(folder)

    class Forward(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            if self.headers.get(header[0]) != header[1]:
                self.send_error(403)
            elif not self.path.startswith(base + "/"):
                self.send_error(404)
            elif self.headers.get("Upgrade"):
                self._tunnel()
            else:
                self._answer()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            behind = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            behind.request(self.command, self.path.removeprefix(base), body, dict(self.headers.items()))
            with behind.getresponse() as answer:
                data = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            behind.close()

        def _tunnel(self) -> None:
            """A WebSocket: what either end says, until one of them ends."""
            self.close_connection = True
            lines = [f"{self.command} {self.path.removeprefix(base)} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in self.headers.items()]
            with socket.create_connection(("127.0.0.1", port)) as behind:
                behind.sendall("\r\n".join([*lines, "", ""]).encode())
                back = threading.Thread(target=_copy, args=(behind, self.connection), daemon=True)
                back.start()
                _copy(self.connection, behind)
                back.join(5)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its base's name
            """Quiet."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, secret)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: Any, client_address: Any) -> None:
            """The handshake in the request's own thread; a client that does not trust us just goes."""
            with contextlib.suppress(OSError), context.wrap_socket(request, server_side=True) as safe:
                super().finish_request(safe, client_address)

    with Server(("127.0.0.1", 0), Forward) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Door(f"https://127.0.0.1:{server.server_address[1]}{base}", certificate, header)
        finally:
            server.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
