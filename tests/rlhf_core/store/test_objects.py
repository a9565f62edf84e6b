"""Objects of a real server, and what is said when it does not do as it should."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from s3_server import S3Server

from rlhf_core.contracts.errors import StorageError, UserError
from rlhf_core.store import objects as objects_module
from rlhf_core.store.address import Address
from rlhf_core.store.objects import ChangedError, Objects


def test_an_object_is_written_listed_read_and_removed(objects: Objects, tmp_path: Path) -> None:
    etag = objects.put("a/b", b"content")
    listing = objects.list()
    assert {name: (e.etag, e.size) for name, e in listing.entries.items()} == {"a/b": (etag, 7)}
    assert abs(listing.now - listing.entries["a/b"].modified) < 60
    assert objects.read("a/b") == (b"content", etag)
    objects.fetch("a/b", tmp_path / "b", etag)
    assert (tmp_path / "b").read_bytes() == b"content"
    objects.delete("a/b")
    objects.delete("a/b")
    assert objects.read("a/b") is None
    assert objects.list().entries == {}


def test_neighbours_whose_names_begin_alike_are_not_listed(objects: Objects, url: str) -> None:
    Objects(Address.of(f"{url}2")).put("x", b"")
    assert objects.list().entries == {}


def test_a_list_has_every_page(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        objects.put(f"{number}", b"")
    client: Any = objects._client
    whole = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **asked: whole(**{"MaxKeys": 2, **asked}))
    assert sorted(objects.list().entries) == ["0", "1", "2", "3", "4"]
    assert len(objects.list(at_most=2).entries) == 2


def test_a_condition_that_does_not_hold_changes_nothing(objects: Objects) -> None:
    first = objects.put_new("lease", b"mine")
    assert first is not None
    assert objects.put_new("lease", b"yours") is None
    second = objects.put_over("lease", b"mine again", first)
    assert second is not None
    assert objects.put_over("lease", b"yours", first) is None
    assert objects.put_over("nothing", b"yours", first) is None
    objects.delete_this("lease", first)
    assert objects.read("lease") == (b"mine again", second)
    objects.delete_this("lease", second)
    assert objects.read("lease") is None


def test_an_object_that_has_changed_since_is_not_fetched(objects: Objects, tmp_path: Path) -> None:
    etag = objects.put("a", b"old")
    objects.put("a", b"new")
    with pytest.raises(ChangedError):
        objects.fetch("a", tmp_path / "a", etag)


def test_a_large_file_goes_in_parts(objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.store.objects.WHOLE_BYTES", 2**20)
    (tmp_path / "large").write_bytes(b"x" * (9 * 2**20))
    etag = objects.put("large", tmp_path / "large")
    assert etag.strip('"').endswith("-2")
    objects.fetch("large", tmp_path / "back", etag)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()


def test_a_request_that_fails_is_tried_again_and_then_told_in_one_sentence(objects: Objects, url: str) -> None:
    answers = [503]
    calls: list[str] = []

    def fail(request: Any, **_: Any) -> AWSResponse | None:
        calls.append(request.url)
        return AWSResponse(request.url, answers.pop(0), {}, _Nothing()) if answers else None

    client: Any = objects._client
    client.meta.events.register("before-send.s3.PutObject", fail)
    objects.put("a", b"content")
    assert len(calls) == 2
    answers += [500, 503]
    with pytest.raises(StorageError) as told:
        objects.put("b", b"content")
    assert str(told.value).startswith(f"{url}/b was not written: ")
    assert str(told.value).endswith("then run the same again or resume")
    assert list(objects.list().entries) == ["a"]


class _Nothing:
    """The body of an answer that has none."""

    def stream(self, **_: Any) -> list[bytes]:
        return []


def test_an_answer_of_somebody_else_is_no_success(objects: Objects) -> None:
    def a_page(request: Any, **_: Any) -> AWSResponse:
        return AWSResponse(request.url, 200, {"Content-Type": "text/html"}, _Nothing())

    client: Any = objects._client
    client.meta.events.register("before-send.s3.PutObject", a_page)
    with pytest.raises(StorageError, match="what answers there is no object store"):
        objects.put("a", b"content")


def test_a_bucket_that_is_not_there(store: S3Server) -> None:
    with pytest.raises(StorageError) as told:
        Objects(Address.of("s3://nobody-has-made-it/run")).list()
    assert str(told.value) == (
        "s3://nobody-has-made-it/run was not read: NoSuchBucket: The specified bucket does not exist; nothing was "
        "changed: make that bucket, or correct its name, then run the same again or resume"
    )


@pytest.fixture
def fresh() -> Iterator[None]:
    """This process has not asked for credentials yet."""
    objects_module._session.cache_clear()
    yield
    objects_module._session.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_no_credentials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="give boto3 other credentials: by environment, profile or role"):
        Objects(Address.of(url)).list()


@pytest.mark.usefixtures("fresh")
def test_a_profile_that_is_not_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"boto3 is not configured: The config profile \(nobody\) could not be found"):
        Objects(Address.of(url))


def test_a_server_that_is_not_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r'Could not connect to the endpoint URL: "http://127.0.0.1:9/'):
        Objects(Address.of(url), tries=1).list()


@pytest.mark.usefixtures("fresh")
def test_without_boto3(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    with pytest.raises(UserError) as told:
        Objects(Address.of(url))
    assert str(told.value) == f'{url} needs boto3, which is not installed: pip install "rlhf-flow[s3]"'
