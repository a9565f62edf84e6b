"""Which object a file of a copy is the same as, remembered so that nothing has to be read to see it.

A line a file: [name, ETag, bytes, time], the last one counts. What is not known, or has changed
since, is compared by its MD5 where the store's ETag is one, and else fetched again: a lost line costs time alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Final

from rlhf_core.contracts.durable import write_file
from rlhf_core.store.objects import Entry

_MD5: Final = re.compile(r'"?([0-9a-f]{32})"?')
_SURPLUS: Final = 1000
"""Lines that were overtaken, until the file is written anew."""


class Known:
    """What is known of the files of a copy.

    Args:
        path: of the file with the lines.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._lines: dict[str, list[object]] = {}
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for line in lines:
            try:
                name, *about = json.loads(line)
                self._lines[name] = about
            except (ValueError, TypeError):  # cut off by a kill
                continue
        if len(lines) > len(self._lines) + _SURPLUS:
            write_file(path, b"".join(map(_line, self._lines, self._lines.values())))

    def note(self, name: str, etag: str, file: Path) -> None:
        """This file is the object of this ETag."""
        with self._lock:
            self._lines[name] = [etag, *_about(file)]
            with self._path.open("ab") as lines:
                lines.write(_line(name, self._lines[name]))

    def is_same(self, name: str, entry: Entry, file: Path) -> bool:
        """Whether a file holds what the object does."""
        if file.is_symlink() or not file.is_file():
            return False
        if self._lines.get(name) == [entry.etag, *_about(file)]:
            return True
        found = _MD5.fullmatch(entry.etag)
        if found is None or file.stat().st_size != entry.size:
            return False
        with file.open("rb") as content:
            if hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != found[1]:
                return False
        self.note(name, entry.etag, file)
        return True


def _about(file: Path) -> list[object]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _line(name: str, about: list[object]) -> bytes:
    return json.dumps([name, *about]).encode() + b"\n"
