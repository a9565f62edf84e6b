"""Reward components that cannot work are told before a run starts; and they are part of what a run is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.identity import identity_drift, model_digest, run_identity
from rlhf_core.preflight import preflight

Configure = Callable[..., RunConfig]
MODULE = "def scored(responses, answer): return [0.0] * len(responses)\n"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plan_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("plan_rewards", None)


@pytest.fixture
def source(tiny: Any, tmp_path: Path) -> str:
    """The tiny prompts with a column `answer`."""
    rows = [json.loads(line) | {"answer": 1} for line in tiny.prompts.read_text().splitlines()]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"prompts.source={tmp_path / 'answers.jsonl'}"


SCORED = "reward.components.1={kind: function, name: scored, function: 'plan_rewards:scored'}"
JUDGE = "reward.components.1={kind: http, name: judge, url: 'http://localhost:1/', token_env: NO_SUCH_TOKEN}"
HOST = "reward.allowed_hosts=[localhost]"


def problems(config: RunConfig) -> Sequence[str]:
    with pytest.raises(UserError) as caught:
        preflight(config)
    return caught.value.problems


def test_a_plan_of_all_kinds(tiny_config: Configure, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_SUCH_TOKEN", "secret")
    judge = JUDGE.replace("components.1", "components.2")
    plan = preflight(tiny_config([source, "prompts.columns=[answer]", SCORED, judge, HOST]))
    assert {"reward0", "policy"} <= plan.parameters.keys()
    assert not {"scored", "judge"} & plan.parameters.keys()
    assert plan.prompt_set.columns[0] == {"answer": 1}


def test_every_problem_of_every_component_at_once(tiny_config: Configure, source: str) -> None:
    config = tiny_config(
        [
            source,
            "prompts.columns=[solution]",
            SCORED,
            JUDGE.replace("components.1", "components.2"),
            "reward.components.3={kind: function, name: c, function: nothing}",
            "reward.components.4={kind: http, name: d}",
            HOST,
        ]
    )
    found = problems(config)
    starts = [
        "reward.components.1.function 'plan_rewards:scored' needs the argument 'answer', which nothing fills",
        "reward.components.2.token_env names NO_SUCH_TOKEN, which is not set in the environment",
        "reward.components.3.function 'nothing' is neither module:callable nor one of length",
        "reward.components.4.url is not set",
        "prompts.columns names 'solution', which is not in prompts.source",
    ]
    assert len(found) == len(starts)
    for problem, start in zip(found, starts, strict=True):
        assert problem.startswith(start)


def test_a_critic_cannot_start_from_a_function(tiny_config: Configure, tiny: Any) -> None:
    alone = "reward.components=[{kind: function, function: length}]"
    assert problems(tiny_config([alone, "policy.critic.init=reward"])) == (
        "policy.critic.init is reward, but no component of reward.components is a model; use policy.critic.init policy",
    )
    preflight(tiny_config([alone, "policy.critic.init=policy"]))
    preflight(tiny_config([alone, "policy.critic.init=reward", "shaping.estimator=reward"]))
    behind = f"reward.components=[{{kind: function, function: length}}, {{kind: model, model: '{tiny.reward}'}}]"
    preflight(tiny_config([behind, "policy.critic.init=reward"]))


def test_a_tokenizer_of_more_tokens_than_the_model_reads(tiny_config: Configure, tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
    size = len(tokenizer)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(own)
    assert problems(tiny_config([f"reward.components.0.tokenizer={own}"])) == (
        f"reward.components.0.tokenizer '{own}' has {size + 2} tokens, reward.components.0.model '{tiny.reward}' reads "
        f"{size}; take the tokenizer that the model was trained with",
    )
    (sentence,) = problems(tiny_config(["reward.components.0.tokenizer=./none"]))
    assert sentence.startswith("reward.components.0.tokenizer './none' is not a folder here")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("./none.jinja", "chat_template './none.jinja' is neither Jinja ({{ … }} or {% … %}) nor a file of it"),
        ("{% for m in messages %}", "chat_template does not render a question and its answer: "),
        ("{{ raise_exception('no') }}", "chat_template does not render a question and its answer: no"),
        ("{{ messages[0]['content'] }}", "chat_template leaves the answer out: it renders 'question'"),
    ],
)
def test_a_chat_template_that_does_not_render(template: str, sentence: str, tiny_config: Configure) -> None:
    (problem,) = problems(tiny_config([f"reward.components.0.chat_template={json.dumps(template)}"]))
    assert problem.startswith(f"reward.components.0.{sentence}")


def test_the_identity_of_a_run_names_what_scores_it(
    tiny_config: Configure, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("NO_SUCH_TOKEN", "secret")
    shutil.copytree(tiny.reward, tmp_path / "own")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = tiny_config(
        [
            source,
            "prompts.columns=[answer]",
            SCORED,
            JUDGE.replace("components.1", "components.2"),
            HOST,
            f"reward.components.0.tokenizer={tmp_path / 'own'}",
            "reward.components.0.chat_template=chat.jinja",
        ]
    )
    prompt_set = preflight(config).prompt_set
    before = run_identity(config, prompt_set)
    assert before["rewards"]["judge"] == "http://localhost:1/"
    assert "secret" not in json.dumps(before)
    (tmp_path / "plan_rewards.py").write_text(MODULE + "# changed\n")
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    (tmp_path / "own" / "special.json").write_text("{}")
    model_digest.cache_clear()
    drift = identity_drift(before, run_identity(config, prompt_set))
    assert [line.partition(":")[0] for line in drift] == [
        "models.reward0.tokenizer",
        "rewards.reward0",
        "rewards.scored",
    ]
