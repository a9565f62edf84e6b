"""Artifacts, manifests and folders: what is written comes back, and nothing torn or foreign is ever read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pytest

from rlhf_core.contracts.artifacts import (
    Manifest,
    artifact_path,
    check_folder,
    commit_stage,
    conform,
    encode_table,
    hash_file,
    read_artifact,
    read_json,
    read_manifest,
    remove_folder,
    write_file,
    write_folder,
)
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.schemas import FILE_STEMS, SCHEMA_VERSION, STAGES

STAGE = "reference_logprobs"
TABLE = pa.table({"sample_id": ["a", "b"], "ref_logprobs": [[-1.5], [-2.0, -0.25]]})
FACTS: dict[str, Any] = {
    "key": "0" * 64,
    "inputs": {"rollouts": "1" * 64},
    "seed": 7,
    "identity": "2" * 64,
    "metrics": {"objective/kl": 0.1},
    "state": {"cursor": {"epoch": 0, "position": 2}},
    "timing": {"total_s": 0.5},
}


def commit(run: Path, table: pa.Table = TABLE, iteration: int = 0, stage: str = STAGE, **facts: Any) -> Manifest:
    return commit_stage(run, stage, iteration, table, **FACTS | facts)


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class TestRoundTrip:
    def test_table_and_manifest(self, tmp_path: Path) -> None:
        manifest = commit(tmp_path, iteration=7)
        assert read_manifest(tmp_path, STAGE, 7) == manifest
        assert manifest.artifact.path == "iterations/000007/04_ref_logprobs.arrow"
        assert (manifest.artifact.stage, manifest.artifact.iteration, manifest.artifact.rows) == (STAGE, 7, 2)
        assert (manifest.schema_version, manifest.seed) == (SCHEMA_VERSION, 7)
        table = read_artifact(tmp_path, manifest.artifact)
        assert table.schema.equals(STAGES[STAGE])
        assert table.to_pylist() == TABLE.to_pylist()
        assert files_of(tmp_path) == {f"iterations/000007/04_ref_logprobs{end}" for end in (".arrow", ".json")}

    def test_the_digest_is_that_of_the_file(self, tmp_path: Path) -> None:
        manifest = commit(tmp_path)
        data = (tmp_path / manifest.artifact.path).read_bytes()
        assert manifest.artifact.sha256 == hashlib.sha256(data).hexdigest()

    def test_no_commit_no_manifest(self, tmp_path: Path) -> None:
        assert read_manifest(tmp_path, STAGE, 0) is None

    def test_equal_tables_are_equal_bytes(self, tmp_path: Path) -> None:
        """However it is chunked, sliced, ordered or typed in memory; and whatever the clock and the folder are."""
        whole = commit(tmp_path / "a")
        doubled = pa.concat_tables([TABLE, TABLE])
        ids, lists = TABLE.columns
        for number, same in enumerate(
            (
                pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 1)]),
                doubled.slice(1, 2).take([1, 0]),
                pa.table({"ref_logprobs": lists.cast(pa.large_list(pa.float64())), "sample_id": ids}),
                TABLE.replace_schema_metadata({"written": "today"}),
            )
        ):
            assert commit(tmp_path / str(number), same, timing={"total_s": number + 1.0}).artifact == whole.artifact

    def test_other_provenance_is_another_file(self, tmp_path: Path) -> None:
        digests = {
            commit(tmp_path / "a").artifact.sha256,
            commit(tmp_path / "b", seed=8).artifact.sha256,
            commit(tmp_path / "c", inputs={"rollouts": "3" * 64}).artifact.sha256,
            commit(tmp_path / "d", identity="3" * 64).artifact.sha256,
            commit(tmp_path / "e", iteration=1).artifact.sha256,
        }
        assert len(digests) == 5

    def test_provenance_is_in_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / commit(tmp_path).artifact.path
        metadata = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata
        assert metadata[b"rlhf.schema"] == f"{STAGE}/{SCHEMA_VERSION}".encode()
        assert metadata[b"rlhf.inputs"] == b'{"rollouts":"%s"}' % (b"1" * 64)
        assert {b"rlhf.iteration", b"rlhf.seed", b"rlhf.key", b"rlhf.identity"} <= metadata.keys()

    def test_polars_opens_it(self, tmp_path: Path) -> None:
        path = tmp_path / commit(tmp_path).artifact.path
        assert polars.read_ipc(path)["ref_logprobs"].to_list() == [[-1.5], [-2.0, -0.25]]

    def test_a_new_commit_replaces_the_old_one(self, tmp_path: Path) -> None:
        first = commit(tmp_path)
        second = commit(tmp_path, TABLE.slice(0, 1))
        assert read_manifest(tmp_path, STAGE, 0) == second
        assert read_artifact(tmp_path, second.artifact).num_rows == 1
        with pytest.raises(IntegrityError, match="is damaged"):
            read_artifact(tmp_path, first.artifact)

    def test_an_empty_table(self, tmp_path: Path) -> None:
        manifest = commit(tmp_path, STAGES[STAGE].empty_table())
        assert read_artifact(tmp_path, manifest.artifact).num_rows == 0

    def test_numbers_that_json_lacks_never_reach_a_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            commit(tmp_path, metrics={"objective/kl": float("nan")})
        assert read_manifest(tmp_path, STAGE, 0) is None

    @pytest.mark.parametrize("stage", STAGES)
    def test_path_of_every_stage(self, stage: str) -> None:
        assert artifact_path(12, stage) == f"iterations/000012/{FILE_STEMS[stage]}.arrow"


class TestDamage:
    def test_a_flipped_byte_is_caught_before_parsing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ref = commit(tmp_path).artifact
        path = tmp_path / ref.path
        data = path.read_bytes()
        monkeypatch.setattr(pa.ipc, "open_file", lambda *_: pytest.fail("parsed"))
        for position in range(0, len(data), 7):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(IntegrityError, match=r"is damaged: sha256 .* committed as"):
                read_artifact(tmp_path, ref)

    @pytest.mark.parametrize("keep", [0, 1, -1])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        ref = commit(tmp_path).artifact
        path = tmp_path / ref.path
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(IntegrityError, match="is damaged"):
            read_artifact(tmp_path, ref)

    def test_missing(self, tmp_path: Path) -> None:
        ref = commit(tmp_path).artifact
        (tmp_path / ref.path).unlink()
        with pytest.raises(IntegrityError, match=r"04_ref_logprobs\.arrow is missing, though its stage is committed"):
            read_artifact(tmp_path, ref)

    def test_swapped_files(self, tmp_path: Path) -> None:
        first, second = commit(tmp_path).artifact, commit(tmp_path, TABLE.slice(1), iteration=1).artifact
        (tmp_path / first.path).write_bytes((tmp_path / second.path).read_bytes())
        with pytest.raises(IntegrityError, match="is damaged"):
            read_artifact(tmp_path, first)

    @pytest.mark.parametrize(
        "schema",
        [
            STAGES["score_rewards"],
            STAGES[STAGE].append(pa.field("extra", pa.int8(), nullable=False)),
            pa.schema(list(STAGES[STAGE])[::-1]),
            pa.schema([field.with_nullable(nullable=True) for field in STAGES[STAGE]]),
        ],
    )
    def test_foreign_schema_shows_both(self, tmp_path: Path, schema: pa.Schema) -> None:
        path = tmp_path / artifact_path(0, STAGE)
        sha256 = write_file(path, encode_table(schema.empty_table(), {}))
        ref = replace(commit(tmp_path / "other").artifact, sha256=sha256)
        with pytest.raises(IntegrityError, match=f"has another schema than {STAGE} writes") as caught:
            read_artifact(tmp_path, ref)
        assert str(STAGES[STAGE]) in str(caught.value)
        assert str(schema) in str(caught.value)

    def test_invalid_values(self, tmp_path: Path) -> None:
        """Offsets that point outside: only ``validate(full=True)`` sees them."""
        floats = STAGES[STAGE].field("ref_logprobs").type.value_type
        offsets = pa.array([0, 9, 1], pa.int32())
        lists = pa.Array.from_buffers(
            pa.list_(pa.field("item", floats, nullable=False)),
            2,
            [None, offsets.buffers()[1]],
            children=[pa.array([1.0], pa.float32())],
        )
        table = pa.Table.from_arrays([pa.array(["a", "b"]), lists], schema=STAGES[STAGE])
        sha256 = write_file(tmp_path / artifact_path(0, STAGE), encode_table(table, {}))
        ref = replace(commit(tmp_path / "other").artifact, sha256=sha256)
        with pytest.raises(IntegrityError, match="is not a valid Arrow file"):
            read_artifact(tmp_path, ref)

    def test_bytes_that_are_no_arrow_file_but_were_committed_as_one(self, tmp_path: Path) -> None:
        """Whoever can write a manifest can name any digest: parsing must still end in one kind of error."""
        ref = commit(tmp_path).artifact
        path = tmp_path / ref.path
        data = path.read_bytes()
        for position in range(0, len(data), 7):
            path.write_bytes(data[:position] + bytes([data[position] ^ 0x80]) + data[position + 1 :])
            with contextlib.suppress(IntegrityError):
                read_artifact(tmp_path, replace(ref, sha256=hash_file(path)))


class TestConform:
    def refused(self, table: pa.Table, stage: str = STAGE) -> str:
        with pytest.raises(ValueError, match=f"{stage} wrote a table that is not its schema") as caught:
            conform(table, stage)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("ids", "lists"),
        [([None, "b"], [[1.0], [2.0]]), (["a", "b"], [None, [2.0]]), (["a", "b"], [[1.0, None], [2.0]])],
        ids=["in a column", "a whole list", "inside a list"],
    )
    def test_a_null_is_refused(self, ids: list[str], lists: list[Any]) -> None:
        self.refused(pa.table({"sample_id": ids, "ref_logprobs": pa.array(lists, pa.list_(pa.float32()))}))

    @pytest.mark.parametrize("component", [None, {"name": None, "score": 1.0}, {"name": "a", "score": None}])
    def test_a_null_in_a_structure_is_refused(self, component: Any) -> None:
        kind = pa.list_(pa.struct([("name", pa.string()), ("score", pa.float32())]))
        table = pa.table(
            {"sample_id": ["a"], "components": pa.array([[component]], kind), "score": pa.array([1.0], pa.float32())}
        )
        self.refused(table, "score_rewards")

    def test_a_missing_column_is_named(self) -> None:
        message = self.refused(TABLE.select(["sample_id"]))
        assert "ref_logprobs" in message
        assert str(STAGES[STAGE]) in message

    def test_another_type_is_refused(self) -> None:
        self.refused(pa.table({"sample_id": ["a"], "ref_logprobs": [["one"]]}))

    def test_a_number_that_does_not_fit_is_refused(self) -> None:
        row = {field.name: [False if pa.types.is_boolean(field.type) else 1] for field in STAGES["ppo_update"]}
        conform(pa.table(row), "ppo_update")
        self.refused(pa.table({**row, "step": [2**40]}), "ppo_update")

    def test_nothing_is_committed(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not its schema"):
            commit(tmp_path, TABLE.select(["sample_id"]))
        assert files_of(tmp_path) == set()


class TestManifest:
    def alter(self, run: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = (run / artifact_path(0, STAGE)).with_suffix(".json")
        values = json.loads(path.read_bytes())
        change(values)
        path.write_text(json.dumps(values))

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda m: m["artifact"].update(stage="generate"), "belongs to generate of iteration 0"),
            (lambda m: m["artifact"].update(iteration=3), "belongs to reference_logprobs of iteration 3"),
            (lambda m: m["artifact"].update(path="../../etc/passwd"), "belongs to"),
            (lambda m: m.update(schema_version=99), f"has schema version 99, this release reads {SCHEMA_VERSION}"),
            (lambda m: m.pop("key"), "is not a stage manifest"),
            (lambda m: m.pop("artifact"), "is not a stage manifest"),
            (lambda m: m.update(artifact=[1]), "is not a stage manifest"),
            (lambda m: m.update(extra=1), "is not a stage manifest"),
            (lambda m: m["artifact"].pop("sha256"), "is not a stage manifest"),
        ],
    )
    def test_foreign(self, tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str) -> None:
        commit(tmp_path)
        self.alter(tmp_path, change)
        with pytest.raises(IntegrityError, match=sentence) as caught:
            read_manifest(tmp_path, STAGE, 0)
        assert "04_ref_logprobs.json" in str(caught.value)

    def test_of_another_iteration(self, tmp_path: Path) -> None:
        commit(tmp_path, iteration=0)
        (tmp_path / "iterations/000000").rename(tmp_path / "iterations/000001")
        with pytest.raises(IntegrityError, match=f"belongs to {STAGE} of iteration 0"):
            read_manifest(tmp_path, STAGE, 1)

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
    def test_json_is_strict(self, text: bytes, reason: str) -> None:
        with pytest.raises(IntegrityError, match=f"^it .*{reason}|^it {reason}"):
            read_json(text, origin="it")


class Disk:
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
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def fill(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights")
    (folder / "state.json").write_bytes(b"{}")


class TestDurability:
    """A write is: fsync of the written temporary file, rename, fsync of the folder; ``True``: it held data."""

    def test_a_file(self, tmp_path: Path, disk: Disk) -> None:
        sha256 = write_file(tmp_path / "run.json", b"{}")
        assert sha256 == hashlib.sha256(b"{}").hexdigest() == hash_file(tmp_path / "run.json")
        assert disk.done == ["fsync run.json~ True", "rename run.json~ -> run.json", f"fsync {tmp_path.name}"]
        assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644

    def test_a_stage_is_committed_by_its_manifest(self, tmp_path: Path, disk: Disk) -> None:
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

    def test_a_folder(self, tmp_path: Path, disk: Disk) -> None:
        write_folder(tmp_path / "000010", fill)
        assert disk.done[:2] == ["fsync model.safetensors True", "fsync state.json True"]
        assert disk.done[2:4] == ["fsync manifest.json~ True", "rename manifest.json~ -> manifest.json"]
        assert set(disk.done[4:-2]) == {"fsync 000010~", "fsync policy"}
        assert disk.done[-2:] == ["rename 000010~ -> 000010", f"fsync {tmp_path.name}"]

    def test_removing_a_folder(self, tmp_path: Path, disk: Disk) -> None:
        write_folder(tmp_path / "000010", fill)
        disk.done.clear()
        remove_folder(tmp_path / "000010")
        assert disk.done == ["rename 000010 -> .000010.removed", f"fsync {tmp_path.name}"]
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("fail_at", range(6))
    def test_a_failing_stage_leaves_the_old_commit(self, tmp_path: Path, disk: Disk, fail_at: int) -> None:
        old = commit(tmp_path)
        disk.fail_at = len(disk.done) + fail_at
        with pytest.raises(OSError, match="No space left"):
            commit(tmp_path, TABLE.slice(0, 1))
        assert not [name for name in files_of(tmp_path) if name.endswith(".tmp")]
        found = read_manifest(tmp_path, STAGE, 0)
        assert found is not None
        if fail_at < 5:  # the manifest is renamed by operation 4
            assert found == old
        if fail_at < 2:  # the artifact is renamed by operation 1
            assert read_artifact(tmp_path, found.artifact).num_rows == 2
        elif fail_at < 5:  # a torn pair is seen, never read
            with pytest.raises(IntegrityError, match="is damaged"):
                read_artifact(tmp_path, found.artifact)

    @pytest.mark.parametrize("fail_at", range(7))
    def test_a_failing_folder_never_appears(self, tmp_path: Path, disk: Disk, fail_at: int) -> None:
        disk.fail_at = fail_at
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / "000010", fill)
        assert list(tmp_path.iterdir()) == []

    def test_a_failing_fill_never_appears(self, tmp_path: Path) -> None:
        def fail(folder: Path) -> None:
            fill(folder)
            raise MemoryError

        with pytest.raises(MemoryError):
            write_folder(tmp_path / "000010", fail)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_fsync_is_not_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def fail(descriptor: int) -> None:
            calls.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            write_file(tmp_path / "run.json", b"{}")
        assert len(calls) == 1
        assert list(tmp_path.iterdir()) == []


class TestFolder:
    def test_round_trip(self, tmp_path: Path) -> None:
        digests = write_folder(tmp_path / "deep" / "000010", fill)
        assert digests == {
            "policy/model.safetensors": hashlib.sha256(b"weights").hexdigest(),
            "state.json": hashlib.sha256(b"{}").hexdigest(),
        }
        assert check_folder(tmp_path / "deep" / "000010") == digests
        assert (tmp_path / "deep" / "000010").stat().st_mode & 0o777 == 0o755

    def test_it_is_never_written_over(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "000010", fill)
        with pytest.raises(OSError, match=r"not empty|exists"):
            write_folder(tmp_path / "000010", lambda folder: (folder / "other").touch())
        assert check_folder(tmp_path / "000010").keys() == {"policy/model.safetensors", "state.json"}
        assert [p.name for p in tmp_path.iterdir()] == ["000010"]

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda f: (f / "policy/model.safetensors").write_bytes(b"weightz"), "model.safetensors is damaged"),
            (lambda f: (f / "state.json").unlink(), "state.json is missing from its checkpoint"),
            (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: it is not a committed checkpoint"),
            (lambda f: (f / "manifest.json").write_bytes(b"{"), "manifest.json is not valid JSON"),
            (lambda f: (f / "manifest.json").write_bytes(b"{}"), "manifest.json"),
            (lambda f: (f / "manifest.json").write_bytes(b'{"files": ["state.json"]}'), "manifest.json"),
        ],
    )
    def test_damage(self, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
        write_folder(tmp_path / "000010", fill)
        damage(tmp_path / "000010")
        with pytest.raises(IntegrityError, match=sentence):
            check_folder(tmp_path / "000010")

    def test_removing_after_an_interrupted_removal(self, tmp_path: Path) -> None:
        (tmp_path / ".000010.removed").mkdir()
        (tmp_path / ".000010.removed" / "half").write_bytes(b"")
        write_folder(tmp_path / "000010", fill)
        remove_folder(tmp_path / "000010")
        assert list(tmp_path.iterdir()) == []
