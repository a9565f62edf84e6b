"""Artifacts, manifests and folders: what is written comes back, and nothing torn or foreign is ever read."""

from __future__ import annotations

import contextlib
import hashlib
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
    commit_folder,
    commit_stage,
    conform,
    encode_table,
    read_artifact,
    read_manifest,
)
from rlhf_core.contracts.durable import hash_file, write_file
from rlhf_core.contracts.errors import IntegrityError, NumericalError, StorageError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.schemas import SCHEMA_VERSION
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS, STAGES

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
        assert table.schema.equals(SCHEMAS[STAGE])
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
        manifest = commit(tmp_path, SCHEMAS[STAGE].empty_table())
        assert read_artifact(tmp_path, manifest.artifact).num_rows == 0

    def test_numbers_that_json_lacks_never_reach_a_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(NumericalError, match="nan as the metric objective/kl; nothing of it is committed"):
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
            SCHEMAS["score_rewards"],
            SCHEMAS[STAGE].append(pa.field("extra", pa.int8(), nullable=False)),
            pa.schema(list(SCHEMAS[STAGE])[::-1]),
            pa.schema([field.with_nullable(nullable=True) for field in SCHEMAS[STAGE]]),
        ],
    )
    def test_foreign_schema_shows_both(self, tmp_path: Path, schema: pa.Schema) -> None:
        path = tmp_path / artifact_path(0, STAGE)
        sha256 = write_file(path, encode_table(schema.empty_table(), {}))
        ref = replace(commit(tmp_path / "other").artifact, sha256=sha256)
        with pytest.raises(IntegrityError, match=f"has another schema than {STAGE} writes") as caught:
            read_artifact(tmp_path, ref)
        assert str(SCHEMAS[STAGE]) in str(caught.value)
        assert str(schema) in str(caught.value)

    def test_invalid_values(self, tmp_path: Path) -> None:
        """Offsets that point outside: only ``validate(full=True)`` sees them."""
        floats = SCHEMAS[STAGE].field("ref_logprobs").type.value_type
        offsets = pa.array([0, 9, 1], pa.int32())
        lists = pa.Array.from_buffers(
            pa.list_(pa.field("item", floats, nullable=False)),
            2,
            [None, offsets.buffers()[1]],
            children=[pa.array([1.0], pa.float32())],
        )
        table = pa.Table.from_arrays([pa.array(["a", "b"]), lists], schema=SCHEMAS[STAGE])
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
        assert str(SCHEMAS[STAGE]) in message

    def test_another_type_is_refused(self) -> None:
        self.refused(pa.table({"sample_id": ["a"], "ref_logprobs": [["one"]]}))

    def test_a_number_that_does_not_fit_is_refused(self) -> None:
        row = {field.name: [False if pa.types.is_boolean(field.type) else 1] for field in SCHEMAS["ppo_update"]}
        conform(pa.table(row), "ppo_update")
        self.refused(pa.table({**row, "step": [2**40]}), "ppo_update")

    def test_nothing_is_committed(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not its schema"):
            commit(tmp_path, TABLE.select(["sample_id"]))
        assert files_of(tmp_path) == set()


class TestManifest:
    def alter(self, run: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = (run / artifact_path(0, STAGE)).with_suffix(".json")
        values = read_record(path)
        change(values)
        write_record(path, values)

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


def fill(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights")
    (folder / "state.json").write_bytes(b"{}")


class TestFolder:
    def test_round_trip(self, tmp_path: Path) -> None:
        digests = commit_folder(tmp_path / "deep" / "000010", fill, {"iteration": 10})
        assert digests == {
            "policy/model.safetensors": hashlib.sha256(b"weights").hexdigest(),
            "state.json": hashlib.sha256(b"{}").hexdigest(),
        }
        assert check_folder(tmp_path / "deep" / "000010") == {"iteration": 10, "files": digests}
        assert (tmp_path / "deep" / "000010").stat().st_mode & 0o777 == 0o755

    def test_it_is_never_written_over(self, tmp_path: Path) -> None:
        commit_folder(tmp_path / "000010", fill, {})
        with pytest.raises(StorageError, match=r"not empty|exists"):
            commit_folder(tmp_path / "000010", lambda folder: (folder / "other").touch(), {})
        assert check_folder(tmp_path / "000010")["files"].keys() == {"policy/model.safetensors", "state.json"}
        assert [p.name for p in tmp_path.iterdir()] == ["000010"]

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda f: (f / "policy/model.safetensors").write_bytes(b"weightz"), "model.safetensors is damaged"),
            (lambda f: (f / "state.json").unlink(), "state.json is missing, though it was committed"),
            (lambda f: (f / "manifest.json").unlink(), "has no manifest.json: it was not committed"),
            (lambda f: (f / "manifest.json").write_bytes(b"{"), "manifest.json is damaged or foreign"),
            (lambda f: write_record(f / "manifest.json", {"file": 1}), "is not the manifest of a folder"),
            (lambda f: write_record(f / "manifest.json", {"files": ["state.json"]}), "is not the manifest of a folder"),
            (lambda f: (f / "policy/modeling.py").touch(), "never committed there: policy/modeling.py; move it away"),
            (lambda f: (f / "policy/extra.json").symlink_to("/etc/passwd"), "never committed there: policy/extra.json"),
        ],
    )
    def test_damage(self, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
        commit_folder(tmp_path / "000010", fill, {})
        damage(tmp_path / "000010")
        with pytest.raises(IntegrityError, match=sentence):
            check_folder(tmp_path / "000010")
