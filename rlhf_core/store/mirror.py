"""A disk whose run folder is also in a store: whatever is there under its name on the disk, is in the store before.

A kill between the two leaves the store ahead, which is the truth. An upload that fails leaves both as they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from rlhf_core.contracts.durable import Disk
from rlhf_core.store.known import Known
from rlhf_core.store.layout import ABSENT, COMMITS, LINK
from rlhf_core.store.objects import Objects

Answer = TypeVar("Answer")
WHY_ABSENT = b"The folder around this object is not all there: no reader may use it.\n"


class Mirror(Disk):
    """The operating system's disk, and a store.

    Args:
        root: folder of the copy.
        objects: of the store.
        known: what is known of the copy.
        check: raises if this process must not write in the store; asked before each request, and after it.
        local: whether a name is of this machine alone.
    """

    def __init__(
        self, root: Path, objects: Objects, known: Known, check: Callable[[], None], local: Callable[[str], bool]
    ) -> None:
        self._root, self._objects, self._known, self._check, self._local = root, objects, known, check, local

    def rename(self, source: Path, target: Path) -> None:
        """Put a file or folder under another name, in the store first."""
        before, after = self._name(source), self._name(target)
        etags = self._send(source, after) if after is not None else {}
        if before is not None:
            self._remove(source, before)
        super().rename(source, target)
        for name, etag in etags.items():
            self._known.note(name, etag, self._root / name)

    def unlink(self, path: Path) -> None:
        """Remove a file or link, in the store first."""
        if (name := self._name(path)) is not None:
            self._remove(path, name)
        super().unlink(path)

    def _name(self, path: Path) -> str | None:
        """Of the object that a path stands for; None if it stands for none."""
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the link that is meant
        if not absolute.is_relative_to(self._root):
            return None
        name = absolute.relative_to(self._root).as_posix()
        return None if self._local(name) else name

    def _send(self, source: Path, name: str) -> dict[str, str]:
        """Send a link, file or folder; returns the ETag of each file."""
        if source.is_symlink():
            self._change(lambda: self._objects.put(f"{name}{LINK}", os.fsencode(source.readlink())))
            return {}
        if not source.is_dir():
            return {name: self._change(lambda: self._objects.put(name, source))}
        files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: (p.name == COMMITS, p))
        self._change(lambda: self._objects.put(f"{name}/{ABSENT}", WHY_ABSENT))
        etags: dict[str, str] = {}
        for file in files:
            inside = f"{name}/{file.relative_to(source).as_posix()}"
            etags[inside] = self._change(lambda inside=inside, file=file: self._objects.put(inside, file))
        self._change(lambda: self._objects.delete(f"{name}/{ABSENT}"))
        return etags

    def _remove(self, path: Path, name: str) -> None:
        if path.is_symlink():
            self._change(lambda: self._objects.delete(f"{name}{LINK}"))
        elif not path.is_dir():
            self._change(lambda: self._objects.delete(name))
        elif there := self._objects.list(f"{name}/").entries:
            self._change(lambda: self._objects.put(f"{name}/{ABSENT}", WHY_ABSENT))
            remove_absent(self._objects, name, there, self._change)

    def _change(self, request: Callable[[], Answer]) -> Answer:
        """Do a request that changes the store, if this process still may, and refuse it if it was not allowed to."""
        self._check()
        done = request()
        self._check()
        return done


def remove_absent(
    objects: Objects, folder: str, names: Iterable[str], change: Callable[[Callable[[], None]], None]
) -> None:
    """Remove a folder that is marked as absent: what commits it first, the mark last.

    Args:
        objects: of the store.
        folder: its name.
        names: of the objects below it.
        change: does each request.
    """
    mark = f"{folder}/{ABSENT}"
    for name in sorted(set(names) - {mark}, key=lambda name: (not name.endswith(f"/{COMMITS}"), name)):
        change(lambda name=name: objects.delete(name))
    change(lambda: objects.delete(mark))
