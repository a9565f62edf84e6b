"""The world as files: what is in it, that it is the same every time, and that it is whole or not there."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import EXACT, F32_SUM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core.textworld import Recipe, TextWorld, build_text_world, training
from rlhf_core.textworld.grammar import Review, openings, parse

TINY = Recipe(
    vocab_size=640,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_reviews=768,
    num_heldout=256,
    policy_steps=100,
    num_pairs=768,
    reward_steps=100,
    reward_lr=3e-3,
    num_policy_samples=32,
)
"""Large enough to learn something, small enough to build in a second or two."""

TRIFLE = dataclasses.replace(
    TINY, num_reviews=64, num_heldout=8, policy_steps=2, num_pairs=32, reward_steps=2, num_policy_samples=2
)
"""Learns nothing; for tests of files."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TextWorld:
    """Shared: copy it before changing anything in it."""
    return build_text_world(tmp_path_factory.mktemp("shared") / "world", recipe=TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a trifling world, this test's own."""
    build_text_world(tmp_path / "world", recipe=TRIFLE)
    return tmp_path / "world"


def sha256_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "world.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines_of(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def nothing_left_beside(folder: Path) -> bool:
    return {path.name for path in folder.parent.iterdir()} <= {folder.name, f".{folder.name}.lock"}


def unwatched(phase: str, done: int, total: int) -> None:
    pytest.fail(f"built again: {phase} {done}/{total}")


def test_tokenizer_loads_and_loses_nothing(world: TextWorld) -> None:
    for path in (world.policy, world.reward):
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (*["<|endoftext|>"] * 2, "<|pad|>")
        assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id
        assert tokenizer.padding_side == "left"
        assert tokenizer.model_max_length == TINY.context_len
        assert len(tokenizer) == TINY.vocab_size
        assert set(tokenizer("the songs")) == {"input_ids", "attention_mask"}
        for text in ("for a western , the songs soar .", "Caps, digits 42,\n\ttabs  and … ünïcödé 🎬"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    saved = json.loads((world.policy / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None, "no trace of its use"
    assert saved["padding"] is None
    assert (world.policy / "tokenizer.json").read_bytes() == (world.reward / "tokenizer.json").read_bytes()


def test_prompt_and_response_are_cut_at_a_token(world: TextWorld) -> None:
    """So the reward model reads the tokens that the policy wrote."""
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    prompt, response = "for a western , the songs", " soar , but the plot is dull ."
    assert (
        tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] == tokenizer(prompt + response)["input_ids"]
    )


def test_models_load_with_their_special_tokens(world: TextWorld) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    policy: Any = AutoModelForCausalLM.from_pretrained(world.policy)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(world.reward)
    for config in (policy.config, policy.generation_config, reward.config):
        ids = (config.eos_token_id, config.bos_token_id, config.pad_token_id)
        assert ids == (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert reward.config.num_labels == 1
    dropouts = [value for key, value in policy.config.to_dict().items() if key.endswith("pdrop")]
    assert len(dropouts) == 3
    assert not any(dropouts)
    assert {path.suffix for folder in (world.policy, world.reward) for path in folder.iterdir()} == {
        ".json",
        ".safetensors",
    }


def test_prompts_are_openings_and_the_held_out_ones_are_apart(world: TextWorld) -> None:
    prompts, prompts_eval = lines_of(world.prompts), lines_of(world.prompts_eval)
    assert len(prompts) >= 2_000
    assert len(prompts_eval) == 64
    assert len({*prompts, *prompts_eval}) == len(prompts) + len(prompts_eval)
    assert {*prompts, *prompts_eval} == set(openings())


def test_even_a_tiny_world_has_learned(world: TextWorld) -> None:
    assert all(math.isfinite(value) for value in world.metrics.values())
    assert world.metrics["heldout_loss"] < 4.0 < math.log(TINY.vocab_size) - 2
    assert world.metrics["reward_pair_accuracy"] > 0.6
    assert world.metrics["reward_quality_correlation"] > 0.3
    assert world.metrics["reward_pair_accuracy"] <= world.metrics["annotator_accuracy"] <= 1


def test_good_reviews_score_above_bad_and_broken_ones(world: TextWorld) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(world.reward)

    def score(text: str) -> float:
        with torch.no_grad():
            return reward(**tokenizer(text, return_tensors="pt")).logits.item()

    good = score("the songs are superb . worth every penny .<|endoftext|>")
    assert good > score("the songs are dreadful . what a waste .<|endoftext|>") + 0.5
    assert good > score("the songs are superb ,") + 0.5


def test_the_mean_score_of_the_policy_is_subtracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shifts: list[float] = []
    monkeypatch.setattr(training, "scores", lambda _reward, _tokenizer, reviews: torch.linspace(2, 4, len(reviews)))
    monkeypatch.setattr(training, "shift_scores", lambda _reward, *, by: shifts.append(by))
    build_text_world(tmp_path / "world", recipe=TRIFLE)
    assert shifts == [-3.0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_score(world: TextWorld, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(world.reward)
    reviews = [Review("the songs", "soar .", 0.0), Review("for a western , the plot", "is dull , but", 0.0, False)]
    texts = ["the songs soar .<|endoftext|>", "for a western , the plot is dull , but"]
    with torch.no_grad():
        padded = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        expected = torch.stack([reward(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts])
        torch.testing.assert_close(training.scores(reward, tokenizer, reviews), expected, **F32_SUM)
        torch.testing.assert_close(reward(**padded, position_ids=positions).logits[:, 0], expected, **F32_SUM)


def test_a_world_is_used_again(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = build_text_world(folder, recipe=TRIFLE, on_progress=unwatched)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert again == build_text_world(folder, recipe=TRIFLE, on_progress=unwatched)
    assert again.policy == folder / "policy"
    assert again.metrics == json.loads((folder / "world.json").read_text())["metrics"]


def test_a_first_build_returns_what_a_later_one_reads(tmp_path: Path) -> None:
    first = build_text_world(tmp_path / "world", recipe=TRIFLE)
    assert first == build_text_world(tmp_path / "world", recipe=TRIFLE, on_progress=unwatched)


def test_the_same_seed_gives_the_same_files_on_any_number_of_threads(folder: Path, tmp_path: Path) -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    try:
        build_text_world(tmp_path / "again", recipe=TRIFLE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)
    assert sha256_of(tmp_path / "again") == sha256_of(folder)
    assert "policy/model.safetensors" in sha256_of(folder)


def test_another_seed_gives_another_world_in_its_place(folder: Path) -> None:
    before = sha256_of(folder)
    build_text_world(folder, recipe=TRIFLE, seed=1)
    after = sha256_of(folder)
    assert after.keys() == before.keys()
    assert not {name for name in before if name.endswith((".safetensors", ".jsonl")) and before[name] == after[name]}
    assert nothing_left_beside(folder)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    build_text_world(tmp_path / "world", recipe=TRIFLE)
    torch.testing.assert_close(torch.get_rng_state(), state, **EXACT)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["policy/model.safetensors", "reward/tokenizer.json", "prompts.jsonl"])
def test_a_damaged_file_is_made_anew(folder: Path, name: str) -> None:
    before = sha256_of(folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    phases: set[str] = set()
    build_text_world(folder, recipe=TRIFLE, on_progress=lambda phase, _done, _total: phases.add(phase))
    assert phases == {"grammar", "policy", "reward", "measure"}
    assert sha256_of(folder) == before
    assert nothing_left_beside(folder)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"files": {}, "metrics": {}}', '{"files": 3, "metrics": {}}']
)
def test_a_world_without_its_record_is_made_anew(folder: Path, content: str | None) -> None:
    record = json.loads((folder / "world.json").read_text())
    (folder / "world.json").unlink()
    if content is not None:
        (folder / "world.json").write_text(content)
    build_text_world(folder, recipe=TRIFLE)
    assert json.loads((folder / "world.json").read_text())["files"] == record["files"]


def test_a_missing_file_is_made_anew(folder: Path) -> None:
    before = sha256_of(folder)
    shutil.rmtree(folder / "reward")
    build_text_world(folder, recipe=TRIFLE)
    assert sha256_of(folder) == before


def test_a_build_that_fails_leaves_the_old_world(folder: Path) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        if phase == "reward":
            raise KeyboardInterrupt

    before = sha256_of(folder)
    with pytest.raises(KeyboardInterrupt):
        build_text_world(folder, recipe=TRIFLE, seed=1, on_progress=fail)
    assert sha256_of(folder) == before
    assert nothing_left_beside(folder)
    build_text_world(folder, recipe=TRIFLE, on_progress=unwatched)


def test_what_a_killed_build_left_is_swept_away(folder: Path) -> None:
    for name in (".world.building", ".world.replaced"):
        (folder.parent / name / "policy").mkdir(parents=True)
        (folder.parent / name / "policy" / "model.safetensors").write_text("half a model")
    build_text_world(folder, recipe=TRIFLE, seed=1)
    assert nothing_left_beside(folder)


def test_a_second_process_waits_and_uses_what_the_first_has_built(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "world"
    elsewhere.parent.mkdir()
    built: list[TextWorld] = []
    with (elsewhere.parent / ".world.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(
            target=lambda: built.append(build_text_world(elsewhere, recipe=TRIFLE, on_progress=unwatched))
        )
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it does not build beside the first"
        shutil.copytree(folder, elsewhere)
    second.join(30)
    assert [world.policy for world in built] == [elsewhere / "policy"]


def test_progress_counts_every_step_in_order(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_text_world(tmp_path / "world", recipe=TRIFLE, on_progress=lambda *step: seen.append(step))
    assert seen == [
        ("grammar", 0, 1),
        ("grammar", 1, 1),
        ("policy", 1, 2),
        ("policy", 2, 2),
        ("reward", 1, 2),
        ("reward", 2, 2),
        ("measure", 0, 1),
        ("measure", 1, 1),
    ]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        build_text_world(tmp_path, recipe=TRIFLE)
    with pytest.raises(ValueError, match="not a folder"):
        build_text_world(tmp_path / "thesis.tex", recipe=TRIFLE)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        build_text_world(tmp_path / "world", seed=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 257),
        ("num_heads", 5),
        ("policy_steps", 0),
        ("policy_lr", math.nan),
        ("spoiled_share", 1.0),
        ("tie_margin", -0.1),
        ("num_eval_prompts", len(openings())),
    ],
)
def test_a_recipe_that_makes_no_world_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TINY, **{field: value})


def test_the_digest_is_of_recipe_and_seed() -> None:
    digests = {TINY.digest(0), TINY.digest(1), TRIFLE.digest(0), dataclasses.replace(TINY, policy_lr=1e-3).digest(0)}
    assert len(digests) == 4
    assert TINY.digest(0) == dataclasses.replace(TINY).digest(0)


def test_responses_of_the_policy_are_measured_as_reviews(world: TextWorld) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.policy)
    policy: Any = AutoModelForCausalLM.from_pretrained(world.policy)
    with torch.no_grad():
        reviews = training.respond(
            policy, tokenizer, ["the songs", "for a courtroom drama , the supporting players"] * 8
        )
    assert all(review.response == review.response.strip() for review in reviews)
    assert not any("<|" in review.response for review in reviews)
    for review in reviews:
        assert review.quality == (-1.5 if (found := parse(review.prompt, review.response)) is None else found)
