"""A worker of another machine gets what its shard reads, and nothing but its part goes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from s3_server import S3Server

from rlhf_core.contracts.durable import write_file, write_folder
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.shards import Shard, drop_shards
from rlhf_core.store import lease
from rlhf_core.store.address import CACHE
from rlhf_core.store.helping import compute_at, fetch_parts, helping, joining, share
from rlhf_core.store.objects import Objects
from rlhf_core.store.opening import reading, writing

SHARD = Shard(0, 2)
PART = "shards/000007/02_rollouts.0-of-2"
RUN = {
    "run.json": b"{}",
    "iterations/000004/06_update.json": b"long ago",
    "iterations/000005/06_update.json": b"policy of iteration 6",
    "iterations/000005/06_update.arrow": b"statistics",
    "iterations/000006/06_update.json": b"policy of iteration 7",
    "iterations/000007/01_prompts.arrow": b"prompts",
    "iterations/000007/01_prompts.json": b"their record",
    "checkpoints/000006/policy/model.safetensors": b"weights",
    "checkpoints/000006/manifest.json": b"{}",
}
FOR_ANSWERS = {
    "shards/000007/weights/weights.safetensors": b"handed out",
    "shards/000007/weights/manifest.json": b"{}",
    "shards/000007/01_prompts.foreseen.arrow": b"prompts",
}
PARTS = {"shards/000007/02_rollouts.1-of-2.arrow": b"a part", "shards/000007/02_rollouts.1-of-2.json": b"{}"}


@pytest.fixture
def there(url: str, objects: Objects) -> str:
    """The address of a run whose process is on another machine."""
    for name, content in {**RUN, **FOR_ANSWERS, **PARTS}.items():
        objects.put(name, content)
    return url


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def to_answer() -> set[str]:
    read = {name for name in RUN if name.startswith(("iterations/000007", "iterations/000006", "run"))}
    return read | {"iterations/000005/06_update.json"} | FOR_ANSWERS.keys()


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    share(tmp_path)
    fetch_parts(tmp_path, 7)
    assert compute_at(tmp_path) == str(tmp_path)
    assert joining(str(tmp_path)) == tmp_path
    with helping(str(tmp_path), "generate", 7, SHARD) as folder:
        assert folder == tmp_path


def test_a_shard_has_what_it_reads_and_no_more(there: str, objects: Objects) -> None:
    assert files(joining(there)) == {"run.json"}
    with helping(there, "score_rewards", 7, SHARD) as folder:
        assert files(folder) == {"run.json", "iterations/000007/01_prompts.arrow", "iterations/000007/01_prompts.json"}
    with helping(there, "generate", 7, SHARD) as folder:
        assert files(folder) == to_answer()
    objects.put(f"{PART}.arrow", b"of a worker that died")
    with helping(there, "generate", 7, SHARD) as folder:
        assert files(folder) == to_answer() | {f"{PART}.arrow"}


def test_what_the_process_has_dropped_goes_here_too(there: str, objects: Objects) -> None:
    with helping(there, "generate", 7, SHARD):
        pass
    for name in {**FOR_ANSWERS, **PARTS, "run.json": b""}:
        objects.delete(name)
    objects.put("shards/000008/weights/manifest.json", b"{}")
    with helping(there, "generate", 8, SHARD) as folder:
        assert {name for name in files(folder) if name.startswith("shards/")} == {"shards/000008/weights/manifest.json"}


def test_a_policy_whose_iteration_is_archived_is_found(there: str, objects: Objects) -> None:
    with helping(there, "generate", 7, SHARD):
        pass
    objects.delete("iterations/000005/06_update.json")
    objects.delete("iterations/000005/06_update.arrow")
    records = {"archive/000000-000005/manifest.json", "archive/000000-000005/manifests.jsonl"}
    for name in {*records, "archive/000000-000005/02_rollouts.arrow"}:
        objects.put(name, b"{}")
    with helping(there, "generate", 7, SHARD) as folder:
        assert files(folder) == to_answer() - {"iterations/000005/06_update.json"} | records


def test_a_part_goes_to_the_store_with_its_record_last_and_nothing_else_does(
    there: str, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Objects.put
    sent: list[str] = []
    monkeypatch.setattr(Objects, "put", lambda self, name, content: (sent.append(name), put(self, name, content))[1])
    with helping(there, "generate", 7, SHARD) as folder:
        write_file(folder / f"{PART}.arrow", b"a part")
        write_file(folder / f"{PART}.json", b"{}")
        write_file(folder / "guards.json", b"{}")
    assert sent == [f"{PART}.arrow", f"{PART}.json"]
    assert (objects.read(f"{PART}.arrow") or [b""])[0] == b"a part"


def test_the_process_and_a_worker_of_another_machine_meet(
    url: str, objects: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with writing(url) as folder:
        write_file(folder / "run.json", b"{}")
        write_file(folder / min(PARTS), b"not shared yet")
        assert compute_at(folder) == str(folder)
        assert set(objects.list().entries) == {"run.json", lease.NAME}
        share(folder)
        assert compute_at(folder) == url
        assert files(folder) == {"run.json"}
        weights = folder / "shards" / "000007" / "weights"
        write_folder(weights, lambda path: (path / "w").touch(), lambda digests: json.dumps(digests).encode())
        with monkeypatch.context() as other:
            other.setenv(CACHE, str(tmp_path / "node"))
            with helping(url, "generate", 7, SHARD) as elsewhere:
                assert files(elsewhere / "shards" / "000007") == {"weights/w", "weights/manifest.json"}
                write_file(elsewhere / f"{PART}.arrow", b"a part")
                write_file(elsewhere / f"{PART}.json", b"{}")
        assert elsewhere != folder
        fetch_parts(folder, 7)
        assert (folder / f"{PART}.arrow").read_bytes() == b"a part"
        assert weights.is_dir()
        drop_shards(folder, 7)
        assert set(objects.list().entries) == {"run.json", lease.NAME}
    assert compute_at(folder) == str(folder)


def test_a_worker_of_the_same_machine_uses_the_copy(
    url: str, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(url) as folder:
        write_file(folder / "run.json", b"{}")
        share(folder)
        of_the_process = folder / "shards" / "000007" / "just being written"
        of_the_process.parent.mkdir(parents=True)
        of_the_process.touch()
        assert joining(url) == folder
        with helping(url, "generate", 7, SHARD) as same:
            assert same == folder
            write_file(same / f"{PART}.arrow", b"a part")
        assert of_the_process.exists(), "nobody but the process brings its copy in line"
        fetch_parts(folder, 7)
        assert (folder / f"{PART}.arrow").read_bytes() == b"a part"


def test_what_a_killed_process_has_left_is_taken_over(
    there: str, elsewhere: Callable[[], None], objects: Objects
) -> None:
    objects.put("shards/000006/03_scores.0-of-2.json", b"{}")
    elsewhere()
    with writing(there) as folder:
        assert not (folder / "shards").exists()
        share(folder)
        assert files(folder / "shards") == {
            name.removeprefix("shards/") for name in {*FOR_ANSWERS, *PARTS, "shards/000006/03_scores.0-of-2.json"}
        }
        for iteration in (6, 7):
            drop_shards(folder, iteration)
        assert not any(name.startswith("shards/") for name in objects.list().entries)


def test_readers_do_not_mind_shards(there: str) -> None:
    assert files(reading(there)) == set(RUN)


def test_who_joins_nothing_is_told(store: S3Server) -> None:
    url = f"s3://{store.new_bucket()}/nothing"
    with pytest.raises(UserError, match=f"{url} is not a run: it has no run.json"):
        joining(url)
