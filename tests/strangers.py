"""Runs that somebody else made: whatever they name leaves a mark, should it be started, imported or contacted."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts import accepted, trust
from rlhf_core.contracts.records import read_record, write_record


class Marks:
    """What somebody else's values point at.

    Args:
        folder: an empty one.
        port: of a listener that counts who comes.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.visits = folder, port, 0
        self.address = f"127.0.0.1:{port}"

    @property
    def mark(self) -> Path:
        """A file that is there once something ran."""
        return self.folder / "mark"

    def nothing_happened(self) -> bool:
        """Whether nothing ran, and nobody came."""
        return not self.mark.exists() and self.visits == 0

    def program(self, path: Path) -> Path:
        """A program that would be taken for a Python with vLLM."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\necho here > {self.mark}\necho vllm 0.0\n")
        path.chmod(0o755)
        return path

    def module(self, path: Path) -> Path:
        """A Python file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(self.mark)!r}, 'w').close()\ndef score(responses): return [0.0] * len(responses)\n")
        return path


@contextmanager
def marks(folder: Path) -> Iterator[Marks]:
    """What leaves marks in a folder, with a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = Marks(folder, server.getsockname()[1])

        def count() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()
                    there.visits += 1

        threading.Thread(target=count, daemon=True).start()
        yield there
        server.shutdown(socket.SHUT_RDWR)


def nothing_is_accepted(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    """A user who has never begun a run."""
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.delenv(accepted.VARIABLE, raising=False)
    monkeypatch.setattr(trust, "_recorded", {})
    for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


def from_a_stranger(run: Path, folder: Path, **sections: Mapping[str, Any]) -> Path:
    """A copy of a run whose record names other things, sealed as its maker would.

    Args:
        run: that was finished.
        folder: of the copy.
        sections: of the config -> changed knobs.
    """
    shutil.copytree(run, folder, symlinks=True, dirs_exist_ok=True)
    record = read_record(folder / "run.json")
    for name, knobs in sections.items():
        record["config"][name] = {**record["config"][name], **knobs}
    write_record(folder / "run.json", record)
    return folder


def chdir_into(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As ``cd FOLDER``."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", os.fspath(folder))
