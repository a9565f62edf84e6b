"""The archive gives back what was loose, bit for bit; nothing damaged or foreign comes out of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from old_iterations import commit_iteration, files_of

from rlhf_core.contracts import archive, artifacts
from rlhf_core.contracts.archive import MANIFESTS, find_segment, newest_archived, open_segment, segment_path
from rlhf_core.contracts.artifacts import artifact_path, encode_archived, read_artifact, read_manifest
from rlhf_core.contracts.compaction import (
    check_segment,
    loose_iterations,
    remove_archived,
    write_segment,
)
from rlhf_core.contracts.durable import hash_file, write_file
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.ipc_sizes import batch_message, decompressed_bytes
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS, STAGES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations, the first three of them in the archive, and still loose."""
    folder = tmp_path_factory.mktemp("made")
    for iteration in range(4):
        commit_iteration(folder, iteration, rows=2 + iteration)
    assert write_segment(folder, 0, 2) == []
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The same, for one test."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def only_archived(run: Path) -> Path:
    for iteration in range(3):
        remove_archived(run, iteration)
    return segment_path(run, 0, 2)


def forge(segment: Path, name: str, data: bytes) -> None:
    """Replace a file of a segment, with a record that vouches for it: what an attacker can do."""
    write_file(segment / name, data)
    record = read_record(segment / "manifest.json")
    record.pop("seal", None)
    record["files"][name] = hash_file(segment / name)
    write_record(segment / "manifest.json", record)


def read_both(run: Path, stage: str, iteration: int) -> pa.Table:
    manifest = read_manifest(run, stage, iteration)
    assert manifest is not None
    return read_artifact(run, manifest.artifact)


