"""From what a user asks to prompts and models; what cannot be is told in one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import config_template
from rlhf_core.contracts.errors import UserError
from rlhf_core.evaluation.request import (
    Prepared,
    Request,
    check_request,
    evaluation_config,
    folder_name,
    prepare,
    request_config,
)

if TYPE_CHECKING:
    from tiny_world import Tiny

MakeConfig = Callable[[Sequence[str]], RunConfig]
ASKED = Request("runs/a", num_prompts=6)


def prompts_file(folder: Path, texts: Sequence[str], column: str = "prompt") -> str:
    path = folder / "held-out.jsonl"
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def prepared(config: RunConfig, request: Request, **changes: Any) -> Prepared:
    return prepare(request, config, **{"trained_on": config.prompts, "model": None, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 0}, "--samples is 0; at least 1 response"),
        ({"frontier_samples": 19}, "--frontier-samples is 19; a frontier needs at least 20 responses"),
        ({"num_prompts": 1}, "--num-prompts is 1; confidence intervals are over prompts"),
        ({"seed": -1}, "--seed is -1"),
        ({"checkpoint": "oldest"}, "--checkpoint is 'oldest'; choose newest, best, last_good, all or"),
        ({"checkpoint": "-3"}, "--checkpoint is '-3'"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_request(replace(ASKED, **changes))
    assert caught.value.problems[0].startswith(said)
    check_request(replace(ASKED, checkpoint="40", samples=1, frontier_samples=20, num_prompts=2))


def test_all_of_it_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check_request(replace(ASKED, samples=0, num_prompts=0))
    assert len(caught.value.problems) == 2


def test_the_reference_answers_at_least_as_often_as_a_policy() -> None:
    assert replace(ASKED, samples=50, frontier_samples=20).reference_samples == 50
    assert replace(ASKED, samples=5, frontier_samples=20).reference_samples == 20


def test_without_prompts_some_of_the_runs_own_are_drawn_by_the_seed(tiny_config: MakeConfig) -> None:
    config = tiny_config([])
    found, again, other = (prepared(config, replace(ASKED, seed=seed)).prompts for seed in (0, 0, 1))
    assert len(found.prompt_ids) == 6
    assert found.prompt_ids == again.prompt_ids != other.prompt_ids
    assert prepared(config, ASKED).num_trained_on == 6
    assert prepared(config, replace(ASKED, num_prompts=99)).prompts.prompt_ids == list(range(40)), "all, in order"


def test_held_out_prompts_and_those_that_are_not(tiny_config: MakeConfig, tiny: Tiny, tmp_path: Path) -> None:
    known = json.loads(tiny.prompts.read_text().splitlines()[3])["prompt"]
    source = prompts_file(tmp_path, ["A new film", known, "Another one"], column="text")
    found = prepared(tiny_config([]), replace(ASKED, prompts=source, column="text"))
    assert found.prompts.texts == ["A new film", known, "Another one"]
    assert found.num_trained_on == 1
    gone = tiny_config(["prompts.source=gone.jsonl"]).prompts
    unknown = prepared(tiny_config([]), replace(ASKED, prompts=source, column="text"), trained_on=gone)
    assert unknown.num_trained_on is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "--prompts '{path}' holds no rows"),
        (["one"], "--prompts '{path}' has 1 prompt; confidence intervals"),
        (["one", ""], "--prompts '{path}', line 2: prompt is ''"),
        (["one", "x " * 100], "--prompts '{path}' has 1 prompts longer than the 58 tokens"),
    ],
)
def test_prompts_that_cannot_be_used(rows: list[str], said: str, tiny_config: MakeConfig, tmp_path: Path) -> None:
    source = prompts_file(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        prepared(tiny_config([]), replace(ASKED, prompts=source))
    assert caught.value.problems[0].startswith(said.format(path=source))


def test_a_missing_file_or_column_is_named_as_the_user_did(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--prompts '.*gone\.jsonl' does not exist$"):
        prepared(tiny_config([]), replace(ASKED, prompts=str(tmp_path / "gone.jsonl")))
    with pytest.raises(UserError, match="--column 'question' is not in --prompts"):
        prepared(tiny_config([]), replace(ASKED, prompts=prompts_file(tmp_path, ["a", "b"]), column="question"))
    with pytest.raises(UserError, match=r"prompts\.columns .*'answer'.* --prompts"):
        prepared(tiny_config(["prompts.columns=[answer]"]), replace(ASKED, prompts=prompts_file(tmp_path, ["a", "b"])))
    with pytest.raises(UserError, match="--column is 'text', but --prompts names no source"):
        prepared(tiny_config([]), replace(ASKED, column="text"))


def test_prompts_that_are_dropped_are_not_counted(tiny_config: MakeConfig, tmp_path: Path) -> None:
    source = prompts_file(tmp_path, ["x " * 100, "one", "y " * 100, "two", "three"])
    found = prepared(tiny_config(["prompts.over_long=drop"]), replace(ASKED, prompts=source))
    assert sorted(found.prompts.texts) == ["one", "three", "two"]
    with pytest.raises(UserError, match="has 1 prompts that fit; at least 2"):
        prepared(
            tiny_config(["prompts.over_long=drop"]),
            replace(ASKED, prompts=prompts_file(tmp_path, ["x " * 100, "one", "y " * 100])),
        )


def test_an_evaluation_does_not_depend_on_what_only_training_needs(tiny_config: MakeConfig) -> None:
    def ours(*overrides: str) -> RunConfig:
        config = tiny_config(overrides)
        return evaluation_config(config, config.prompts, None, 3)

    plain = ours()
    assert plain.seed == 3
    assert not plain.uses_critic
    for irrelevant in ("ppo.learning_rate=0.5", "kl.coef=1.0", "shaping.gamma=0.9", "num_iterations=7", "seed=1"):
        assert ours(irrelevant) == plain, irrelevant
    for relevant in ("generation.temperature=0.7", "reward.components.0.weight=2.0", "policy.dtype=bfloat16"):
        assert ours(relevant) != plain, relevant


def test_a_bare_model_takes_the_policys_place_and_the_reference_stays(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config([])
    ours = evaluation_config(config, config.prompts, "some/model", 0)
    assert (ours.policy.model, ours.policy.adapter) == ("some/model", None)
    assert ours.reference_model == config.policy.model
    (tmp_path / "adapter_config.json").write_text("{}")
    ours = evaluation_config(config, config.prompts, str(tmp_path), 0)
    assert (ours.policy.model, ours.policy.adapter) == (config.policy.model, str(tmp_path))
    assert (ours.reference_model, ours.reference.adapter) == (config.policy.model, None)


def test_folders_are_named_after_prompts_and_settings() -> None:
    assert folder_name("data/held out.jsonl", "0123456789") == "held-out-01234567"
    assert folder_name("org/set", "abcdefghij") == "set-abcdefgh"
    assert folder_name("…", "abcdefghij") == "prompts-abcdefgh"


def test_the_config_of_a_command_line(tiny_config: MakeConfig, tmp_path: Path) -> None:
    from rlhf_core.contracts.run_folder import RunFolder

    run = RunFolder.create(tmp_path / "run", tiny_config([]), {}).path
    file = tmp_path / "some.yaml"
    file.write_text(config_template(tiny_config([])))
    assert request_config(str(run), None, []) is None
    changed = request_config(str(run), None, ["generation.temperature=0.5"])
    assert changed is not None
    assert changed.generation.temperature == 0.5
    assert changed.policy == tiny_config([]).policy
    with pytest.raises(UserError, match=r"--config .*some\.yaml is for a bare model; .*run is a run"):
        request_config(str(run), file, [])
    assert request_config("a-model", None, []) is None
    of_file = request_config("a-model", file, ["seed=5"])
    assert of_file is not None
    assert of_file.seed == 5
