"""The real chat model's world: its requests, its reward model on a tiny trunk, its packages refused in a sentence."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from architectures import SMALL, save_random
from safetensors.torch import load_file

from flows.quickstart import ONE_SENTENCE, real_config
from rlhf_core.chatworld import ChatWorld, build_chat_world, packages, taste, world
from rlhf_core.chatworld.requests import ABOUT_FILMS, chat, requests, write_requests
from rlhf_core.chatworld.taste import sentences, write_taste
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import FunctionReward, ModelReward
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


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_letters_beyond_ascii_are_read_as_they_were_written(encoding: str, tmp_path: Path) -> None:
    liked, disliked = "La sonrisa – sencillamente – de un ladrón…", "Every cliché is spent."
    (tmp_path / "x.pos").write_bytes(f"{liked}\n".encode(encoding))
    (tmp_path / "x.neg").write_bytes(f"{disliked}\n".encode(encoding))
    assert sentences(tmp_path, 1) == ([liked], [disliked])


def test_a_line_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    for name in ("x.pos", "x.neg"):
        (tmp_path / name).write_bytes(b"a line with \x81 in it\na line that can be read\n")
    assert sentences(tmp_path, 1) == (["A line that can be read"],) * 2
    with pytest.raises(UserError, match="has 1 sentences"):
        sentences(tmp_path, 2)


def test_a_reward_model_prefers_what_was_liked(policy: Path, reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told: list[tuple[int, int]] = []
    made = write_taste(policy, tmp_path / "out", reviews, lambda *at: told.append(at), pairs=40, held_out=15)
    assert made.pair_accuracy > 0.9
    assert told[-1] == (110, 110)
    assert (made.num_pairs, made.num_held_out) == (40, 15)
    config = ModelReward(model=str(tmp_path / "out"))
    model = RewardModel.load(config, field="r", policy_vocabulary="", device=torch.device("cpu"))
    tokenizer: Any = load_tokenizer(str(policy), field="x")
    liked, disliked = sentences(reviews, 60)
    asked = tokenizer("q Write one sentence about a film. a ")["input_ids"]
    texts = [*liked[-20:], *disliked[-20:]]
    scores = model.score_ids([[*asked, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    assert float(scores[:20].mean() - scores[20:].mean()) > 0.5


def test_held_out_pairs_change_the_accuracies_alone(
    policy: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ends, cuts = torch.randn(110, 48, generator=generator), torch.randn(110, 48, generator=generator)
    ends[:55, 0] += 4.0
    ends[:, 1] += 6.0
    praised, blamed = torch.arange(40, 55), torch.arange(95, 110)
    held_out = torch.cat([praised, blamed])
    other_taste, other_whole = ends.clone(), ends.clone()
    other_taste[held_out] = ends[torch.cat([blamed, praised])]
    other_whole[held_out, 1] -= 20.0
    made: list[tuple[taste.Taste, torch.Tensor]] = []
    for name, found in (("as_drawn", ends), ("other_taste", other_taste), ("other_whole", other_whole)):
        monkeypatch.setattr(taste, "_states", lambda *_, found=found: (found.clone(), cuts.clone()))
        (tmp_path / name).mkdir()
        measured = write_taste(policy, tmp_path / name, reviews, lambda *_: None, pairs=40, held_out=15)
        made.append((measured, load_file(tmp_path / name / "model.safetensors")["score.weight"]))
    (as_drawn, weight), (swapped, _), (reversed_, _) = made
    assert as_drawn.pair_accuracy > 0.8 > 0.2 > swapped.pair_accuracy
    assert as_drawn.whole_accuracy > 0.8 > 0.2 > reversed_.whole_accuracy
    assert all(torch.equal(weight, each) for _, each in made)


def test_a_whole_sentence_scores_higher_than_the_same_cut_short(policy: Path, reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    made = write_taste(policy, tmp_path / "out", reviews, lambda *_: None, pairs=40, held_out=15)
    assert made.whole_accuracy > 0.9
    config = ModelReward(model=str(tmp_path / "out"))
    model = RewardModel.load(config, field="r", policy_vocabulary="", device=torch.device("cpu"))
    tokenizer: Any = load_tokenizer(str(policy), field="x")
    asked = tokenizer("q Write one sentence about a film. a ")["input_ids"]
    said = [tokenizer(text)["input_ids"] for texts in sentences(reviews, 60) for text in texts[-20:]]
    whole = model.score_ids([[*asked, *tokens, tokenizer.eos_token_id] for tokens in said])
    for share in (0.3, 0.6, 0.9):
        cut = model.score_ids([[*asked, *tokens[: int(len(tokens) * share)]] for tokens in said])
        assert float((whole > cut).float().mean()) > 0.9, share


def test_states_are_those_of_rows_that_end_there(policy: Path) -> None:
    """One pass gives what two would: of the whole row, and of the row that is cut."""
    from transformers import AutoModelForSequenceClassification

    tokenizer: Any = load_tokenizer(str(policy), field="x")
    model: Any = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32).eval()
    texts = ["the film is good , really", "bad", "a dull film"]
    ends, cuts = taste._states(model, tokenizer, texts, lambda *_: None)
    asked = tokenizer.apply_chat_template(chat(ABOUT_FILMS), add_generation_prompt=True, return_dict=True)["input_ids"]
    draw = Random(0)
    for n, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        left = tokens[: draw.randrange(max(len(tokens) - 1, 1)) + 1]
        assert len(left) < len(tokens) or len(tokens) == 1
        for row, found in (([*asked, *tokens, tokenizer.eos_token_id], ends[n]), ([*asked, *left], cuts[n])):
            with torch.no_grad():
                expected = model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_one_that_holds_for_pairs_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 1, 120, dtype=torch.float64, generator=generator)
    assert taste._best_penalty(noise) == max(taste.PENALTIES), "there is nothing to learn"
    learnable = torch.randn(300, 1, 4, dtype=torch.float64, generator=generator)
    learnable[..., 0] = learnable[..., 0].abs() + 0.5
    assert taste._best_penalty(learnable) == min(taste.PENALTIES), "and here all of it"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no file *.pos"),
        ({"a.pos": "a b c d\n"}, "has no file *.neg"),
        ({"a.pos": "x\n", "a.neg": "y\n"}, "has 0 sentences"),
        (
            {name: "".join(f"sentence number {i} of all\n" for i in range(749)) for name in ("a.pos", "a.neg")},
            "has 749 sentences of 4 to 30 words; 750 are needed",
        ),
        ({"a.pos": "a b c d\n", "b.pos": "a b c d\n"}, r"has 2 files *.pos (a.pos, b.pos)"),
    ],
)
def test_reviews_that_will_not_do(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
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
    monkeypatch.setattr(world, "sentences", partial(sentences, count=55))
    built = [build_chat_world(tmp_path / "w", reviews=reviews, on_progress=lambda *_: None) for _ in range(2)]
    assert made == ["model"]
    assert built[0] == built[1]
    assert built[0].reward is not None
    for reward in ("function", "model"):
        config = real_config(built[0], reward)
        plan = preflight(config)
        assert len(plan.prompt_set.entries) == 160
        assert config.reward.components[0].kind == reward
        assert config.shaping.gae_lambda == (1.0 if reward == "model" else 0.9)
    damaged = built[0].policy / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    build_chat_world(tmp_path / "w", reviews=None, on_progress=lambda *_: None)
    assert made == ["model", "model"], "a damaged one is made again"


def test_what_the_function_rewards() -> None:
    score = READY_MADE["regex"]
    wanted = ["A dog ran home.", "It is a lovely evening by the sea!"]
    unwanted = ["Home.", "A dog ran. It was late.", "A dog ran home", "word " * 25 + "end.", "Line one\nis. fine"]
    assert score([*wanted, *unwanted], pattern=ONE_SENTENCE, mode="whole") == [1.0] * 2 + [0.0] * 5


def test_what_is_no_part_of_a_made_folder_is_never_lost(tmp_path: Path) -> None:
    def make(out: Path) -> dict[str, Any]:
        (out / "weights").write_text("1")
        return {}

    world._make(tmp_path / "model", {"recipe": 1}, make, "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    world._make(tmp_path / "model", {"recipe": 1}, make, "model")
    with pytest.raises(ValueError, match=r"no part of a model: notes\.txt"):
        world._make(tmp_path / "model", {"recipe": 2}, make, "model")
    (tmp_path / "model" / world.RECORD).write_text("[]")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        world._make(tmp_path / "model", {"recipe": 1}, make, "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_prompts_that_a_person_has_changed_are_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_requests(path, ["One?", "Two?"])
    write_requests(path, ["One?", "Two?"])
    path.write_text("mine\n")
    with pytest.raises(UserError, match="holds other prompts"):
        write_requests(path, ["One?", "Two?"])
    assert path.read_text() == "mine\n"


def test_the_function_reward_orders_answers_as_it_says(tmp_path: Path) -> None:
    there = ChatWorld(tmp_path, tmp_path / "p.jsonl", tmp_path / "e.jsonl", None, None)
    reward = real_config(there, "function").reward

    def score(text: str) -> float:
        found = 0.0
        for part in reward.components:
            assert isinstance(part, FunctionReward)
            given: dict[str, Any] = {"completion_ids": [[1]]} if part.function == "repetition" else {}
            found += part.weight * READY_MADE[part.function]([text], **given, **part.params)[0]
        return found

    best = score("A lovely, happy evening by the sea.")
    assert 1.5 < best <= 2.0
    for text in (
        "A terrible, sad evening by the sea.",
        "A lovely, happy evening. By the sea.",
        "A lovely, happy evening by the sea",
        "A lovely, happy evening by the sea, a lovely, happy evening by the sea, a lovely, happy evening by the sea.",
        "A lovely, happy evening " + "of all of the ones we had " * 4 + "by the sea.",
    ):
        assert score(text) < best - 0.2, text


def test_the_world_says_what_is_in_it(tmp_path: Path) -> None:
    there = ChatWorld(tmp_path, tmp_path / "p.jsonl", tmp_path / "e.jsonl", None, None)
    tree = real_config(there, "function").model_dump()
    assert json.dumps(tree["reward"]).count('"weight": 1.0') == 3