def in_small_batches(table: pa.Table, _provenance: object) -> bytes:
    """Other bytes for the same values, as another version of pyarrow may write."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


def recompressed(path: Path, change: Callable[[list[pa.RecordBatch]], list[pa.RecordBatch]]) -> bytes:
    reader = pa.ipc.open_file(pa.BufferReader(path.read_bytes()))
    batches = change([reader.get_batch(i) for i in range(reader.num_record_batches)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


class TestRoundTrip:
    def test_an_archived_artifact_has_the_bytes_it_had_when_it_was_loose(self, run: Path) -> None:
        before = files_of(run / "iterations")
        only_archived(run)
        assert loose_iterations(run) == [3]
        for iteration in range(3):
            segment = find_segment(run, iteration)
            assert segment is not None
            for stage, stem in FILE_STEMS.items():
                manifest = read_manifest(run, stage, iteration)
                assert manifest is not None
                place = f"{iteration:06d}/{stem}"
                assert encode_archived(segment, manifest.artifact) == before[f"{place}.arrow"]
                assert segment.manifest(stage, iteration) == before[f"{place}.json"]

    def test_readers_notice_no_difference(self, run: Path) -> None:
        there = [(read_manifest(run, stage, i), i) for stage in STAGES for i in range(4)]
        tables = [read_artifact(run, m.artifact) for m, _ in there if m is not None]
        only_archived(run)
        assert [(read_manifest(run, stage, i), i) for stage in STAGES for i in range(4)] == there
        again = [read_artifact(run, m.artifact) for m, _ in there if m is not None]
        assert len(again) == 24
        assert all(a.equals(b) for a, b in zip(again, tables, strict=True))

    def test_what_is_in_neither_place_is_not_committed(self, run: Path) -> None:
        only_archived(run)
        assert read_manifest(run, "generate", 4) is None
        assert newest_archived(run) == 2
        assert newest_archived(run / "elsewhere") is None

    def test_a_segment_is_one_table_a_stage_with_the_iteration_first(self, run: Path) -> None:
        for stage, stem in FILE_STEMS.items():
            table = pa.ipc.open_file(segment_path(run, 0, 2) / f"{stem}.arrow").read_all()
            assert table.column_names == ["iteration", *SCHEMAS[stage].names]
            assert table["iteration"].to_pylist() == [0] * 2 + [1] * 3 + [2] * 4

    def test_polars_and_duckdb_open_it(self, run: Path) -> None:
        pl, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
        path = segment_path(run, 0, 2) / "03_scores.arrow"
        assert pl.read_ipc(path)["iteration"].to_list() == [0] * 2 + [1] * 3 + [2] * 4
        scores = pa.ipc.open_file(path).read_all()  # noqa: F841 - duckdb finds it by its name
        assert duckdb.sql("select count(*) from scores where iteration = 1").fetchall() == [(3,)]

    def test_an_iteration_without_rows_comes_back_too(self, tmp_path: Path) -> None:
        commit_iteration(tmp_path, 0, rows=0)
        commit_iteration(tmp_path, 1)
        assert write_segment(tmp_path, 0, 1) == []
        assert check_segment(segment_path(tmp_path, 0, 1)) == []

    def test_another_pyarrow_reads_it_by_the_digest_of_the_segment(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segment = only_archived(run)
        manifest = read_manifest(run, "score_rewards", 1)
        assert manifest is not None
        monkeypatch.setattr(artifacts, "encode_table", in_small_batches)
        with pytest.raises(IntegrityError, match=r"03_scores\.arrow is damaged"):
            read_artifact(run, manifest.artifact)
        record = read_record(segment / "manifest.json")
        record.pop("seal", None)
        write_record(segment / "manifest.json", record | {"pyarrow": "1.0"})
        assert read_artifact(run, manifest.artifact).num_rows == 3


class TestWhatStaysLoose:
    def test_an_artifact_whose_bytes_cannot_be_made_again(self, run: Path) -> None:
        shutil.rmtree(run / "archive")
        manifest = read_manifest(run, "score_rewards", 1)
        assert manifest is not None
        path = run / manifest.artifact.path
        sha256 = write_file(path, in_small_batches(read_artifact(run, manifest.artifact), None))
        record = read_record(path.with_suffix(".json"))
        record.pop("seal", None)
        write_record(path.with_suffix(".json"), record | {"artifact": record["artifact"] | {"sha256": sha256}})
        (told,) = write_segment(run, 0, 2)
        assert told.startswith("iteration 1 stays out of the archive")
        assert "03_scores.arrow" in told
        assert open_segment(segment_path(run, 0, 2)).iterations == (0, 2)
        with pytest.raises(IntegrityError, match="not in the archive"):
            remove_archived(run, 1)
        assert read_artifact(run, replace(manifest.artifact, sha256=sha256)).num_rows == 3

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda folder: (folder / "02_rollouts.json").unlink(), "02_rollouts.json is missing"),
            (lambda folder: (folder / "02_rollouts.arrow").write_bytes(b"x"), "02_rollouts.arrow is damaged"),
            (lambda folder: (folder / "notes.txt").write_text("mine"), "no stage writes: notes.txt"),
            (shutil.rmtree, "is missing"),
        ],
    )
    def test_an_iteration_that_is_not_whole(self, run: Path, spoil: Callable[[Path], object], words: str) -> None:
        shutil.rmtree(run / "archive")
        spoil(run / "iterations/000001")
        (told,) = write_segment(run, 0, 2)
        assert words in told
        assert open_segment(segment_path(run, 0, 2)).iterations == (0, 2)

    def test_no_segment_is_written_for_nothing(self, run: Path) -> None:
        shutil.rmtree(run / "archive")
        (run / "iterations/000003/notes.txt").touch()
        with pytest.raises(IntegrityError, match=r"iteration 3 stays out of the archive: .*notes\.txt"):
            write_segment(run, 3, 3)
        assert list((run / "archive").iterdir()) == []

    def test_a_larger_table_than_is_ever_read_from_the_archive(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.rmtree(run / "archive")
        monkeypatch.setattr("rlhf_core.contracts.compaction.MAX_TABLE_BYTES", 100)
        with pytest.raises(IntegrityError, match="at most 100 are archived"):
            write_segment(run, 0, 2)


class TestRemoval:
    def test_both_places_may_hold_an_iteration_after_a_kill(self, run: Path) -> None:
        assert loose_iterations(run) == [0, 1, 2, 3]
        only_archived(run)
        assert loose_iterations(run) == [3]
        assert check_segment(segment_path(run, 0, 2)) == []

    def test_nothing_is_removed_that_the_archive_does_not_give_back(self, run: Path) -> None:
        segment = segment_path(run, 0, 2)
        path = segment / "03_scores.arrow"

        def other_score(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
            changed = batches[1].set_column(3, batches[1].schema.field(3), pa.array([9.0] * 3, pa.float32()))
            return [batches[0], changed, batches[2]]

        forge(segment, path.name, recompressed(path, other_score))
        with pytest.raises(IntegrityError, match="does not give the bytes"):
            remove_archived(run, 1)
        assert (run / "iterations/000001/03_scores.arrow").is_file()
        assert [(d.path, d.lost) for d in check_segment(segment)] == [(path, [("score_rewards", 1)])]

    def test_nothing_is_removed_that_was_committed_otherwise_since(self, run: Path) -> None:
        commit_iteration(run, 1, rows=1)
        with pytest.raises(IntegrityError, match="has archived another sample_prompts than"):
            remove_archived(run, 1)
        assert (run / "iterations/000001").is_dir()

    def test_nothing_of_a_person_is_removed(self, run: Path) -> None:
        (run / "iterations/000001/notes.txt").touch()
        with pytest.raises(IntegrityError, match=r"no stage writes: notes\.txt; move it away"):
            remove_archived(run, 1)


class TestDamage:
    @pytest.mark.parametrize("name", [*(f"{stem}.arrow" for stem in FILE_STEMS.values()), MANIFESTS, "manifest.json"])
    @pytest.mark.parametrize("how", ["a bit", "cut", "gone"])
    def test_is_seen_and_told(self, run: Path, name: str, how: str) -> None:
        segment = only_archived(run)
        data = bytearray((segment / name).read_bytes())
        data[len(data) // 2] ^= 4
        if how == "gone":
            (segment / name).unlink()
        else:
            (segment / name).write_bytes(bytes(data[:-20]) if how == "cut" else bytes(data))
        stages = [stage for stage, stem in FILE_STEMS.items() if name == f"{stem}.arrow"] or list(STAGES)
        (damage,) = check_segment(segment)
        assert sorted(damage.lost) == sorted((stage, i) for stage in stages for i in range(3))
        assert name in damage.sentence
        for stage in stages:
            with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
                read_both(run, stage, 1)

    def test_a_segment_under_another_name_is_refused(self, run: Path) -> None:
        segment = only_archived(run)
        segment.rename(segment_path(run, 3, 5))
        with pytest.raises(IntegrityError, match="not the record of an archive's segment"):
            read_manifest(run, "generate", 4)

    def test_a_surplus_file_is_told_but_loses_nothing(self, run: Path) -> None:
        segment = segment_path(run, 0, 2)
        (segment / "notes.txt").touch()
        (damage,) = check_segment(segment)
        assert (damage.path, damage.lost) == (segment / "notes.txt", [])

    def test_swapped_iterations_are_refused(self, run: Path) -> None:
        segment = only_archived(run)
        path = segment / "03_scores.arrow"
        forge(segment, path.name, recompressed(path, lambda batches: [batches[1], batches[0], batches[2]]))
        manifest = read_manifest(run, "score_rewards", 1)
        assert manifest is not None
        with pytest.raises(IntegrityError, match="holds rows of another one"):
            read_artifact(run, manifest.artifact)

    def test_swapped_manifests_are_refused(self, run: Path) -> None:
        segment = only_archived(run)
        lines = (segment / MANIFESTS).read_bytes().splitlines(keepends=True)
        forge(segment, MANIFESTS, b"".join([*lines[6:12], *lines[:6], *lines[12:]]))
        with pytest.raises(IntegrityError, match="belongs to generate of iteration 0"):
            read_manifest(run, "generate", 1)

    def test_another_schema_is_refused(self, run: Path) -> None:
        segment = only_archived(run)
        forge(segment, "03_scores.arrow", (segment / "04_ref_logprobs.arrow").read_bytes())
        (first, *_) = check_segment(segment)
        assert "another schema" in first.sentence

    def test_a_segment_that_is_replaced_is_read_anew(self, run: Path) -> None:
        segment = only_archived(run)
        assert find_segment(run, 1) is not None
        shutil.rmtree(segment)
        assert find_segment(run, 1) is None
        commit_iteration(run, 0)
        write_segment(run, 0, 2)
        assert open_segment(segment).iterations == (0,)

    @pytest.mark.parametrize(
        "record",
        [
            {"iterations": [0, 1]},
            {"iterations": [2, 1, 0]},
            {"iterations": [0, 1, True]},
            {"iterations": []},
            {"iterations": "012"},
            {"files": {}},
            {"extra": 1},
        ],
    )
    def test_a_record_that_does_not_fit_is_refused(self, run: Path, record: dict[str, object]) -> None:
        segment = only_archived(run)
        before = read_record(segment / "manifest.json")
        before.pop("seal", None)
        write_record(segment / "manifest.json", before | record)
        with pytest.raises(IntegrityError, match=r"manifest\.json is not the record|manifests for"):
            read_manifest(run, "generate", 1)


class TestSizes:
    def test_the_claimed_bytes_are_those_of_the_buffers(self) -> None:
        table = pa.table({"a": list(range(1000)), "b": [[1.0] * 3] * 1000, "c": ["x"] * 1000}).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            for rows in (10, 1000):
                writer.write_table(table.slice(0, rows).combine_chunks())
        file = pa.BufferReader(sink.getvalue())
        messages = [batch_message(file, i) for i in range(2)]
        for message, rows in zip(messages, (10, 1000), strict=True):
            needed = 8 * rows + (4 * (rows + 1) + 8 * 3 * rows) + (4 * (rows + 1) + rows)
            assert needed <= decompressed_bytes(message) < needed + 64 * 5  # buffers, and what pads them
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(message)), table.schema)
            assert batch.equals(table.slice(0, rows).combine_chunks().to_batches()[0])
        with pytest.raises(ValueError, match="no record batch 2"):
            batch_message(file, 2)

    def test_a_bomb_is_refused_before_it_is_decompressed(self, run: Path) -> None:
        segment = only_archived(run)
        path = segment / "02_rollouts.arrow"
        data = bytearray(path.read_bytes())
        with path.open("rb") as file:
            message = batch_message(file, 1)
        at = bytes(data).index(message)
        body = at + 8 + int.from_bytes(message[4:8], "little")
        data[body : body + 8] = (1 << 40).to_bytes(8, "little")
        forge(segment, path.name, bytes(data))
        manifest = read_manifest(run, "generate", 1)
        assert manifest is not None
        with pytest.raises(IntegrityError, match=r"would take 1099511\d+ bytes; at most"):
            read_artifact(run, manifest.artifact)

    def test_no_mutant_does_anything_but_give_the_same_or_an_error(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Mutants that the record vouches for: beyond what bit rot can do."""
        segment = only_archived(run)
        path = segment / "02_rollouts.arrow"
        whole, dice = path.read_bytes(), random.Random(0)
        manifest = read_manifest(run, "generate", 1)
        assert manifest is not None
        monkeypatch.setattr(archive, "_digest", lambda path, *_: open_segment(path.parent).files[path.name])
        outcomes = {"same": 0, "refused": 0}
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(dice.choice((1, 1, 2, 8))):
                data[dice.randrange(len(data))] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
            path.write_bytes(bytes(data[: dice.choice((len(data), len(data), dice.randrange(len(data))))]))
            try:
                assert read_artifact(run, manifest.artifact).num_rows == 3
                outcomes["same"] += 1
            except IntegrityError:
                outcomes["refused"] += 1
        assert min(outcomes.values()) > 20, json.dumps(outcomes)


def test_the_place_of_an_artifact_in_its_manifest_is_the_loose_one(run: Path) -> None:
    only_archived(run)
    manifest = read_manifest(run, "generate", 0)
    assert manifest is not None
    assert manifest.artifact.path == artifact_path(0, "generate")
