"""Durable writes: the order of operations, what a failing disk leaves, and what a kill leaves behind."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf_core.contracts.artifacts import Manifest, commit_stage, read_artifact, read_manifest
from rlhf_core.contracts.durable import (
    Disk,
    hash_file,
    is_leftover,
    make_folder,
    open_lock,
    read_file,
    remove_folder,
    remove_leftovers,
    settle,
    using_disk,
    write_file,
    write_folder,
    write_link,
)
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.contracts.records import seal
from rlhf_core.contracts.stage_graph import FILE_STEMS

STAGE = "reference_logprobs"
TABLE = pa.table({"sample_id": ["a", "b"], "ref_logprobs": [[-1.5], [-2.0, -0.25]]})
FACTS: dict[str, Any] = {
    "key": "0" * 64, "inputs": {}, "seed": 7, "identity": "2" * 64, "metrics": {}, "state": {}, "timing": {},
}  # fmt: skip


class Recorder:
    """Records the durable operations of a test, and fails the one it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.fail_at: int | None = None
        fsync, rename = os.fsync, Path.replace

        def record(operation: str) -> None:
            if len(self.done) == self.fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.done.append(operation)

        def recorded_fsync(descriptor: int) -> None:
            name = Path(f"/proc/self/fd/{descriptor}").readlink()
            size = "" if name.is_dir() else f" {os.fstat(descriptor).st_size > 0}"
            record(f"fsync {_plain(name.name)}{size}")
            fsync(descriptor)

        def recorded_rename(source: Path, target: Path) -> Path:
            record(f"rename {_plain(source.name)} -> {target.name}")
            return rename(source, target)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(Path, "replace", recorded_rename)


