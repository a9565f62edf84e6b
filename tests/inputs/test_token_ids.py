"""Tokenizers and embeddings that do not have the same size: right, or refused before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs.token_folders import (
    CHATML,
    END,
    LLAMA,
    TEXTS,
    byte_tokenizer,
    change_json,
    run_tree,
    save_model,
    word_tokenizer,
)
from iteration import CPU, Bench
from tolerances import F32_MODEL

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.checkpoints import new_trainer
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.tokenizers import drawable_tokens
from rlhf_core.models.vllm_engine import _write_untied
from rlhf_core.preflight import preflight

ROWS = 448
"""Of an embedding that is padded, as Qwen's are."""
CLASSIFIER = "AutoModelForSequenceClassification"


def problems(tree: dict[str, Any], *overrides: str) -> tuple[str, ...]:
    """What a pre-flight refuses."""
    with pytest.raises(UserError) as caught:
        preflight(build_config(tree, list(overrides)))
    return tuple(caught.value.problems)


def plain_logprobs(folder: Path, ids: list[int], first: int, tokens: list[int]) -> torch.Tensor:
    """By transformers alone: log-softmax over the logits of the ids that are tokens."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits_LV = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([ids])).logits[0]
    logprobs_LV = logits_LV[:, tokens].log_softmax(dim=1)
    places = [tokens.index(token) for token in ids[first:]]
    return torch.stack([logprobs_LV[first - 1 + i, place] for i, place in enumerate(places)])


def families(rows: int) -> dict[str, Any]:
    """Configs whose heads are tied, not tied, with a bias, and with a softcap."""
    import transformers as t

    grouped = {**LLAMA, "vocab_size": rows}
    gpt2 = t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=rows, bos_token_id=0, eos_token_id=0)
    return {
        "llama": t.LlamaConfig(**grouped),
        "qwen2": t.Qwen2Config(**grouped, tie_word_embeddings=True),
        "gpt2": gpt2,
        "phi": t.PhiConfig(**{**grouped, "num_key_value_heads": 2}),
        "gemma2": t.Gemma2Config(**grouped, final_logit_softcapping=3.0),
    }


def with_holes(tokenizer: Any, folder: Path, *, hole: int) -> Any:
    """The tokenizer saved and loaded without the token of one id, which nothing else is made of."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text())
    token = next(t for t, i in saved["model"]["vocab"].items() if i == hole)
    del saved["model"]["vocab"][token]
    saved["model"]["merges"] = [m for m in saved["model"]["merges"] if "".join(m) != token]
    path.write_text(json.dumps(saved))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi", "gemma2"])
