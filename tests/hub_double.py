"""A stand-in for the Hugging Face hub: repositories of whole folders, by commit, over HTTP or as a filled cache.

It answers what huggingface_hub and `datasets` ask for public repositories: what a revision is, what a commit holds,
and the files themselves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

A, B = "a" * 40, "b" * 40
"""Two commits."""


@dataclass
class Hub:
    """What the hub has: ``models/owner/name`` -> commit -> folder, and where each branch is."""

    commits: dict[str, dict[str, Path]] = field(default_factory=dict[str, "dict[str, Path]"])
    branches: dict[str, dict[str, str]] = field(default_factory=dict[str, "dict[str, str]"])
    asked: list[str] = field(default_factory=list[str])
    """Paths that were asked for, in order."""

    def put(self, repo: str, commit: str, folder: Path) -> None:
        """Give a repository a commit, where its main branch is from now on."""
        self.commits.setdefault(repo, {})[commit] = folder
        self.branches.setdefault(repo, {})["main"] = commit


def into_cache(cache: Path, repo: str, commit: str, folder: Path) -> None:
    """Put a commit of a model into a cache, as huggingface_hub does, and let its main branch be there."""
    place = cache / f"models--{repo.replace('/', '--')}"
    if not (place / "snapshots" / commit).exists():
        shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Within: the hub answers at this address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(with_body=True, posted=self.rfile.read(length))

    def _answer(self, *, with_body: bool, posted: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind, repo, rest = parts[1], f"{parts[1]}/{parts[2]}/{parts[3]}", parts[4:]
            self._api(kind, repo, rest, posted)
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        repo, revision, name = f"{kind}/{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:])
        commit = self._commit(repo, revision)
        file = None if commit is None else self.hub.commits[repo][commit] / name
        if commit is None or file is None or not file.is_file():
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            self._send(404, b"", {"X-Error-Code": code, **({"X-Repo-Commit": commit} if commit else {})})
            return
        content = file.read_bytes()
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, with_body=with_body)

    def _api(self, kind: str, repo: str, rest: list[str], posted: bytes) -> None:
        if repo not in self.hub.commits:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        commit = self._commit(repo, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        folder = self.hub.commits[repo][commit]
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if not rest or rest[0] == "revision":
            answer: Any = {"id": repo.partition("/")[2], "sha": commit, "siblings": [{"rfilename": f} for f in files]}
        else:
            wanted: Any = json.loads(posted)["paths"] if posted[:1] == b"{" else None
            if rest[0] == "tree" and len(rest) > 2:
                files = [f for f in files if f.startswith("/".join(rest[2:]) + "/")]
            answer = [
                {
                    "type": "file",
                    "path": f,
                    "size": (folder / f).stat().st_size,
                    "oid": hashlib.sha1(f.encode(), usedforsecurity=False).hexdigest(),
                }
                for f in files
                if wanted is None or f in wanted
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _commit(self, repo: str, revision: str) -> str | None:
        if revision in self.hub.commits.get(repo, {}):
            return revision
        return self.hub.branches.get(repo, {}).get(revision)

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)
