"""Reading a run again: whatever was changed is found, told apart, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import DAMAGES, Damage, finished_run, flip, remove
from tiny_world import Tiny

from rlhf_core.contracts.durable import Disk, using_disk
from rlhf_core.contracts.errors import StorageError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.verification.findings import Verification
from rlhf_core.verification.run import verify_run


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tiny, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def seen(found: Verification) -> set[tuple[str, str]]:
    return {(finding.path, finding.kind) for finding in found.findings}


def test_a_finished_run_is_whole(finished: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify_run(finished, progress=lambda done, total: told.append((done, total)))
    assert (found.findings, found.summary()) == ([], "whole")
    assert (found.num_finished, found.num_checkpoints, found.newest_intact) == (3, 2, 3)
    assert found.num_files == 1 + 3 * 12 + sum(
        p.name != "manifest.json" and p.is_file() for p in finished.rglob("checkpoints/*/**/*")
    )
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_found_and_nothing_else(damage: Damage, run_dir: Path) -> None:
    damage.harm(run_dir)
    found = verify_run(run_dir, load_weights=False)
    assert seen(found) == damage.found
    assert bool(found.obstacles) == damage.stops_resume
    assert all(finding.problem and f"resume {run_dir} --repair" in finding.remedy for finding in found.findings)
    n = len(damage.found)
    assert found.summary() == f"{n} damaged, {n} recoverable by  rlhf resume {run_dir} --repair"


def test_an_unfinished_iteration_is_no_damage_and_what_is_damaged_in_it_is_told(run_dir: Path) -> None:
    remove(run_dir / "iterations/000002/06_update.json")  # killed between the artifact and its manifest
    remove(run_dir / "checkpoints/000003")
    for name in ("before_after.json", "report.png"):
        remove(run_dir / name)
    assert verify_run(run_dir).findings == []
    flip(run_dir / "iterations/000002/02_rollouts.arrow")
    flip(run_dir / "iterations/000002/03_scores.json")
    found = verify_run(run_dir)
    assert [f.path for f in found.damage] == [
        "iterations/000002/02_rollouts.arrow", "iterations/000002/03_scores.json",
    ]  # fmt: skip
    assert found.obstacles == []
    assert found.summary() == f"2 damaged, 2 recoverable by  rlhf resume {run_dir}"


def test_what_a_later_iteration_shows_was_finished_is_missing(run_dir: Path) -> None:
    remove(run_dir / "iterations/000002/06_update.json")  # but checkpoint 3 is there
    assert seen(verify_run(run_dir)) == {("iterations/000002/06_update.json", "missing")}


def test_strangers_and_leftovers_are_told_and_harmless(run_dir: Path) -> None:
    (run_dir / "notes.txt").touch()
    (run_dir / "iterations/000001/02_rollouts (copy).arrow").touch()
    (run_dir / "iterations/000001/.06_update.json.0a1b2c3d.tmp").touch()
    found = verify_run(run_dir)
    assert seen(found) == {
        ("notes.txt", "foreign"),
        ("iterations/000001/02_rollouts (copy).arrow", "foreign"),
        ("iterations/000001/.06_update.json.0a1b2c3d.tmp", "leftover"),
    }
    assert (found.damage, found.summary()) == ([], "whole")


def test_a_report_is_damaged_or_missing_and_written_again_by_a_resume(run_dir: Path) -> None:
    flip(run_dir / "report.png")
    flip(run_dir / "before_after.json")
    found = verify_run(run_dir)
    assert seen(found) == {("report.png", "damaged"), ("before_after.json", "damaged")}
    assert found.obstacles == []
    remove(run_dir / "before_after.json")
    remove(run_dir / "report.png")
    assert verify_run(run_dir).findings == [], "it was killed before it wrote them: a resume does"


def test_the_record_of_the_run_cannot_be_computed_again(run_dir: Path) -> None:
    for harm, kind in ((flip, "damaged"), (remove, "missing")):
        harm(run_dir / "run.json")
        found = verify_run(run_dir)
        assert seen(found) == {("run.json", kind)}
        assert "put run.json back from a copy" in found.findings[0].remedy
        assert found.summary() == "1 damaged, 1 only from a copy"


def test_the_record_of_another_run_condemns_itself_alone(run_dir: Path) -> None:
    record = read_record(run_dir / "run.json")
    write_record(run_dir / "run.json", {**record, "identity": {**record["identity"], "prompts": "0" * 64}})
    found = verify_run(run_dir)
    assert seen(found) == {("run.json", "damaged")}, "nothing else can be judged by it"
    assert found.findings[0].problem == "it is of another run: 20 of 20 manifests beside it have other identities"
    assert not found.findings[0].recoverable


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no run\.json"):
        verify_run(tmp_path)


def test_weights_that_do_not_load_are_found(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("size mismatch")

    monkeypatch.setattr("rlhf_core.verification.checkpoints.load_checkpoint", refuse)
    assert verify_run(run_dir, load_weights=False).findings == []
    found = verify_run(run_dir)
    assert seen(found) == {
        ("checkpoints/000002/manifest.json", "damaged"),
        ("checkpoints/000003/manifest.json", "damaged"),
    }
    assert "its weights do not load: size mismatch" in found.findings[0].problem


def test_a_run_that_is_going_is_read_twice_before_anything_is_called_damage(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = run_dir / "iterations/000002/03_scores.arrow"
    whole = scores.read_bytes()
    flip(scores)
    monkeypatch.setattr("rlhf_core.verification.run.time.sleep", lambda _: scores.write_bytes(whole))
    with RunFolder.open(run_dir).locked():
        assert verify_run(run_dir).findings == [], "its process has written it meanwhile"
        flip(scores)
        monkeypatch.setattr("rlhf_core.verification.run.time.sleep", lambda _: None)
        assert len(verify_run(run_dir).damage) == 1


def test_as_json(run_dir: Path) -> None:
    flip(run_dir / "iterations/000001/05_experience.arrow")
    told = json.loads(json.dumps(verify_run(run_dir).to_json()))
    assert (told["whole"], told["damaged"], told["recoverable"]) == (False, 1, 1)
    assert told["findings"][0].keys() == {"path", "kind", "problem", "remedy", "recoverable", "stops_resume"}


def test_a_disk_that_does_not_give_the_record_is_said_to_fail_not_the_record(finished: Path) -> None:
    class Failing(Disk):
        def reader(self, path: Path) -> Any:
            if path.name == "run.json":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().reader(path)

    with using_disk(Failing()), pytest.raises(StorageError, match="was not read: Input/output error"):
        verify_run(finished)
