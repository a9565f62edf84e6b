"""A copy is in line with its store, whatever has become of either; no record is there before what it commits."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.durable import using_disk, write_file
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.store.copying import bring_in_line
from rlhf_core.store.known import Known
from rlhf_core.store.mirror import Mirror
from rlhf_core.store.objects import Listing, Objects


@pytest.fixture
def copy(objects: Objects, tmp_path: Path) -> Callable[..., Path]:
    """Brings the copy of this test in line, as a process of its own would, and returns it."""

    def do(**how: Any) -> Path:
        bring_in_line(objects, tmp_path / "run", Known(tmp_path / "known"), **how)
        return tmp_path / "run"

    return do


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): f"-> {p.readlink()}" if p.is_symlink() else p.read_text()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all objects that were fetched."""
    names: list[str] = []
    fetch = Objects.fetch

    def note(objects: Objects, name: str, *rest: Any) -> None:
        names.append(name)
        fetch(objects, name, *rest)

    monkeypatch.setattr(Objects, "fetch", note)
    return names


def test_what_is_missing_or_differs_is_fetched_and_what_is_surplus_removed(
    objects: Objects, copy: Callable[..., Path], fetched: list[str]
) -> None:
    for name in ("run.json", "iterations/000000/a.arrow", "iterations/000000/a.json"):
        objects.put(name, name.encode())
    objects.put("checkpoints/last_good.link", b"000002")
    here = copy()
    assert files(here) == {
        "run.json": "run.json",
        "iterations/000000/a.arrow": "iterations/000000/a.arrow",
        "iterations/000000/a.json": "iterations/000000/a.json",
        "checkpoints/last_good": "-> 000002",
    }
    assert sorted(fetched) == ["iterations/000000/a.arrow", "iterations/000000/a.json", "run.json"]
    fetched.clear()
    (here / "iterations" / "000000" / "a.arrow").unlink()
    (here / "iterations" / "000000" / "a.json").write_text("changed here")
    (here / "stray").write_text("stray")
    (here / "iterations" / "000009").mkdir()
    (here / "lock").touch()
    (here / "shards").mkdir()
    (here / ".run.json.1234.tmp").write_text("of a living process")
    objects.put("run.json", b"changed there")
    objects.put("checkpoints/last_good.link", b"000003")
    copy()
    assert files(here) == {
        ".run.json.1234.tmp": "of a living process",
        "run.json": "changed there",
        "iterations/000000/a.arrow": "iterations/000000/a.arrow",
        "iterations/000000/a.json": "iterations/000000/a.json",
        "checkpoints/last_good": "-> 000003",
        "lock": "",
    }
    assert not (here / "iterations" / "000009").exists()
    assert (here / "shards").is_dir()
    assert len(fetched) == 3
    fetched.clear()
    copy()
    assert fetched == []


def test_without_its_memory_a_copy_is_compared_by_content(
    objects: Objects, copy: Callable[..., Path], fetched: list[str], tmp_path: Path
) -> None:
    for name in ("same", "rotten"):
        objects.put(name, b"content")
    here = copy()
    fetched.clear()
    (tmp_path / "known").write_text('["same", "cut o')
    found = (here / "rotten").stat()
    (here / "rotten").write_bytes(b"c0ntent")
    os.utime(here / "rotten", ns=(found.st_atime_ns, found.st_mtime_ns))
    copy()
    assert fetched == ["rotten"]
    assert files(here) == {"same": "content", "rotten": "content"}


def test_files_have_the_time_of_their_objects(objects: Objects, copy: Callable[..., Path]) -> None:
    objects.put("a", b"")
    assert (copy() / "a").stat().st_mtime == objects.list().entries["a"].modified


def test_only_what_is_wanted_or_below_a_folder_is_fetched(objects: Objects, copy: Callable[..., Path]) -> None:
    for name in ("run.json", "checkpoints/1/model.safetensors", "checkpoints/1/manifest.json"):
        objects.put(name, b"")
    assert set(files(copy(under="checkpoints/1/", wanted=lambda name: name.endswith(".json")))) == {
        "checkpoints/1/manifest.json"
    }
    assert len(files(copy())) == 3


def test_parts_of_workers_can_be_handed_over_by_the_store_too(
    objects: Objects, copy: Callable[..., Path], tmp_path: Path
) -> None:
    def is_of_others(name: str) -> bool:
        return not name.startswith("shards/")

    worker, part = tmp_path / "worker", "shards/000000/02_rollouts.0-of-2.arrow"
    mirror = Mirror(
        worker, objects, Known(tmp_path / "its"), check=lambda: None, local=is_of_others, etags=dict[str, str]()
    )
    with using_disk(mirror):
        write_file(worker / part, b"part")
        write_file(worker / "run.json", b"{}")
    assert files(copy()) == {}
    assert files(copy(under="shards/000000/", local=is_of_others)) == {part: "part"}


def test_a_folder_that_is_half_there_is_absent(objects: Objects, copy: Callable[..., Path]) -> None:
    objects.put("checkpoints/000002/.absent", b"")
    objects.put("checkpoints/000002/weights", b"")
    objects.put("checkpoints/000002/manifest.json", b"")
    assert files(copy()) == {}
    objects.delete("checkpoints/000002/.absent")
    assert len(files(copy())) == 2
    objects.put("checkpoints/000002/.absent", b"")
    here = copy()
    assert files(here) == {}
    assert not (here / "checkpoints" / "000002").exists()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/absolute", "a//b", "./a", "a/" + "x" * 300])
