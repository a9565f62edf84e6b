"""Addresses of runs, and where their copies lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.store.address import CACHE, Address, is_url, known_as, on_disk, shown


def test_an_address_is_read_and_shown_as_it_was_given() -> None:
    address = Address.of("s3://my-bucket/experiments/run-7/")
    assert (address.bucket, address.prefix) == ("my-bucket", "experiments/run-7")
    assert str(address) == "s3://my-bucket/experiments/run-7"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gs://bucket/run", "of the object stores, s3:// is known"),
        ("s3:/bucket/run", "of the object stores, s3:// is known"),
        ("s3://bucket", "is a whole bucket"),
        ("s3://bucket/", "is a whole bucket"),
        ("s3:///run", "names the bucket ''"),
        ("s3://Bucket_/run", "names the bucket 'Bucket_'"),
        ("s3://bucket/a//b", "has '' in its prefix"),
        ("s3://bucket/a/../b", "has '..' in its prefix"),
        ("s3://bucket/a/.hidden", "has '.hidden' in its prefix"),
        ("s3://bucket/a b", "has 'a b' in its prefix"),
        ("s3://bucket/run?versionId=1", "has 'run?versionId=1' in its prefix"),
        ("s3://user:secret@bucket/run", "names the bucket"),
    ],
)
def test_what_is_no_address_is_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError, match=r".*") as refused:
        Address.of(text)
    assert says in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_neighbours_there_are_neighbours_here_and_other_services_are_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    one, two, other = (Address.of(f"s3://bucket/{name}") for name in ("exp/one", "exp/two", "exp2/one"))
    assert one.copy("https://a").parent == two.copy("https://a").parent
    assert one.copy("https://a").name == "one"
    assert one.copy("https://a").parent.name.startswith("bucket-exp-")
    assert len({one.copy("https://a"), one.copy("https://b"), other.copy("https://a")}) == 3


def test_a_path_that_was_made_of_an_address_is_known_as_one() -> None:
    assert is_url(Path("s3://bucket/run"))
    assert not any(map(is_url, ("runs/a", "/runs/a", "C:a", "org/model", "./s3", "")))
    with pytest.raises(UserError, match="--out is s3:/bucket/run, but only the folder of a run can be"):
        on_disk(Path("s3://bucket/run"), "--out")
    assert on_disk("runs/a", "--out") == Path("runs/a")


def test_the_folder_of_a_copy_is_shown_by_its_address(tmp_path: Path) -> None:
    known_as(tmp_path / "run", Address.of("s3://bucket/exp/run"))
    assert shown(f"rlhf resume {tmp_path}/run") == "rlhf resume s3://bucket/exp/run"
    assert shown(tmp_path / "run" / "run.json") == "s3://bucket/exp/run/run.json"
    assert shown(f"{tmp_path}/other") == f"{tmp_path}/other"
