"""What a page shows is what the artifacts hold, number for number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from page_contents import decoded

from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.contracts.records import read_record, write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.inspection import iteration_rows, sample_tokens
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.tables import PER_TOKEN, RunTables
from rlhf_core.viewer import contents as module
from rlhf_core.viewer.contents import newest_evaluation, page_contents, token_texts


@pytest.fixture(scope="module")
def shown(run: RunFolder) -> dict[str, Any]:
    return page_contents(run, [0, 2], limit=None, with_evaluation=True)


def test_numbers_of_tokens_are_those_of_the_artifacts(run: RunFolder, shown: dict[str, Any]) -> None:
    rows = RunTables(run).samples([0, 2]).arrow().to_pylist()
    for name, column in PER_TOKEN.items():
        expected = [value for row in rows for value in row[column]]
        if name == "token_id":
            texts = [shown["vocabulary"][i] for i in decoded(shown["tokens"]["token"])]
            assert texts == token_texts(load_tokenizer(run.config.policy.model, field=""), expected)
        else:
            assert decoded(shown["tokens"][name]).tolist() == expected, name


def test_numbers_of_samples_are_those_of_the_artifacts(run: RunFolder, shown: dict[str, Any]) -> None:
    rows = RunTables(run).samples([0, 2]).arrow().to_pylist()
    samples = shown["samples"]
    numbers = {name: decoded(column).tolist() for name, column in samples["numbers"].items()}
    assert samples["id"] == [row["sample_id"] for row in rows]
    assert samples["response"] == [row["response_text"] for row in rows]
    assert [shown["prompts"][i] for i in numbers["prompt"]] == [row["prompt_text"] for row in rows]
    assert [shown["finish_reasons"][i] for i in numbers["finish_reason"]] == [row["finish_reason"] for row in rows]
    for name in ("iteration", "score", "score_shaped", "kl", "k3", "rlhf_reward"):
        assert numbers[name] == [row[name] for row in rows], name
    assert numbers["length"] == [len(row["response_tokens"]) for row in rows]
    assert numbers["max_abs_advantage"] == [max(map(abs, row["advantages"])) for row in rows]
    (name,) = samples["components"]
    assert decoded(samples["components"][name]).tolist() == [row["components"][0]["score"] for row in rows]


def test_a_sample_is_what_inspect_says_of_it(run: RunFolder, shown: dict[str, Any]) -> None:
    sample_id = shown["samples"]["id"][0]
    length = int(decoded(shown["samples"]["numbers"]["length"])[0])
    _, tokens = sample_tokens(run, sample_id)
    for name in ("logprob", "kl", "advantage"):
        assert decoded(shown["tokens"][name])[:length].tolist() == [token[name] for token in tokens]


def test_curves_are_the_iterations(run: RunFolder, shown: dict[str, Any]) -> None:
    rows = iteration_rows(run)
    assert shown["curves"]["iteration"] == [0, 1, 2]
    assert shown["curves"]["kl"] == [row["kl"] for row in rows]
    assert shown["run"]["shown"] == [0, 2]
    assert shown["run"]["kl_target"] == run.config.kl.target == 0.5
    assert "seconds" not in shown["curves"], "a clock would make equal runs differ"
    assert len(shown["before_after"]) == len(read_record(run.path / "before_after.json")["samples"]) > 0
    assert shown["evaluation"] is None


def test_a_limit_takes_the_first_of_each_iteration(run: RunFolder, shown: dict[str, Any]) -> None:
    few = page_contents(run, [0, 2], limit=3, with_evaluation=False)
    ids = shown["samples"]["id"]
    assert few["samples"]["id"] == [*ids[:3], *ids[8:11]]
    assert few["run"]["num_responses"] == 16
    assert len(decoded(few["tokens"]["kl"])) == decoded(few["samples"]["numbers"]["length"]).sum()


def test_too_many_tokens_are_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 40)
    with pytest.raises(UserError, match=r"more than 40 tokens, too many for one page; choose fewer --iterations"):
        page_contents(run, [0, 1, 2], limit=None, with_evaluation=False)
    page_contents(run, [0, 1, 2], limit=1, with_evaluation=False)


def test_without_its_tokenizer_tokens_are_their_ids_and_the_page_says_so(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str, adapter: str | None) -> None:
        raise UserError(f"policy.model {name!r} has no tokenizer that loads ({adapter})")

    monkeypatch.setattr(module, "load_tokenizer_of", gone)
    found = page_contents(run, [0], limit=1, with_evaluation=False)
    assert found["run"]["note"] == module.NO_TOKENIZER
    first = RunTables(run).samples([0]).arrow()["response_tokens"][0].as_py()
    assert [found["vocabulary"][i] for i in decoded(found["tokens"]["token"])] == [f"⟨{t}⟩" for t in first]


def test_without_a_critic_there_are_no_values(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    table = RunTables(run).samples([0]).arrow()
    for name in ("values", "returns"):
        at = table.schema.get_field_index(name)
        none = pa.array([[]] * table.num_rows, table.schema.field(name).type)
        table = table.set_column(at, table.schema.field(name), none)
    monkeypatch.setattr(RunTables, "_samples", lambda _self, _iteration: table)
    tokens = page_contents(run, [0], limit=None, with_evaluation=False)["tokens"]
    assert tokens["value"] is None
    assert tokens["return"] is None
    assert tokens["advantage"] is not None


def test_token_texts_keep_the_space_before_a_word() -> None:
    class Stripping:
        """A tokenizer that takes the space off the beginning of a text, as sentencepiece does."""

        WORDS = ("a", " the", " film", "�")

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [self.WORDS.index(text)]}

        def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
            return "".join(self.WORDS[i] for i in ids).removeprefix(" ")

    assert token_texts(cast("Any", Stripping()), [1, 2, 3, 0]) == [" the", " film", "�", "a"]


class TestEvaluation:
    @pytest.fixture
    def evaluated(self, run: RunFolder, tmp_path: Path) -> RunFolder:
        from rlhf_core.evaluation.folder import FRONTIER, EvaluationFolder, new_record

        copied = RunFolder.open(shutil.copytree(run.path, tmp_path / "run", symlinks=True))
        folder = copied.path / "evaluations" / "held-out"
        folder.mkdir(parents=True)
        write_record(folder / "evaluation.json", new_record(folder, run.config, run.identity, copied.path, 0))
        between = {"mean": 1.5, "low": 1.0, "high": 2.0}
        summary = {
            "reference": {"score": between},
            "best_of_n": [{"n": 2, "kl": 0.19, "score": between}],
            "policies": {
                "000003@0.5": {"kl": between, "score": between, "share_of_attainable": None},
                "000003": {"kl": between, "score": between, "share_of_attainable": between},
            },
        }
        rows = [
            {"beta": np.inf, "kl": 0.0, "score": 1.0, "score_by_half": 1.0, "ess": 8.0, "trusted": True},
            {"beta": 0.1, "kl": 2.0, "score": 2.0, "score_by_half": 1.9, "ess": 2.0, "trusted": False},
        ]
        frontier = pa.Table.from_pylist(rows, schema=FRONTIER)
        EvaluationFolder.open(folder).write_results(frontier, frontier, summary, b"")
        return copied

    def test_it_gives_the_frontier_and_the_policies(self, evaluated: RunFolder) -> None:
        found = newest_evaluation(evaluated)
        assert found is not None
        assert found["name"] == "held-out"
        assert found["frontier"] == {"kl": [0.0, 2.0], "score": [1.0, 2.0], "trusted": [True, False]}
        assert [(p["name"], p["base"], p["share"]) for p in found["policies"]] == [
            ("000003@0.5", "000003", None), ("000003", "000003", 1.5),
        ]  # fmt: skip
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_one_that_is_not_finished_does_not_count(self, evaluated: RunFolder) -> None:
        (evaluated.path / "evaluations/held-out/summary.json").unlink()
        assert newest_evaluation(evaluated) is None

    @pytest.mark.parametrize(
        "text", ['{"reference": {}}', '{"reference": {"score": {"mean": "high"}}}', "[]", "{", '{"policies": 3}']
    )
    def test_a_foreign_summary_is_named(self, evaluated: RunFolder, text: str) -> None:
        (evaluated.path / "evaluations/held-out/summary.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"held-out/summary\.json"):
            newest_evaluation(evaluated)

    def test_a_frontier_that_is_gone_or_torn_is_named(self, evaluated: RunFolder) -> None:
        frontier = evaluated.path / "evaluations/held-out/frontier.arrow"
        frontier.write_bytes(frontier.read_bytes()[:100])
        with pytest.raises(IntegrityError, match=r"frontier\.arrow is not a valid Arrow file"):
            newest_evaluation(evaluated)
        frontier.unlink()
        with pytest.raises(IntegrityError, match=r"frontier\.arrow is missing"):
            newest_evaluation(evaluated)
