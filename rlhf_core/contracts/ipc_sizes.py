"""What a record batch of a compressed Arrow file would take in memory, told before any of it is decompressed.

A compressed buffer begins with its length when decompressed, which Arrow allocates: a few bytes may claim a
terabyte. PyArrow reads all batches or trusts the claim, so the few fields needed are taken from the file's own
description here (flatbuffers; Arrow's ``File.fbs`` and ``Message.fbs``). A file is trusted with nothing: whatever
does not fit raises ``ValueError``.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Final, cast

import pyarrow as pa

_END: Final = 10
"""Bytes at the end of a file: the length of its footer, and ``ARROW1``."""
_BATCHES, _HEADER, _BUFFERS, _COMPRESSION = 3, 2, 2, 3
"""Places of fields: Footer.recordBatches, Message.header, RecordBatch.buffers, RecordBatch.compression."""
_PREFIX: Final = 8
_GROWS: Final = "it is compressed, or has columns that take no room in the file"


def batch_message(file: BinaryIO, index: int) -> bytes:
    """The bytes of one record batch in an Arrow IPC file, still compressed. Raises ValueError for no such file."""
    try:
        size = file.seek(0, 2)
        file.seek(size - _END)
        length = _number("<i", file.read(_END), 0)
        file.seek(size - _END - length)
        footer = file.read(length)
        vector = _pointed_at(footer, _field(footer, _root(footer), _BATCHES))
        if not 0 <= index < _number("<I", footer, vector):
            raise ValueError(f"it has no record batch {index}")
        offset, metadata, body = struct.unpack_from("<qi4xq", footer, vector + 4 + 24 * index)
        if min(offset, metadata, body) < 0 or offset + metadata + body > size:
            raise ValueError(f"record batch {index} lies outside the file")
        file.seek(offset)
        return file.read(metadata + body)
    except (struct.error, OSError, IndexError) as error:
        raise ValueError(f"its footer is not that of an Arrow file: {error}") from None


def decompressed_bytes(message: bytes) -> int:
    """The bytes that a record batch claims to need. Raises ValueError for what is no message.

    Args:
        message: from :func:`batch_message`: a continuation mark, a length, the description, the buffers.
    """
    try:
        start = 8
        described = memoryview(message)[start : start + _number("<i", message, 4)]
        body = memoryview(message)[start + len(described) :]
        batch = _pointed_at(described, _field(described, _root(described), _HEADER))
        vector = _pointed_at(described, _field(described, batch, _BUFFERS))
        compressed = _optional_field(described, batch, _COMPRESSION) is not None
        total = 0
        for index in range(_number("<I", described, vector)):
            offset, length = struct.unpack_from("<qq", described, vector + 4 + 16 * index)
            if min(offset, length) < 0 or offset + length > len(body):
                raise ValueError("a buffer lies outside its record batch")
            claimed = _number("<q", body, offset) if compressed and length >= _PREFIX else -1
            if claimed < -1:
                raise ValueError("a buffer claims a negative length")
            total += length - (_PREFIX if compressed and length >= _PREFIX else 0) if claimed == -1 else claimed
    except (struct.error, IndexError) as error:
        raise ValueError(f"it is not an Arrow record batch: {error}") from None
    return total


def read_plain_table(data: bytes, expected: pa.Schema | None = None) -> pa.Table:
    """The table of an Arrow file as this project writes them: every value stands in the file, uncompressed.

    Args:
        data: of the file.
        expected: its schema, but for metadata; None: any whose values take room.
    Returns: the table, validated.
    Raises: ValueError, or ArrowException, for any other file.
    """
    reader = pa.ipc.open_file(pa.BufferReader(data))
    if expected is not None and not reader.schema.equals(expected):
        raise ValueError("another schema")
    if any(_takes_no_room(field.type) for field in reader.schema):
        raise ValueError(_GROWS)
    size = 0
    with pa.BufferReader(data) as file:
        for index in range(reader.num_record_batches):
            size += decompressed_bytes(batch_message(cast("BinaryIO", file), index))
    if size > len(data):
        raise ValueError(_GROWS)
    table = reader.read_all()
    table.validate(full=True)
    return table


def _takes_no_room(kind: pa.DataType) -> bool:
    """Whether a column of this type may claim any number of rows: null, dictionary, run-end-encoded, empty struct."""
    if pa.types.is_null(kind) or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return True
    if pa.types.is_fixed_size_binary(kind):
        return kind.byte_width == 0
    if pa.types.is_fixed_size_list(kind) and kind.list_size == 0:
        return True
    children = [kind.field(index).type for index in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not children) or any(map(_takes_no_room, children))


def _root(table: bytes | memoryview) -> int:
    return _number("<I", table, 0)


def _optional_field(data: bytes | memoryview, table: int, place: int) -> int | None:
    """Where a field of a flatbuffers table stands; None if it is left out."""
    layout = table - _number("<i", data, table)
    if layout < 0:
        raise ValueError("a description points outside itself")
    if 4 + 2 * place >= _number("<H", data, layout):
        return None
    offset = _number("<H", data, layout + 4 + 2 * place)
    return table + offset if offset else None


def _field(data: bytes | memoryview, table: int, place: int) -> int:
    found = _optional_field(data, table, place)
    if found is None:
        raise ValueError(f"field {place} of a description is missing")
    return found


def _pointed_at(data: bytes | memoryview, field: int) -> int:
    return field + _number("<I", data, field)


def _number(kind: str, data: bytes | memoryview, at: int) -> int:
    if at < 0:
        raise ValueError("a description points outside itself")
    return struct.unpack_from(kind, data, at)[0]
