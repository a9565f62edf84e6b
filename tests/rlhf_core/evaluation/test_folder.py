"""The folder of an evaluation: parts count only under their key and intact; nothing is mixed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rlhf_core.contracts.batches import Prompts
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.evaluation.folder import EvaluationFolder, new_record
from rlhf_core.evaluation.samples import Samples

MakeConfig = Callable[[Sequence[str]], RunConfig]


def samples(count: int, first_index: int = 0, score: float = 1.0) -> Samples:
    numbers = torch.full((2, count), score)
    tokens = torch.arange(6 * count).view(2 * count, 3)
    texts = [f"text {i}" for i in range(2 * count)]
    return Samples(
        [4, 7], first_index, texts, ["eos"] * len(texts), tokens, tokens % 3 < 2, numbers, numbers, numbers, numbers
    )


def prompts() -> Prompts:
    tokens = torch.tensor([[5, 6], [7, 0]])
    return Prompts([4, 7], ["a", "b"], [[], []], tokens, tokens > 0, [0, 0], [{}, {}])


@pytest.fixture
def record(tiny_config: MakeConfig, tmp_path: Path) -> dict[str, Any]:
    return new_record(tmp_path / "run/evaluations/e", tiny_config([]), {"source": "a"}, tmp_path / "run", 1)


@pytest.fixture
def folder(record: dict[str, Any], tmp_path: Path) -> EvaluationFolder:
    return EvaluationFolder.create(tmp_path / "run/evaluations/e", record, prompts())


def test_it_is_found_again(folder: EvaluationFolder, record: dict[str, Any], tmp_path: Path) -> None:
    for there in (EvaluationFolder.open(folder.path), EvaluationFolder.create(folder.path, record, prompts())):
        assert there.config == folder.config
        assert there.identity == {"source": "a"}
        assert there.num_trained_on == 1
        assert there.run_dir is not None
        assert there.run_dir.resolve() == (tmp_path / "run").resolve()
        assert there.prompts().texts == ["a", "b"]
        assert there.prompts().tokens_QP.tolist() == [[5, 6], [7, 0]]


def test_a_run_may_move_with_its_evaluations(folder: EvaluationFolder, tmp_path: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "moved")
    there = EvaluationFolder.open(tmp_path / "moved/evaluations/e").run_dir
    assert there is not None
    assert there.resolve() == (tmp_path / "moved").resolve()


def test_parts_are_joined_and_need_all_of_them(folder: EvaluationFolder) -> None:
    keys = [folder.key("digest", part, size) for part, size in ((0, 32), (1, 4))]
    folder.commit("000010", 0, samples(32), keys[0])
    with pytest.raises(IntegrityError, match=r"000010-001\.arrow is not committed"):
        folder.samples("000010", "digest", 36)
    folder.commit("000010", 1, samples(4, 32, score=2.0), keys[1])
    whole = folder.samples("000010", "digest", 36)
    assert whole.score_QK.tolist() == [[1.0] * 32 + [2.0] * 4] * 2
    assert whole.texts[:33] == [*(f"text {i}" for i in range(32)), "text 0"]


def test_a_part_counts_under_its_key_alone(folder: EvaluationFolder, record: dict[str, Any], tmp_path: Path) -> None:
    key = folder.key("digest", 0, 3)
    assert not folder.has("000010", 0, key)
    folder.commit("000010", 0, samples(3), key)
    assert folder.has("000010", 0, key)
    assert not folder.has("000020", 0, key)
    assert not folder.has("000010", 1, key)
    other = EvaluationFolder.create(tmp_path / "other", {**record, "identity": {"source": "b"}}, prompts())
    different = [folder.key("new", 0, 3), folder.key("digest", 1, 3), folder.key("digest", 0, 2)]
    for changed in [*different, other.key("digest", 0, 3)]:
        assert changed != key
        assert not folder.has("000010", 0, changed)


def test_damage_is_seen(folder: EvaluationFolder) -> None:
    key = folder.key("digest", 0, 3)
    folder.commit("model", 0, samples(3), key)
    path = folder.path / "parts/model-000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not folder.has("model", 0, key)
    with pytest.raises(IntegrityError, match="is damaged"):
        folder.samples("model", "digest", 3)


def test_a_part_without_its_record_is_not_committed(folder: EvaluationFolder) -> None:
    key = folder.key("digest", 0, 3)
    folder.commit("model", 0, samples(3), key)
    (folder.path / "parts/model-000.json").unlink()
    assert not folder.has("model", 0, key)


def test_other_settings_or_other_things_in_the_folder_are_refused(
    folder: EvaluationFolder, record: dict[str, Any], tmp_path: Path
) -> None:
    before = sorted(folder.path.rglob("*"))
    for changes in ({"identity": {"source": "b"}}, {"run": None}):
        with pytest.raises(UserError, match="holds an evaluation with other settings; choose a new folder"):
            EvaluationFolder.create(folder.path, {**record, **changes}, prompts())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    for path in (tmp_path / "full", tmp_path / "full/thesis.txt"):
        with pytest.raises(UserError, match="is not an empty folder; choose a new one"):
            EvaluationFolder.create(path, record, prompts())
    assert sorted(folder.path.rglob("*")) == before


def test_results_are_files_that_anything_opens(folder: EvaluationFolder) -> None:
    with pytest.raises(UserError, match=r"is not finished: it has no summary\.json"):
        folder.summary()
    table = pa.table({"prompt_id": [4, 7, 4], "prompt": ["a", "b", "a"]})
    folder.write_results(table, table, {"score": 1.5}, b"PNG")
    assert folder.summary() == {"score": 1.5}
    assert folder.side_by_side(2) == [{"prompt_id": 4, "prompt": "a"}, {"prompt_id": 7, "prompt": "b"}]
    assert pa.ipc.open_file(str(folder.path / "frontier.arrow")).read_all().num_rows == 3


def test_what_is_no_evaluation_is_refused(folder: EvaluationFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not an evaluation: it has no evaluation\.json"):
        EvaluationFolder.open(tmp_path)
    record = read_record(folder.path / "evaluation.json")
    del record["identity"]
    write_record(folder.path / "evaluation.json", record)
    with pytest.raises(IntegrityError, match="'identity' is missing"):
        EvaluationFolder.open(folder.path)