def _plain(name: str) -> str:
    """``.run.json.a8f3.tmp`` as ``run.json~``: the random part left out."""
    return f"{name[1:].rsplit('.', 2)[0]}~" if name.endswith(".tmp") else name


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def fill(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights")
    (folder / "state.json").write_bytes(b"{}")


def sealed(digests: dict[str, str]) -> bytes:
    return seal({"files": digests})


def commit(run: Path, table: pa.Table = TABLE) -> Manifest:
    return commit_stage(run, STAGE, 0, table, **FACTS)


class TestDurability:
    """A write is: fsync of the written temporary file, rename, fsync of the folder; ``True``: it held data."""

    def test_a_file(self, tmp_path: Path, disk: Recorder) -> None:
        sha256 = write_file(tmp_path / "run.json", b"{}")
        assert sha256 == hashlib.sha256(b"{}").hexdigest() == hash_file(tmp_path / "run.json")
        assert disk.done == ["fsync run.json~ True", "rename run.json~ -> run.json", f"fsync {tmp_path.name}"]
        assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644

    def test_a_stage_is_committed_by_its_manifest(self, tmp_path: Path, disk: Recorder) -> None:
        make_folder(tmp_path / "iterations/000000")
        disk.done.clear()
        commit(tmp_path)
        stem = FILE_STEMS[STAGE]
        assert disk.done == [
            f"fsync {stem}.arrow~ True",
            f"rename {stem}.arrow~ -> {stem}.arrow",
            "fsync 000000",
            f"fsync {stem}.json~ True",
            f"rename {stem}.json~ -> {stem}.json",
            "fsync 000000",
        ]

    def test_a_folder(self, tmp_path: Path, disk: Recorder) -> None:
        write_folder(tmp_path / "000010", fill, commit=sealed)
        assert disk.done[:3] == ["fsync model.safetensors True", "fsync state.json True", "fsync manifest.json True"]
        assert disk.done[3:-2] == ["fsync policy", "fsync 000010~"]
        assert disk.done[-2:] == ["rename 000010~ -> 000010", f"fsync {tmp_path.name}"]

    def test_removing_a_folder(self, tmp_path: Path, disk: Recorder) -> None:
        write_folder(tmp_path / "000010", fill, commit=sealed)
        disk.done.clear()
        remove_folder(tmp_path / "000010")
        assert disk.done == ["rename 000010 -> .000010.removed", f"fsync {tmp_path.name}"]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("fail_at", range(6))
    def test_a_failing_stage_leaves_the_old_commit(self, tmp_path: Path, disk: Recorder, fail_at: int) -> None:
        old = commit(tmp_path)
        disk.fail_at = len(disk.done) + fail_at
        with pytest.raises(StorageError, match="No space left"):
            commit(tmp_path, TABLE.slice(0, 1))
        assert not [name for name in [p.name for p in tmp_path.rglob("*")] if name.endswith(".tmp")]
        found = read_manifest(tmp_path, STAGE, 0)
        assert found is not None
        if fail_at < 5:  # the manifest is renamed by operation 4
            assert found == old
        if fail_at < 2:  # the artifact is renamed by operation 1
            assert read_artifact(tmp_path, found.artifact).num_rows == 2
        elif fail_at < 5:  # a torn pair is seen, never read
            with pytest.raises(IntegrityError, match="is damaged"):
                read_artifact(tmp_path, found.artifact)

    @pytest.mark.parametrize("fail_at", range(6))
    def test_a_failing_folder_never_appears(self, tmp_path: Path, disk: Recorder, fail_at: int) -> None:
        disk.fail_at = fail_at
        with pytest.raises(StorageError, match="No space left"):
            write_folder(tmp_path / "000010", fill, commit=sealed)
        assert list(tmp_path.iterdir()) == []

    def test_a_failing_fill_never_appears(self, tmp_path: Path) -> None:
        def fail(folder: Path) -> None:
            fill(folder)
            raise MemoryError

        with pytest.raises(MemoryError):
            write_folder(tmp_path / "000010", fail, commit=sealed)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_fsync_is_not_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def fail(descriptor: int) -> None:
            calls.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            write_file(tmp_path / "run.json", b"{}")
        assert len(calls) == 1
        assert list(tmp_path.iterdir()) == []

    def test_removing_after_an_interrupted_removal(self, tmp_path: Path) -> None:
        (tmp_path / ".000010.removed").mkdir()
        (tmp_path / ".000010.removed" / "half").write_bytes(b"")
        write_folder(tmp_path / "000010", fill, sealed)
        remove_folder(tmp_path / "000010")
        assert list(tmp_path.iterdir()) == []

    def test_making_a_deep_folder_makes_each_name_durable(self, tmp_path: Path, disk: Recorder) -> None:
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
        assert disk.done == [f"fsync {tmp_path.name}", "fsync a"]

    def test_a_link_is_replaced_in_one_step(self, tmp_path: Path, disk: Recorder) -> None:
        for target in ("000002", "000004"):
            write_link(tmp_path / "last_good", target)
        assert (tmp_path / "last_good").readlink() == Path("000004")
        assert disk.done == ["rename last_good~ -> last_good", f"fsync {tmp_path.name}"] * 2

    def test_leftovers_of_a_kill_are_taken_away_and_nothing_else(self, tmp_path: Path) -> None:
        kept = tmp_path / "iterations" / "01_prompts.arrow"
        make_folder(kept.parent)
        write_file(kept, b"1")
        (tmp_path / ".hidden").touch()
        (kept.parent / ".01_prompts.arrow.0a1b2c3d.tmp").touch()
        (tmp_path / ".000010.removed" / "policy").mkdir(parents=True)
        (tmp_path / ".000010.removed" / "policy" / "model.safetensors").touch()
        removed = remove_leftovers(tmp_path)
        assert {p.name for p in removed} == {".01_prompts.arrow.0a1b2c3d.tmp", ".000010.removed"}
        assert {p.name for p in tmp_path.rglob("*")} == {"iterations", "01_prompts.arrow", ".hidden"}
        assert not any(is_leftover(p) for p in tmp_path.rglob("*"))


class RustyError(Exception):
    """As safetensors and tokenizers raise: the operating system's error stands in the text only."""


class BrokenDisk(Disk):
    """Fails all operations of some kinds with EIO, also those that clean up."""

    def __init__(self, *kinds: str) -> None:
        for kind in kinds:
            setattr(self, kind, self.fail)

    def fail(self, *_: object) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


class TestTakingOver:
    """``settle``: what a killed process had renamed, but not synced, is durable before anything builds on it."""

    def test_it_syncs_the_newest_iteration_and_each_room_and_the_run(self, tmp_path: Path, disk: Recorder) -> None:
        for name in ("iterations/000000", "iterations/000001", "checkpoints/000001"):
            (tmp_path / "run" / name).mkdir(parents=True)
        settle(tmp_path / "run")
        assert disk.done == [
            f"fsync {n}" for n in ("000001", "000001", "checkpoints", "iterations", "run", tmp_path.name)
        ]

    def test_the_alias_of_a_checkpoint_is_no_danger(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints" / "000002").mkdir(parents=True)
        write_link(tmp_path / "checkpoints" / "last_good", "000002")
        settle(tmp_path, links=("checkpoints/last_good",))
        with pytest.raises(IntegrityError, match="is a link: a run folder holds none"):
            settle(tmp_path)

    @pytest.mark.parametrize("place", ["iterations", "iterations/000000", "checkpoints", "run.json"])
    def test_a_link_through_which_a_write_would_leave_is_refused(self, tmp_path: Path, place: str) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        link = tmp_path / "run" / place
        link.parent.mkdir(parents=True)
        link.symlink_to(outside)
        with pytest.raises(IntegrityError, match=f"{place} is a link: .* remove it"):
            settle(tmp_path / "run")
        assert list(outside.iterdir()) == []

    def test_an_alias_that_leads_out_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "last_good").symlink_to("../../elsewhere")
        with pytest.raises(IntegrityError, match="last_good is a link"):
            settle(tmp_path / "run", links=("checkpoints/last_good",))

    def test_a_lock_is_never_made_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "lock").symlink_to(tmp_path / "victim")
        with pytest.raises(
            StorageError, match=r"lock was not written: Too many levels .*: remove the link that has its name"
        ):
            open_lock(tmp_path / "lock")
        assert not (tmp_path / "victim").exists()


