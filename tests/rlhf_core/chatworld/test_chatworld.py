"""The real chat model's world: its requests, its reward model on a tiny trunk, its packages refused in a sentence."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SMALL, save_random

from flows.quickstart import ONE_SENTENCE, real_config
from rlhf_core.chatworld import ChatWorld, build_chat_world, packages, world
from rlhf_core.chatworld.requests import requests
from rlhf_core.chatworld.taste import sentences, write_taste
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight
from rlhf_core.rewards.ready_made import READY_MADE

GOOD, BAD = ("good", "great", "lovely", "fine"), ("bad", "dull", "poor", "weak")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }} a {% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for name, words in (("a.pos", GOOD), ("a.neg", BAD)):
        lines = [f"the film number {i} is {words[i % 4]} , really {words[i % 3]} ." for i in range(60)]
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture
def policy(tiny: Any, tmp_path: Path) -> Path:
    from transformers import LlamaConfig

    tokenizer = load_tokenizer(str(tiny.policy), field="x")
    tokenizer.chat_template = TEMPLATE
    shape = {**SMALL, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(
        **{**shape, "max_position_embeddings": 256}, vocab_size=len(tokenizer), tie_word_embeddings=True
    )
    return save_random(config, "AutoModelForCausalLM", tmp_path / "model", tokenizer)


def test_requests_are_different_and_held_out_ones_are_about_other_things() -> None:
    trained, held_out = requests()
    assert len(set(trained)) == len(trained) == 160
    assert len(set(held_out)) == len(held_out) == 40
    assert not {text.split("about ")[-1] for text in trained} & {text.split("about ")[-1] for text in held_out}


def test_sentences_are_written_as_people_write(tmp_path: Path) -> None:
    (tmp_path / "x.pos").write_text("it's ( almost ) a great film , isn 't it ? \ntoo short\n")
    (tmp_path / "x.neg").write_text("a film that does n't work at all .\n")
    assert sentences(tmp_path, 1) == (["It's (almost) a great film, isn't it?"], ["A film that doesn't work at all."])


def test_a_reward_model_prefers_what_was_liked(policy: Path, reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told: list[tuple[int, int]] = []
    taste = write_taste(policy, tmp_path / "out", reviews, lambda *at: told.append(at), pairs=40, held_out=15)
    assert taste.pair_accuracy > 0.9
    assert told[-1] == (110, 110)
    config = ModelReward(model=str(tmp_path / "out"))
    model = RewardModel.load(config, field="r", policy_vocabulary="", device=torch.device("cpu"))
    tokenizer: Any = load_tokenizer(str(policy), field="x")
    liked, disliked = sentences(reviews, 60)
    asked = tokenizer("q Write one sentence about a film. a ")["input_ids"]
    texts = [*liked[-20:], *disliked[-20:]]
    scores = model.score_ids([[*asked, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    assert float(scores[:20].mean() - scores[20:].mean()) > 0.5


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no file *.pos"),
        ({"a.pos": "a b c d\n"}, "has no file *.neg"),
        ({"a.pos": "x\n", "a.neg": "y\n"}, "has 0 sentences"),
    ],
)
def test_reviews_that_will_not_do(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said.replace("*", r"\*")):
        build_chat_world(tmp_path / "world", reviews=tmp_path, on_progress=lambda *_: None)
    assert not (tmp_path / "world").exists(), "nothing was begun"


def test_packages_that_cannot_be_had_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(UserError, match="pip could not fetch") as caught:
        build_chat_world(tmp_path / "world", reviews=None, on_progress=lambda *_: None)
    assert "\n" not in caught.value.problems[0]
    assert [path.name for path in (tmp_path / "world").iterdir() if not path.name.startswith(".")] == []


def test_the_wheels_are_those_that_were_looked_at() -> None:
    assert all(len(digest) == 64 for digest in packages.PACKAGES.values())


def test_a_world_is_made_once_and_its_config_passes_the_preflight(
    policy: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def copied(out: Path, tell: Any) -> None:
        import shutil

        made.append("model")
        shutil.copytree(policy, out, dirs_exist_ok=True)
        tell(2, 2)

    monkeypatch.setattr(world, "write_model", copied)
    monkeypatch.setattr(world, "write_taste", partial(write_taste, pairs=40, held_out=15))
    built = [build_chat_world(tmp_path / "w", reviews=reviews, on_progress=lambda *_: None) for _ in range(2)]
    assert made == ["model"]
    assert built[0] == built[1]
    assert built[0].reward is not None
    for reward in ("function", "model"):
        config = real_config(built[0], reward)
        plan = preflight(config)
        assert len(plan.prompt_set.entries) == 160
        assert config.reward.components[0].kind == reward
    damaged = built[0].policy / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    build_chat_world(tmp_path / "w", reviews=None, on_progress=lambda *_: None)
    assert made == ["model", "model"], "a damaged one is made again"


def test_what_the_function_rewards() -> None:
    score = READY_MADE["regex"]
    wanted = ["A dog ran home.", "It is a lovely evening by the sea!"]
    unwanted = ["Home.", "A dog ran. It was late.", "A dog ran home", "word " * 25 + "end.", "Line one\nis. fine"]
    assert score([*wanted, *unwanted], pattern=ONE_SENTENCE, mode="whole") == [1.0] * 2 + [0.0] * 5


def test_the_world_says_what_is_in_it(tmp_path: Path) -> None:
    there = ChatWorld(tmp_path, tmp_path / "p.jsonl", tmp_path / "e.jsonl", None, None)
    tree = real_config(there, "function").model_dump()
    assert json.dumps(tree["reward"]).count('"weight": 1.0') == 3
