"""The bytes of a text file, as UTF-8: unpacked if it is gzip, decoded if a byte order mark says UTF-16 or UTF-32."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

COMPRESSED: Final = (".gz",)
_WIDE: Final = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order mark -> encoding; the longer marks first."""
DELIMITERS: Final = (",", ";", "\t", "|")
_MAX_NAME: Final = 40
FEW_BYTES: Final = 1 << 26
MOST_UNPACKED: Final = 100
"""Of a gzip file, times its size: text is packed to a third or a tenth."""


def kind_of(path: Path) -> str:
    """The suffix of a file in lower case, without that of its compression."""
    inner = path.stem if path.suffix.lower() in COMPRESSED else path.name
    return Path(inner).suffix.lower()


def open_utf8(path: Path, notes: list[str]) -> IO[bytes]:
    """Open a text file for reading its UTF-8 bytes, without a byte order mark.

    Args:
        path: the file.
        notes: gets a sentence where the encoding is another one.
    Returns: the open file; the caller closes it.
    Raises:
        ValueError: UTF-16 without its mark.
        OSError: it cannot be read, or is not gzip.
    """
    file = _unpacked(path) if path.suffix.lower() in COMPRESSED else path.open("rb")
    try:
        head = file.peek(512)[:512]
        encoding = next((name for mark, name in _WIDE.items() if head.startswith(mark)), None)
        if encoding is not None:
            notes.append(f"its byte order mark says {encoding}, so it is read as that")
            with file:
                return io.BytesIO(file.read().decode(encoding).encode())
        if len(head) >= 4 and head.count(0) * 3 >= len(head):
            raise ValueError("it looks like UTF-16 without a byte order mark; save it as UTF-8")
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
    except BaseException:
        file.close()
        raise
    return file


class _Unpacking(io.RawIOBase):
    """A gzip file that may unpack to so many bytes. Raises ValueError as soon as there are more."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed with this one
        self._limit = self._left = max(FEW_BYTES, MOST_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {self._limit} bytes; unpack it first, if you trust it")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Unpacking(path), 1 << 16)


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file whose lines end with LF, CR LF or CR."""
    number = 0
    for line in file:
        for piece in line.splitlines():
            number += 1
            yield number, piece


def header_cells(line: str, delimiter: str) -> list[str]:
    """The names in a header line."""
    return next(csv.reader([line], delimiter=delimiter), [])


def delimiter_of(text: str, usual: str) -> tuple[str, int]:
    """What separates the cells of a table, by its header.

    Args:
        text: of the whole file.
        usual: what its suffix says.
    Returns: (the delimiter, how many characters a first line ``sep=;`` takes, which Excel writes).
    """
    told = re.match(r"sep=(.)\r?\n", text)
    if told:
        return told[1], told.end()
    header = re.match(r"[\r\n]*([^\r\n]*)", text)
    line = header[1] if header else ""
    if len(header_cells(line, usual)) > 1:
        return usual, 0
    others = [other for other in DELIMITERS if other != usual and _is_header(header_cells(line, other))]
    return (others[0] if len(others) == 1 else usual), 0


def _is_header(names: Sequence[str]) -> bool:
    return len(names) > 1 and all(0 < len(name) <= _MAX_NAME and len(name.split()) <= 3 for name in names)