class TestFailingDisks:
    def test_reading_is_told_in_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"1")
        for read in (read_file, hash_file):
            with using_disk(BrokenDisk("reader")), pytest.raises(StorageError) as caught:
                read(tmp_path / "a")
            assert str(caught.value) == (
                f"{tmp_path}/a was not read: Input/output error; nothing was changed: look after that disk, "
                "then run the same again or resume"
            )
            with pytest.raises(FileNotFoundError):
                read(tmp_path / "b")

    def test_a_failing_clean_up_does_not_hide_the_first_error(self, tmp_path: Path) -> None:
        class Full(BrokenDisk):
            def fsync(self, descriptor: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with using_disk(Full("unlink", "rmdir")), pytest.raises(StorageError, match="a was not written: No space left"):
            write_file(tmp_path / "a", b"1")
        with using_disk(Full("unlink", "rmdir")), pytest.raises(StorageError, match="b was not written: No space left"):
            write_folder(tmp_path / "b", fill, commit=sealed)
        assert {p.suffix for p in tmp_path.iterdir()} == {".tmp"}

    def test_what_a_library_in_rust_says_of_a_full_disk(self, tmp_path: Path) -> None:
        def full(folder: Path) -> None:
            raise RustyError("Error while serializing: I/O error: No space left on device (os error 28)")

        with pytest.raises(StorageError, match=r"000010 was not written: No space left on device; .* free some space"):
            write_folder(tmp_path / "000010", full, commit=sealed)
        assert list(tmp_path.iterdir()) == []

    def test_another_error_of_a_library_stays_its_own(self, tmp_path: Path) -> None:
        def wrong(folder: Path) -> None:
            raise RustyError("a tensor is not contiguous")

        with pytest.raises(RustyError):
            write_folder(tmp_path / "000010", wrong, commit=sealed)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "runs").touch()
        with pytest.raises(StorageError, match=r"runs was not written: .*: move away what is there"):
            write_file(tmp_path / "runs" / "run.json", b"1")


class TestNamesAndModes:
    def test_a_name_as_long_as_the_disk_takes_it(self, tmp_path: Path) -> None:
        name = "ü" * 127
        write_file(tmp_path / name, b"1")
        assert [p.name for p in tmp_path.iterdir()] == [name]

    def test_a_longer_one(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="File name too long; nothing is lost: choose a shorter name"):
            write_file(tmp_path / ("a" * 256), b"1")
        assert list(tmp_path.iterdir()) == []

    def test_a_temporary_name_is_never_taken_through_a_link(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("secrets.token_hex", lambda _: "0a1b2c3d")
        (tmp_path / ".a.0a1b2c3d.tmp").symlink_to(tmp_path / "victim")
        with pytest.raises(StorageError, match="a was not written: File exists"):
            write_file(tmp_path / "a", b"1")
        assert not (tmp_path / "victim").exists()

    def test_private_files_of_a_library_become_as_the_umask_wants_them(self, tmp_path: Path) -> None:
        def private(folder: Path) -> None:
            (folder / "model.safetensors").touch(mode=0o600)

        before = os.umask(0o027)
        try:
            write_folder(tmp_path / "000010", private, commit=sealed)
        finally:
            os.umask(before)
        modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / "000010", *(tmp_path / "000010").iterdir()]}
        assert modes == {"000010": 0o750, "model.safetensors": 0o640, "manifest.json": 0o640}
