"""What is written durably in a copy is in the store before it is there; what the store refuses is nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.durable import (
    adopt,
    make_folder,
    move,
    remove_file,
    remove_folder,
    using_disk,
    write_file,
    write_folder,
    write_link,
)
from rlhf_core.contracts.errors import RunLockedError, StorageError
from rlhf_core.store.copying import bring_in_line
from rlhf_core.store.known import Known
from rlhf_core.store.layout import is_local
from rlhf_core.store.mirror import Mirror
from rlhf_core.store.objects import Objects


@pytest.fixture
def checks() -> list[str]:
    """One entry for each time that it was asked whether this process may write; "no" in it: it may not."""
    return []


@pytest.fixture
def root(tmp_path: Path, objects: Objects, checks: list[str]) -> Iterator[Path]:
    """The folder of a copy whose writes go to the store."""

    def check() -> None:
        checks.append("asked")
        if "no" in checks:
            raise RunLockedError("taken over")

    (tmp_path / "run").mkdir()
    mirror = Mirror(
        tmp_path / "run", objects, Known(tmp_path / "known"), check=check, local=is_local, etags=dict[str, str]()
    )
    with using_disk(mirror):
        yield tmp_path / "run"


def contents(objects: Objects) -> dict[str, bytes]:
    return {name: (objects.read(name) or (b"", ""))[0] for name in objects.list().entries}


def fill(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_bytes(b"weights")
    (folder / "a_state").write_bytes(b"state")


def commit(_digests: dict[str, str]) -> bytes:
    return b"all there"


def on_requests(monkeypatch: pytest.MonkeyPatch, see: Callable[[str, str], None]) -> None:
    """Call ``see`` before each request that changes the store."""
    for method in ("put", "put_new", "put_over", "delete"):
        original = getattr(Objects, method)

        def do(objects: Objects, name: str, *rest: Any, original: Any = original, method: str = method) -> Any:
            see("delete" if method == "delete" else "put", name)
            return original(objects, name, *rest)

        monkeypatch.setattr(Objects, method, do)


def test_a_file_is_in_the_store_before_it_is_on_the_disk(
    root: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    seen: list[tuple[str, str, bool]] = []
    on_requests(monkeypatch, lambda what, name: seen.append((what, name, (root / name).exists())))
    write_file(root / "iterations" / "a.json", b"one")
    write_file(root / "iterations" / "a.json", b"two")
    remove_file(root / "iterations" / "a.json")
    name = "iterations/a.json"
    assert seen == [("put", name, False), ("put", name, True), ("delete", name, True)]
    assert contents(objects) == {}
    assert len(checks) == 2 * len(seen)


def test_a_folder_is_announced_as_absent_and_its_manifest_is_last(
    root: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    on_requests(monkeypatch, lambda what, name: seen.append((what, name.removeprefix("checkpoints/000002/"))))
    write_folder(root / "checkpoints" / "000002", fill, commit)
    puts = [("put", name) for name in (".absent", "a_state", "policy/weights", "manifest.json")]
    assert seen == [*puts, ("delete", ".absent")]
    assert sorted(contents(objects)) == [
        f"checkpoints/000002/{name}" for name in ("a_state", "manifest.json", "policy/weights")
    ]
    seen.clear()
    remove_folder(root / "checkpoints" / "000002")
    gone = [("delete", name) for name in ("manifest.json", "a_state", "policy/weights", ".absent")]
    assert seen == [("put", ".absent"), *gone]
    assert contents(objects) == {}
    assert not (root / "checkpoints" / "000002").exists()


def test_links_and_moves(root: Path, objects: Objects) -> None:
    write_folder(root / "checkpoints" / "000002", fill, commit)
    write_link(root / "checkpoints" / "last_good", "000002")
    assert contents(objects)["checkpoints/last_good.link"] == b"000002"
    move(root / "checkpoints" / "000002", root / ".quarantine" / "1" / "000002")
    assert sorted(contents(objects)) == [
        *(f".quarantine/1/000002/{name}" for name in ("a_state", "manifest.json", "policy/weights")),
        "checkpoints/last_good.link",
    ]
    remove_file(root / "checkpoints" / "last_good")
    assert "checkpoints/last_good.link" not in contents(objects)


def test_what_is_of_this_machine_alone_stays_here(root: Path, objects: Objects, tmp_path: Path) -> None:
    write_file(root / "shards" / "000000" / "part.arrow", b"part")
    write_file(tmp_path / "beside", b"of somebody else")
    make_folder(root / ".a-fill.0123.tmp")
    write_file(root / ".a-fill.0123.tmp" / "weights", b"not yet")
    remove_folder(root / "shards" / "000000")
    assert contents(objects) == {}


@pytest.mark.parametrize("at", range(1, 6))
def test_a_request_that_fails_leaves_store_and_disk_as_they_were(
    at: int, root: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_file(root / "run.json", b"old")
    seen: list[str] = []

    def fail(what: str, name: str) -> None:
        seen.append(f"{what} {name}")
        if len(seen) == at:
            raise StorageError("the store is full")

    with monkeypatch.context() as faulty:
        on_requests(faulty, fail)
        with pytest.raises(StorageError, match="the store is full"):
            write_folder(root / "checkpoints" / "000002", fill, commit)
        seen[:] = [""] * (at - 1)
        with pytest.raises(StorageError, match="the store is full"):
            write_file(root / "run.json", b"new")
    assert [p.name for p in (root / "checkpoints").iterdir()] == []
    assert (root / "run.json").read_bytes() == b"old"
    bring_in_line(objects, tmp_path / "other", Known(tmp_path / "other.known"))
    assert [p.name for p in (tmp_path / "other").rglob("*")] == ["run.json"]
    assert (tmp_path / "other" / "run.json").read_bytes() == b"old"


def test_who_may_not_write_any_more_writes_nowhere(root: Path, objects: Objects, checks: list[str]) -> None:
    write_file(root / "run.json", b"old")
    checks.append("no")
    with pytest.raises(RunLockedError):
        write_file(root / "run.json", b"new")
    with pytest.raises(RunLockedError):
        remove_file(root / "run.json")
    assert contents(objects) == {"run.json": b"old"}
    assert (root / "run.json").read_bytes() == b"old"


def test_an_object_that_somebody_else_has_written_is_not_overwritten(root: Path, objects: Objects) -> None:
    write_file(root / "run.json", b"old")
    objects.put("run.json", b"of another process")
    with pytest.raises(RunLockedError, match=r"run\.json was changed by another process"):
        write_file(root / "run.json", b"new")
    objects.put("guards.json", b"of another process")
    with pytest.raises(RunLockedError, match=r"guards\.json was changed by another process"):
        write_file(root / "guards.json", b"new")
    assert contents(objects) == {"run.json": b"of another process", "guards.json": b"of another process"}
    assert (root / "run.json").read_bytes() == b"old"


def test_an_answer_that_was_lost_is_no_loss(root: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("put_new", "put_over"):
        original = getattr(Objects, method)
        monkeypatch.setattr(Objects, method, lambda *arguments, original=original: original(*arguments) and None)
    write_file(root / "run.json", b"one")
    write_file(root / "run.json", b"two")
    assert contents(objects) == {"run.json": b"two"}


def test_what_another_process_wrote_is_taken_over(
    root: Path, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "checkpoints" / "000002"
    (folder / "policy").mkdir(parents=True)
    (folder / "manifest.json").write_bytes(b"all there")
    fill_in = {"policy/weights": b"weights", "a_state": b"state"}
    for name, content in fill_in.items():
        (folder / name).write_bytes(content)
    seen: list[tuple[str, str]] = []
    on_requests(monkeypatch, lambda method, name: seen.append((method, name.removeprefix("checkpoints/000002/"))))
    adopt(folder)
    assert seen == [("put", ".absent"), ("put", "a_state"), ("put", "policy/weights"), ("put", "manifest.json"),
                    ("delete", ".absent")]  # fmt: skip
    assert contents(objects) == {
        f"checkpoints/000002/{name}": content for name, content in {**fill_in, "manifest.json": b"all there"}.items()
    }
    seen.clear()
    adopt(folder)
    assert seen == [], "the store has it"
    (folder / "a_state").write_bytes(b"another")
    adopt(folder)
    assert contents(objects)["checkpoints/000002/a_state"] == b"another"
