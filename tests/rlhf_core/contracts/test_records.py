"""Sealed records: what was written comes back, and any other byte is refused before it is parsed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.records import read_json, read_record, seal, unseal, write_record


def test_it_is_json_whose_last_key_is_the_digest_of_the_rest(tmp_path: Path) -> None:
    sha256 = write_record(tmp_path / "run.json", {"b": [1, 2.5], "a": "é"})
    data = (tmp_path / "run.json").read_bytes()
    body = '{"a":"é","b":[1,2.5]}'.encode()
    assert json.loads(data) == {"a": "é", "b": [1, 2.5], "seal": hashlib.sha256(body).hexdigest()}
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert read_record(tmp_path / "run.json") == {"a": "é", "b": [1, 2.5]}


def test_each_flipped_bit_is_seen() -> None:
    data = seal({"kl": 0.1, "cursor": {"epoch": 0}})
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(IntegrityError, match=r"^it is damaged"):
                unseal(bytes(damaged), origin="it")


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_torn_record_is_seen(cut: int) -> None:
    with pytest.raises(IntegrityError, match=r"^it is damaged or foreign"):
        unseal(seal({"a": 1})[:cut], origin="it")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_what_was_never_sealed_is_not_parsed(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="does not end with the seal"):
        unseal(data, origin="it")


@pytest.mark.parametrize("values", [{}, {"seal": 1}])
def test_what_cannot_be_sealed(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a record has values"):
        seal(values)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "a": 1}', "a key stands twice"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
)
def test_json_is_strict(text: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=f"^it .*{reason}|^it {reason}"):
        read_json(text, origin="it")