def test_a_name_that_leads_out_of_the_run_is_refused(
    name: str, objects: Objects, copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put("good", b"")
    listed = objects.list()
    monkeypatch.setattr(objects, "list", lambda _under: Listing({name: listed.entries["good"]}, listed.now))
    with pytest.raises(IntegrityError, match="is an object that no folder can hold; remove it"):
        copy()
    assert not (tmp_path / "outside").exists()


def test_a_name_that_is_a_file_and_a_folder_is_refused(objects: Objects, copy: Callable[..., Path]) -> None:
    objects.put("a", b"")
    objects.put("a/b", b"")
    with pytest.raises(IntegrityError, match=r"/a is an object, and .*/a/b stands below it; remove one of them"):
        copy()


@pytest.mark.parametrize("target", ["../../etc", "/etc/passwd", "", "a/b", "."])
def test_a_link_that_leads_out_of_its_folder_is_refused(
    target: str, objects: Objects, copy: Callable[..., Path], tmp_path: Path
) -> None:
    objects.put("checkpoints/last_good.link", target.encode())
    with pytest.raises(IntegrityError, match="which is no name beside it; remove it"):
        copy()
    assert not (tmp_path / "run" / "checkpoints" / "last_good").is_symlink()


def test_a_file_that_came_while_it_was_listed_stays(
    objects: Objects, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    objects.put("a", b"")
    whole = objects.list

    def list_slowly(under: str) -> Listing:
        found = whole(under)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "new").write_text("of an evaluation beside the run")
        return found

    monkeypatch.setattr(objects, "list", list_slowly)
    assert set(files(copy())) == {"a", "new"}


def test_while_the_run_goes_on_no_record_is_there_before_what_it_commits(objects: Objects, tmp_path: Path) -> None:
    over = threading.Event()

    def go_on() -> None:
        writer, number = Objects(objects.address), 0
        while not over.is_set():
            artifact = os.urandom(2000)
            writer.put(f"iterations/{number:06d}/a.arrow", artifact)
            writer.put(f"iterations/{number:06d}/a.json", json.dumps(hashlib.sha256(artifact).hexdigest()).encode())
            writer.put("progress.json", str(number).encode())
            number += 1
            over.wait(0.03)

    thread = threading.Thread(target=go_on)
    thread.start()
    seen: list[int] = []
    try:
        while not seen or seen[-1] < 20:
            here = tmp_path / str(len(seen) % 2)
            bring_in_line(objects, here, Known(here.with_suffix(".known")))
            records = sorted(here.glob("iterations/*/a.json"))
            for record in records:
                artifact = record.with_suffix(".arrow").read_bytes()
                assert json.loads(record.read_text()) == hashlib.sha256(artifact).hexdigest()
            seen.append(len(records))
    finally:
        over.set()
        thread.join()
    assert seen == sorted(seen)
    assert len(seen) > 2


def test_a_list_whose_pages_are_of_different_moments_is_not_believed(
    objects: Objects, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        objects.put(f"iterations/{number}/a.arrow", b"")
        objects.put(f"iterations/{number}/a.json", b"")
    whole = objects.list()
    torn = [
        Listing({n: e for n, e in whole.entries.items() if n < f"iterations/{last}" or n.endswith("json")}, whole.now)
        for last in (1, 2)
    ]
    monkeypatch.setattr(objects, "list", lambda _under: torn.pop(0) if torn else whole)
    assert len(files(copy())) == 6
    assert torn == []


@pytest.mark.parametrize("at", range(6))
def test_a_reader_that_is_stopped_has_no_record_without_what_it_commits(
    at: int, objects: Objects, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("run.json", *(f"iterations/{number}/a.{end}" for number in range(3) for end in ("arrow", "json"))):
        objects.put(name, b"")
    monkeypatch.setattr("rlhf_core.store.copying.AT_ONCE", 1)
    fetch, seen = Objects.fetch, list[str]()

    def stop(objects: Objects, name: str, *rest: Any) -> None:
        seen.append(name)
        if len(seen) > at:
            raise StorageError("the network is gone")
        fetch(objects, name, *rest)

    monkeypatch.setattr(Objects, "fetch", stop)
    with pytest.raises(StorageError, match="the network is gone"):
        copy()
    there = set(files(tmp_path / "run"))
    assert len(there) == at
    records = {name for name in there if name.endswith(".json") and name != "run.json"}
    assert {name.replace(".json", ".arrow") for name in records} <= there
    assert "run.json" not in there


def test_a_store_that_changes_all_the_time_is_told(
    objects: Objects, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    objects.put("iterations/a", b"0")
    fetch = Objects.fetch

    def too_late(objects: Objects, name: str, *rest: Any) -> None:
        objects.put(name, os.urandom(4))
        fetch(objects, name, *rest)

    monkeypatch.setattr(Objects, "fetch", too_late)
    with pytest.raises(StorageError, match=f"{url} changes faster than it can be read"):
        copy()
