"""A disk whose run folder is also in a store: whatever is there under its name on the disk, is in the store before.

A kill between the two leaves the store ahead, which is the truth. An upload that fails leaves both as they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from rlhf_core.contracts.durable import Disk
from rlhf_core.contracts.errors import RunLockedError, StorageError
from rlhf_core.store.known import Known
from rlhf_core.store.layout import ABSENT, COMMITS, LINK
from rlhf_core.store.objects import Objects

TRIES = 3
"""Of a request that a store refuses although nothing has changed: it had another one of the same name just then."""
Answer = TypeVar("Answer")
WHY_ABSENT = b"The folder around this object is not all there: no reader may use it.\n"


class Mirror(Disk):
    """The operating system's disk, and a store.

    Args:
        root: folder of the copy.
        objects: of the store.
        known: what is known of the copy.
        check: raises if this process must not write in the store; asked before each request, and after it.
        etags: of all objects, where this process is their only writer: what replaces one says which, so that neither
            a request that comes too late nor another writer is overlooked. None: whoever writes last is right.
        local: whether a name is of this machine alone.
    """

    def __init__(
        self,
        root: Path,
        objects: Objects,
        known: Known,
        *,
        check: Callable[[], None],
        local: Callable[[str], bool],
        etags: dict[str, str] | None,
    ) -> None:
        self._root, self._objects, self._known, self._check, self._local = root, objects, known, check, local
        self._etags = etags

    def rename(self, source: Path, target: Path) -> None:
        """Put a file or folder under another name, in the store first."""
        before, after = self._name(source), self._name(target)
        etags = self._send(source, after) if after is not None else {}
        if before is not None:
            self._remove(source, before)
        super().rename(source, target)
        for name, etag in etags.items():
            self._known.note(name, etag, self._root / name)

    def adopt(self, path: Path) -> None:
        """Send what another process has written, unless the store has it."""
        if (name := self._name(path)) is None:
            return
        files = [path] if not path.is_dir() else [p for p in path.rglob("*") if p.is_file()]
        named = {file.relative_to(self._root).as_posix(): file for file in files}
        there = self._objects.list(name).entries
        if any(each not in there or not self._known.is_same(each, there[each], file) for each, file in named.items()):
            for each, etag in self._send(path, name).items():
                self._known.note(each, etag, self._root / each)

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
            self._change(lambda: self._put(f"{name}{LINK}", os.fsencode(source.readlink())))
            return {}
        if not source.is_dir():
            return {name: self._change(lambda: self._put(name, source))}
        files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: (p.name == COMMITS, p))
        self._change(lambda: self._put(f"{name}/{ABSENT}", WHY_ABSENT))
        etags: dict[str, str] = {}
        for file in files:
            inside = f"{name}/{file.relative_to(source).as_posix()}"
            etags[inside] = self._change(lambda inside=inside, file=file: self._put(inside, file))
        self._change(lambda: self._delete(f"{name}/{ABSENT}"))
        return etags

    def _remove(self, path: Path, name: str) -> None:
        if path.is_symlink():
            self._change(lambda: self._delete(f"{name}{LINK}"))
        elif not path.is_dir():
            self._change(lambda: self._delete(name))
        elif there := self._objects.list(f"{name}/").entries:
            self._change(lambda: self._put(f"{name}/{ABSENT}", WHY_ABSENT))
            remove_absent(name, there, lambda each: self._change(lambda: self._delete(each)))

    def _put(self, name: str, content: bytes | Path) -> str:
        if self._etags is None:
            return self._objects.put(name, content)
        for _ in range(TRIES):
            before = self._etags.get(name)
            put = (
                self._objects.put_new(name, content)
                if before is None
                else self._objects.put_over(name, content, before)
            )
            if put is None:  # it is done and the answer was lost, or it is not the object that it was
                found = self._objects.read(name)
                if found is not None and found[0] == (content if isinstance(content, bytes) else content.read_bytes()):
                    put = found[1]
                elif (found and found[1]) != before:
                    raise RunLockedError(
                        f"{self._objects.url(name)} was changed by another process, which works on the same run; this "
                        "one writes no more there"
                    )
            if put is not None:
                self._etags[name] = put
                return put
        raise StorageError(f"{self._objects.url(name)} was not written: the store refuses it and does not say why")

    def _delete(self, name: str) -> None:
        self._objects.delete(name)
        if self._etags is not None:
            self._etags.pop(name, None)

    def _change(self, request: Callable[[], Answer]) -> Answer:
        """Do a request that changes the store, if this process still may, and refuse it if it was not allowed to."""
        self._check()
        done = request()
        self._check()
        return done


def remove_absent(folder: str, names: Iterable[str], delete: Callable[[str], None]) -> None:
    """Remove a folder that is marked as absent: what commits it first, the mark last.

    Args:
        folder: its name.
        names: of the objects below it.
        delete: removes one.
    """
    mark = f"{folder}/{ABSENT}"
    for name in sorted(set(names) - {mark}, key=lambda name: (not name.endswith(f"/{COMMITS}"), name)):
        delete(name)
    delete(mark)
