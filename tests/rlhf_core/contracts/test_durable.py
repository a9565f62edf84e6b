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
    hash_file,
    is_leftover,
    make_folder,
    remove_folder,
    remove_leftovers,
    write_file,
    write_folder,
    write_link,
)
from rlhf_core.contracts.errors import IntegrityError, StorageError
from rlhf_core.contracts.records import seal
from rlhf_core.contracts.schemas import FILE_STEMS

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