@pytest.mark.parametrize("hole", [None, 279], ids=["padded", "padded, with a hole"])
def test_ids_of_no_token_are_never_drawn_and_have_no_part_in_any_logprob(
    family: str, hole: int | None, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokens = list(range(len(tokenizer)))
    if hole is not None:
        tokenizer = with_holes(byte_tokenizer(size=281), tmp_path / "tokenizer", hole=hole)
        tokens = sorted({*range(281)} - {hole})
    policy = save_model(tmp_path / "policy", ROWS, tokenizer, config=families(ROWS)[family])
    bench = Bench.of(build_config(run_tree(tmp_path, policy, prompts=TEXTS), ["generation.max_new_tokens=12"]))
    assert bench.plan.vocab_size == max(tokens) + 1
    assert any(f"{ROWS - len(tokens)} ids that no token has are never drawn" in note for note in bench.plan.notes)
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    ref_logprobs = bench.ref_logprobs(prompts, rollouts).batch
    assert set(rollouts.tokens_BR[rollouts.response_mask_BR].tolist()) <= set(tokens)
    for row in range(4):
        mask_R = rollouts.response_mask_BR[row]
        question = prompts.tokens_QP[rollouts.prompt_rows[row]][prompts.mask_QP[rollouts.prompt_rows[row]]].tolist()
        ids = question + rollouts.tokens_BR[row][mask_R].tolist()
        expected = plain_logprobs(policy, ids, len(question), tokens)
        torch.testing.assert_close(rollouts.logprobs_BR[row][mask_R], expected, **F32_MODEL)
        torch.testing.assert_close(ref_logprobs.ref_logprobs_BR[row][mask_R], expected, **F32_MODEL)
    experience = bench.experience(rollouts, bench.scores(prompts, rollouts).batch, ref_logprobs).batch
    update = bench.update(prompts, rollouts, experience)
    assert update.metrics["guard/first_max_abs_log_ratio"] < F32_MODEL["atol"]
    assert all(p.isfinite().all() for p in bench.trainer.actor_critic.policy.model.parameters())


def test_an_update_is_that_of_the_policy_whose_padding_transformers_has_cut_off(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, weights = byte_tokenizer(), []
    padded = save_model(tmp_path / "padded", ROWS, tokenizer, config=families(ROWS)["qwen2"])
    cut = AutoModelForCausalLM.from_pretrained(padded)
    cut.resize_token_embeddings(len(tokenizer))
    cut.save_pretrained(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "cut")
    for folder in (padded, tmp_path / "cut"):
        bench = Bench.of(
            build_config(run_tree(tmp_path, folder), ["policy.critic.init=policy", "ppo.entropy_coef=0.1"])
        )
        bench.update(*bench.until_experience())
        weights.append(dict(bench.trainer.actor_critic.policy.model.state_dict()))
    before = dict(AutoModelForCausalLM.from_pretrained(padded).state_dict())
    for name, ours in weights[0].items():
        torch.testing.assert_close(ours[: len(weights[1][name])], weights[1][name], rtol=1e-3, atol=1e-4)
        assert not torch.equal(ours[: len(weights[1][name])], before[name][: len(weights[1][name])])


def test_a_policy_without_padding_computes_as_before(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    policy = save_model(tmp_path / "policy", len(tokenizer), tokenizer)
    trainer = new_trainer(build_config(run_tree(tmp_path, policy)), CPU)
    assert trainer.actor_critic.policy.drawable is None
    projection = trainer.actor_critic.policy.projection()
    assert projection.num_tokens is None
    assert projection.holes_H is None


def test_other_engines_draw_tokens_alone(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    policy = save_model(tmp_path / "policy", ROWS, tokenizer)
    bench = Bench.of(build_config(run_tree(tmp_path, policy), ["generation.engine=transformers"]))
    head = bench.trainer.actor_critic.policy.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    assert int(rollouts.tokens_BR.max()) < len(tokenizer)
    assert len(head.weight) == ROWS, "the head is whole again"
    mask_R = rollouts.response_mask_BR[0]
    question = prompts.tokens_QP[0][prompts.mask_QP[0]].tolist()
    ids = question + rollouts.tokens_BR[0][mask_R].tolist()
    expected = plain_logprobs(policy, ids, len(question), list(range(len(tokenizer))))
    torch.testing.assert_close(rollouts.logprobs_BR[0][mask_R], expected, **F32_MODEL)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi"])
def test_vllm_is_given_a_policy_of_its_tokens_alone(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    folder = save_model(tmp_path / "policy", ROWS, tokenizer, config=families(ROWS)[family])
    policy = LanguageModel.load(str(folder), dtype="float32", device=CPU, trainable=False)
    (tmp_path / "written").mkdir()
    _write_untied(policy.drawing_only(drawable_tokens(str(folder))), tmp_path / "written")
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        whole, written = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (folder, tmp_path / "written"))
    torch.testing.assert_close(written, whole[..., : len(tokenizer)], **F32_MODEL)


def test_an_engine_that_would_draw_holes_is_refused(tmp_path: Path) -> None:
    tokenizer = with_holes(byte_tokenizer(size=281), tmp_path / "tokenizer", hole=279)
    policy = save_model(tmp_path / "policy", 281, tokenizer)
    (problem,) = problems(run_tree(tmp_path, policy), "generation.engine=transformers")
    assert problem.startswith("generation.engine is transformers, which could draw the 1 ids below 281 that no token")


@pytest.mark.parametrize("init", ["policy", "reward", None])
def test_a_reward_model_of_fewer_rows_scores_and_starts_the_critic(init: str | None, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tokenizer = byte_tokenizer()
    policy = save_model(tmp_path / "policy", ROWS, tokenizer)
    reward = save_model(tmp_path / "reward", len(tokenizer), tokenizer, auto=CLASSIFIER)
    tree = run_tree(tmp_path, policy, {"kind": "model", "model": str(reward)})
    tree["policy"]["critic"] = {"init": init}
    bench = Bench.of(build_config(tree))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    scores_B = bench.scores(prompts, rollouts).batch.score_B
    plain = AutoModelForSequenceClassification.from_pretrained(reward)
    for row in range(4):
        ids = prompts.tokens_QP[row][prompts.mask_QP[row]].tolist()
        ids += rollouts.tokens_BR[row][rollouts.response_mask_BR[row]].tolist()
        with torch.no_grad():
            torch.testing.assert_close(scores_B[row], plain(torch.tensor([ids])).logits[0, 0], **F32_MODEL)


def add_pad(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def add_chat_marks(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML


def add_word(tokenizer: Any) -> None:
    tokenizer.add_tokens(["novelty"])


def add_eos(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})


def add_bos(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>"})


def add_image(tokenizer: Any) -> None:
    """As Gemma 3 1B has it."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (add_chat_marks, "'<|im_start|>' (280), '<|im_end|>' (281) can be in a text and have none"),
        (add_word, "'novelty' (280) can be in a text and have none"),
        (add_eos, "the EOS token '<|end|>', which is token 280, and the embedding of policy.model has 280 rows"),
        (add_bos, "'<s>' (280) can be in a text and have none"),
    ],
)
def test_a_token_of_the_policy_without_a_row_is_refused(
    change: Callable[[Any], None], named: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    save_model(tmp_path / "policy", 280, tokenizer)
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "policy")
    (problem,) = problems(run_tree(tmp_path, tmp_path / "policy"))
    assert named in problem
    assert "280 rows" in problem


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [add_pad, add_image])
def test_a_special_token_without_a_row_that_no_text_has_is_noted(
    change: Callable[[Any], None], family: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer((END,), pad=None)
    policy = save_model(tmp_path / "policy", 280, tokenizer, config=families(280)[family])
    change(tokenizer)
    tokenizer.save_pretrained(policy)
    bench = Bench.of(build_config(run_tree(tmp_path, policy)))
    assert any("(280)" in note and "280" in note for note in bench.plan.notes)
    assert bench.plan.tokenizer.pad_id < 280
    prompts, rollouts, experience = bench.until_experience()
    bench.update(prompts, rollouts, experience)
    spelled = run_tree(tmp_path, policy, prompts=[*TEXTS[:4], "look at <image_soft_token> and [PAD]"])
    (problem,) = problems(spelled)
    assert problem.startswith("prompt 4 (from 0) has ")


def test_an_encoder_whose_pad_has_no_row_scores_as_transformers_does_row_by_row(tmp_path: Path) -> None:
    import transformers

    policy = save_model(tmp_path / "policy", 280, byte_tokenizer())
    own = byte_tokenizer((END,), pad=None, size=270)
    add_pad(own)
    config = transformers.RobertaConfig(**{**LLAMA, "vocab_size": 270, "pad_token_id": 1})
    reward = save_model(tmp_path / "reward", 270, auto=CLASSIFIER, config=config)
    own.save_pretrained(reward)
    bench = Bench.of(build_config(run_tree(tmp_path, policy, {"kind": "model", "model": str(reward)})))
    assert any("'[PAD]' (270) of reward.components.0.model" in note for note in bench.plan.notes)
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    scores_B = bench.scores(prompts, rollouts).batch.score_B
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(reward)
    for row in range(4):
        text = prompts.texts[int(rollouts.prompt_rows[row])] + rollouts.texts[row]
        with torch.no_grad():
            expected = plain(torch.tensor([own(text)["input_ids"]])).logits[0, 0]
        torch.testing.assert_close(scores_B[row], expected, **F32_MODEL)


def test_a_reward_model_without_a_row_for_what_the_policy_may_draw_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer((END,), pad=None)
    add_pad(tokenizer)
    policy = save_model(tmp_path / "policy", 281, tokenizer)
    reward = save_model(tmp_path / "reward", 280, tokenizer, auto=CLASSIFIER)
    (problem,) = problems(run_tree(tmp_path, policy, {"kind": "model", "model": str(reward)}))
    assert "has an embedding of 280 rows, and the policy can draw '[PAD]', token 280" in problem


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", CLASSIFIER])
def test_rows_that_are_not_those_of_the_config_are_refused_with_both_numbers(auto: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    policy = save_model(tmp_path / "policy", 280, tokenizer)
    reward = save_model(tmp_path / "reward", 280, tokenizer, auto=CLASSIFIER)
    wrong, field = (reward, "reward.components.0.model") if auto == CLASSIFIER else (policy, "policy.model")
    change_json(wrong / "config.json", vocab_size=300)
    tree = run_tree(tmp_path, policy, {"kind": "model", "model": str(reward)})
    found = problems(tree)
    assert found[0].startswith(f"{field} '{wrong}' stores ")
    assert "280 x 32" in found[0]
    assert "300 x 32" in found[0]


def test_a_padding_id_that_no_embedding_can_have_is_refused_with_both_numbers(tmp_path: Path) -> None:
    policy = save_model(tmp_path / "policy", 280, byte_tokenizer())
    change_json(policy / "config.json", pad_token_id=280)
    assert (
        "its pad_token_id is 280 and its vocab_size 280; set pad_token_id to null there"
        in problems(run_tree(tmp_path, policy))[0]
    )


@pytest.mark.parametrize(
    ("in_config", "in_generation", "ends"),
    [
        ([0, 2], None, {0, 2}),
        ([0, 2], {"temperature": 0.7}, {0, 2}),
        ([0, 2], {"eos_token_id": None}, {0, 2}),
        (2, {"eos_token_id": [3]}, {0, 3}),
        (2, {"eos_token_id": 0}, {0}),
        (..., None, {0, 2}),  # the default of the class, at which generate stops, too
        (2, {"eos_token_id": [2, 3]}, {0, 2, 3}),
    ],
)
def test_a_response_ends_where_generate_stops_and_at_the_tokenizers_eos(
    in_config: Any, in_generation: Any, ends: set[int], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer((END, "<|pad|>", "<|eot|>", "<|eom|>"))
    policy = save_model(tmp_path / "policy", 280, tokenizer)
    change_json(policy / "config.json", eos_token_id=in_config)
    (policy / "generation_config.json").unlink()
    if in_generation is not None:
        change_json(policy / "generation_config.json", **in_generation)
    plan = preflight(build_config(run_tree(tmp_path, policy)))
    assert plan.tokenizer.eos_ids == ends
    if ends != {0}:
        assert any("a response ends at '<|endoftext|>' (0) or '<|e" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("eos", "named"),
    [
        ([0, 999], "'999' in its generation_config.json, which has no row in an embedding of 280 rows"),
        (-1, "'-1' in its generation_config.json, which is no token id"),
        (["<|eot|>"], "'<|eot|>' in its generation_config.json, which is no token id"),
        ([True], "'True' in its generation_config.json, which is no token id"),
    ],
)
def test_an_eos_that_is_no_token_id_is_refused(eos: Any, named: str, tmp_path: Path) -> None:
    policy = save_model(tmp_path / "policy", 280, byte_tokenizer())
    change_json(policy / "generation_config.json", eos_token_id=eos)
    (problem,) = problems(run_tree(tmp_path, policy))
    assert named in problem


IM_END = "<|im_end|>"
CHAT = ("<|endoftext|>", "<|im_start|>", IM_END)


@pytest.mark.parametrize(
    ("specials", "settings", "more_eos", "chosen"),
    [
        ((*CHAT, "<|fim_pad|>"), {"eos": IM_END, "pad": END, "chat_template": CHATML}, [0], "<|fim_pad|>"),
        ((*CHAT, "<|vision_pad|>"), {"eos": IM_END, "pad": END, "chat_template": CHATML}, [0], "ÿ"),
        (CHAT, {"eos": IM_END, "pad": IM_END, "unk_token": END, "chat_template": CHATML}, [], END),  # SmolLM2
        (CHAT, {"eos": IM_END, "pad": IM_END, "unk_token": END, "bos_token": END}, [], "ÿ"),
        (("<|b|>", "<|eot|>", "<|reserved_special_token_0|>"), {"eos": "<|eot|>", "pad": None}, [],
         "<|reserved_special_token_0|>"),
        (("<|b|>", "<|eot|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"),
         {"eos": "<|eot|>", "pad": None}, [], "<|finetune_right_pad_id|>"),
        ((END,), {"pad": None, "bos_token": END, "unk_token": END}, [], "ÿ"),  # GPT-2
        ((END, "<unused0>"), {"pad": END}, [], "<unused0>"),
        ((END, "<|pad|>"), {}, [], "<|pad|>"),
    ],
)  # fmt: skip
def test_a_token_that_no_text_has_is_chosen_to_pad_with(
    specials: tuple[str, ...], settings: dict[str, Any], more_eos: list[int], chosen: str, tmp_path: Path
) -> None:
    """``ÿ`` is the byte 0xFF of a byte-level tokenizer, which is in no UTF-8."""
    tokenizer = byte_tokenizer(specials, **settings)
    policy = save_model(tmp_path / "policy", 280, tokenizer)
    change_json(policy / "generation_config.json", eos_token_id=[tokenizer.eos_token_id, *more_eos])
    plan = preflight(build_config(run_tree(tmp_path, policy)))
    assert plan.tokenizer.pad_id == tokenizer.convert_tokens_to_ids(chosen)
    assert plan.tokenizer.pad_id not in plan.tokenizer.eos_ids
    is_noted = any(f"masked cells are filled with {chosen!r}" in note for note in plan.notes)
    assert is_noted == (tokenizer.pad_token != chosen)


def test_a_tokenizer_without_such_a_token_is_refused_with_some_that_could_do(tmp_path: Path) -> None:
    policy = save_model(tmp_path / "policy", 40, word_tokenizer(("The", "film")))
    (problem,) = problems(run_tree(tmp_path, policy))
    assert "has no token to pad with: its tokenizer has no PAD" in problem
    assert "set policy.pad_token to" in problem
    assert "'film'" in problem
    preflight(build_config(run_tree(tmp_path, policy), ["policy.pad_token=film"]))


@pytest.mark.parametrize(
    ("wanted", "named"),
    [(END, "which is also its EOS token"), ("[X]", "is not in the vocabulary"), ("[PAD]", "is token 280 of")],
)
def test_a_pad_that_is_asked_for_and_cannot_be_is_refused(wanted: str, named: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer((END,), pad=None)
    add_pad(tokenizer)
    policy = save_model(tmp_path / "policy", 280, tokenizer)
    (problem,) = problems(run_tree(tmp_path, policy), f"policy.pad_token='{wanted}'")
    assert named in problem


def test_what_generation_config_asks_of_sampling_is_noted(tmp_path: Path) -> None:
    policy = save_model(tmp_path / "policy", 280, byte_tokenizer())
    assert not any("is not used in sampling" in n for n in preflight(build_config(run_tree(tmp_path, policy))).notes)
    change_json(policy / "generation_config.json", temperature=0.7, top_k=20, repetition_penalty=1.05, do_sample=True)
    (note,) = (n for n in preflight(build_config(run_tree(tmp_path, policy))).notes if "is not used in sampling" in n)
    assert "temperature 0.7, top_k 20, repetition_penalty 1.05" in note
