"""Folders and files that people bring, from the pre-flight to the scores: texts, stop sequences, reward models.

The judge is plain transformers: its decoding of prompt and response together, and its logit of one unpadded row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from iteration import Bench, tiny_tree
from text_tokenizers import CHAT_MARKS, CHATML, SENTENCES, byte_level, sentencepiece, word_pieces
from tolerances import F32_MODEL

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import NumericalError, UserError
from rlhf_core.models.texts import special_ids

STRICT = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
)
OTHER = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
CHATS = [{"prompt": [{"role": "user", "content": text}]} for text in SENTENCES]
ONE_SYSTEM = [{"prompt": [{"role": "system", "content": "Be"}, *CHATS[0]["prompt"]]}, *CHATS[1:]]


def save(folder: Path, tokenizer: Any, *, num_labels: int | None = None, likely: Sequence[str] = ()) -> Path:
    """A tiny Llama, or a sequence classifier. ``likely``: tokens that the policy likes to write."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    auto: Any = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    settings: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model = auto.from_config(config)
        for index in tokenizer.convert_tokens_to_ids(list(likely)):
            model.lm_head.weight[index] = 3 * model.lm_head.weight[index]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scores_of(folder: Path, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """transformers' own logits of single unpadded rows."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.tensor([float(model(torch.tensor([list(row)])).logits[0, 0]) for row in rows])


def ids_of(prompts: Any, rollouts: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and response tokens of each response."""
    rows = zip(rollouts.prompt_rows.tolist(), rollouts.tokens_BR, rollouts.response_mask_BR, strict=True)
    return [(prompts.tokens_QP[q][prompts.mask_QP[q]].tolist(), tokens[mask].tolist()) for q, tokens, mask in rows]


Save = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """As ``save``, once for the same tokenizer and settings: a template is tried once for the same folder."""
    root, found = tmp_path_factory.mktemp("folders"), dict[str, Path]()

    def make(tokenizer: Any, **settings: Any) -> Path:
        key = str((tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, sorted(settings.items())))
        if key not in found:
            found[key] = save(root / str(len(found)), tokenizer, **settings)
        return found[key]

    return make


@pytest.fixture
def configure(tmp_path: Path, tiny: Any) -> Callable[..., Any]:
    """A config of a policy folder, prompts and components, with further overrides."""

    def make(policy: Path, rows: Sequence[Any], *components: dict[str, Any], overrides: Sequence[str] = ()) -> Any:
        source = tmp_path / "prompts.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree: dict[str, Any] = tiny_tree(tiny) | {"reward": {"components": list(components)}}
        tree["policy"]["model"], tree["prompts"] = str(policy), {"source": str(source), "batch_size": 32}
        tree["ppo"]["num_minibatches"] = 2
        return build_config(tree, list(overrides))

    return make


def notes(config: Any) -> str:
    from rlhf_core.preflight import preflight

    return "\n".join(preflight(config).notes)


def problems(config: Any) -> str:
    from rlhf_core.preflight import preflight

    with pytest.raises(UserError) as caught:
        preflight(config)
    return "\n".join(caught.value.problems)


LENGTH = {"kind": "function", "function": "length"}
PLAIN = [{"prompt": text} for text in SENTENCES]


@pytest.mark.parametrize(
    "make", [sentencepiece, lambda: sentencepiece("metaspace"), word_pieces], ids=["llama2", "metaspace", "words"]
)
def test_a_reward_model_with_another_tokenizer_reads_what_the_policy_wrote(
    make: Callable[[], Any], configure: Any, saved: Save
) -> None:
    tokenizer, other = make(), byte_level()
    reward = saved(other, num_labels=1)
    rows = [{"prompt": text.lower()} for text in SENTENCES]  # as BERT's tokenizer writes them again
    bench = Bench.of(configure(saved(tokenizer), rows, {"model": str(reward)}))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    whole = [tokenizer.decode(p + r, skip_special_tokens=True) for p, r in ids_of(prompts, rollouts)]
    found = [
        str(prompts.texts[q]) + text for q, text in zip(rollouts.prompt_rows.tolist(), rollouts.texts, strict=True)
    ]
    assert found == whole
    assert sum(text.startswith(" ") for text in rollouts.texts) > 3
    expected = scores_of(reward, [other(text)["input_ids"] for text in whole])
    torch.testing.assert_close(bench.scores(prompts, rollouts).batch.score_B, expected, **F32_MODEL)


@pytest.mark.parametrize("engine", ["own", "transformers"])
def test_a_special_token_stops(engine: str, configure: Any, saved: Save) -> None:
    tokenizer = byte_level(CHAT_MARKS, chat_template=CHATML)
    policy = saved(tokenizer, likely=["<|im_end|>"])
    overrides = ["generation.stop=[<|im_end|>]", "generation.max_new_tokens=30", f"generation.engine={engine}"]
    config = configure(policy, CHATS, LENGTH, overrides=overrides)
    bench = Bench.of(config)
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rollouts.finish_reasons.count("stop") > 3
    for (_, ids), reason in zip(ids_of(prompts, rollouts), rollouts.finish_reasons, strict=True):
        assert (mark in ids) == (reason == "stop")
        assert mark not in ids[:-1]


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        (
            "<|endoftext|>",
            "generation.stop has '<|endoftext|>', an EOS of policy.model, which ends a response without it",
        ),
        ("x<|endoftext|>", "generation.stop has 'x<|endoftext|>', which holds an EOS of policy.model"),
        ("Human:", ""),
        ("<|im_end|>", ""),
    ],
)
def test_stop_sequences_that_are_not_needed_are_noted(stop: str, sentence: str, configure: Any, saved: Save) -> None:
    policy = saved(byte_level(CHAT_MARKS))
    found = notes(configure(policy, PLAIN, LENGTH, overrides=[f"generation.stop={json.dumps([stop])}"]))
    assert sentence in found
    assert ("generation.stop" in found) == bool(sentence)


MARKS = """
SEEN = []

def marks(responses, completions, completion_ids, **_):
    SEEN.append((list(responses), list(completions), [list(c) for c in completion_ids]))
    return [float("<think>" in text) for text in responses]
"""


class TestSpecialTokens:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "mark_rewards.py").write_text(MARKS)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        yield
        sys.modules.pop("mark_rewards", None)

    @pytest.mark.parametrize("keep", [False, True])
    def test_a_function_sees_them_where_it_asks(self, keep: bool, configure: Any, saved: Save) -> None:
        tokenizer = byte_level(("<|endoftext|>", "<|pad|>", "<think>", "</think>"))
        policy = saved(tokenizer, likely=["<think>", "<|endoftext|>"])
        component = {"kind": "function", "function": "mark_rewards:marks", "keep_special_tokens": keep}
        config = configure(policy, PLAIN, component, overrides=["generation.max_new_tokens=30"])
        remark = "reward.components.0 reads responses without special tokens, and <think>, </think> are such"
        assert (remark in notes(config)) != keep
        bench = Bench.of(config)
        prompts = bench.prompts().batch
        rollouts = bench.rollouts(prompts).batch
        scores = bench.scores(prompts, rollouts).batch.score_B.tolist()
        (texts, completions, ids), think = (
            sys.modules["mark_rewards"].SEEN[-1],
            tokenizer.convert_tokens_to_ids("<think>"),
        )
        assert sum(think in row for row in ids) > 3
        assert scores == [float(keep and think in row) for row in ids]
        shown = [
            tokenizer.decode(row[:-1] if row[-1] == tokenizer.eos_token_id else row, skip_special_tokens=not keep)
            for row in ids
        ]
        assert texts == completions == shown
        assert list(rollouts.texts) == [tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def test_a_ready_made_pattern_that_names_one(self, configure: Any, saved: Save) -> None:
        policy = saved(byte_level(("<|endoftext|>", "<|pad|>", "<answer>")))
        of = {"kind": "function", "function": "format"}
        assert "and <answer> is one in the tokenizer" in notes(configure(policy, PLAIN, of))
        assert "special tokens" not in notes(configure(policy, PLAIN, of | {"keep_special_tokens": True}))
        assert "special tokens" not in notes(configure(policy, PLAIN, of | {"params": {"pattern": "yes|no"}}))


class TestOpenedThought:
    OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")

    @pytest.mark.parametrize(
        ("template", "params", "sentence"),
        [
            (OPENS, {}, r"prompts end with '<think>\n', and reward.components.0 (format) looks for it in the response"),
            (OPENS, {"opened": True}, ""),
            (OPENS, {"pattern": "yes|no"}, ""),
            (CHATML, {}, ""),
            (CHATML, {"opened": True}, "reward.components.0.params has opened: True, but prompts end with"),
            (
                CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"),
                {},
                r"set reward.components.0.params: {opened: '<think>\n\n</think>\n\n'}",
            ),
        ],
    )
    def test_beside_format(self, template: str, params: Any, sentence: str, configure: Any, saved: Save) -> None:
        policy = saved(byte_level(CHAT_MARKS, chat_template=template))
        found = notes(configure(policy, CHATS, {"kind": "function", "function": "format", "params": params}))
        assert sentence in found
        assert ("<think>" in found or "opened" in found) == bool(sentence)


class TestRewardModelsOfChats:
    @pytest.fixture
    def policy(self, saved: Save) -> Path:
        return saved(byte_level(CHAT_MARKS, chat_template=CHATML))

    @pytest.mark.parametrize("shares", [False, True])
    @pytest.mark.parametrize(
        ("own", "chosen", "sentence"),
        [
            (
                None,
                None,
                "has no chat template of its own, and prompts.column holds chats, whose markup is the policy's",
            ),
            (None, "raw", "markup included (chat_template: raw)"),
            (None, OTHER, "reads chats by the chat_template of the config"),
            (OTHER, None, "reads chats by its own chat template"),
            (CHATML, None, ""),
        ],
    )
    def test_the_plan_says_whose_template_is_used(
        self,
        shares: bool,
        own: str | None,
        chosen: str | None,
        sentence: str,
        policy: Path,
        configure: Any,
        saved: Save,
    ) -> None:
        tokenizer = byte_level(CHAT_MARKS, size=300 if shares else 290, chat_template=own)
        reward = saved(tokenizer, num_labels=1)
        config = configure(policy, CHATS, {"model": str(reward), "chat_template": chosen})
        if own is None and chosen is None:
            assert sentence in problems(config)
            return
        same = "reads chats as the policy's tokens: vocabulary and chat template are the same"
        differs = "reads chats by its own chat template (its vocabulary is not the policy's)"
        assert (sentence or (same if shares else differs)) in notes(config)
        bench = Bench.of(config)
        prompts = bench.prompts().batch
        rollouts = bench.rollouts(prompts).batch
        wanted = []
        for (prompt, response), q, text in zip(
            ids_of(prompts, rollouts), rollouts.prompt_rows.tolist(), rollouts.texts, strict=True
        ):
            turns = [*prompts.messages[q], {"role": "assistant", "content": text}]
            if chosen == "raw" or (own == CHATML and shares):
                wanted.append(prompt + response if shares else tokenizer(str(prompts.texts[q]) + text)["input_ids"])
            else:
                template = None if chosen is None else OTHER
                wanted.append(tokenizer.apply_chat_template(turns, chat_template=template)["input_ids"])
        torch.testing.assert_close(
            bench.scores(prompts, rollouts).batch.score_B, scores_of(reward, wanted), **F32_MODEL
        )

    @pytest.mark.parametrize("on_error", ["fail", "drop", "substitute"])
    def test_one_conversation_that_its_template_refuses(
        self, on_error: str, policy: Path, configure: Any, saved: Save
    ) -> None:
        reward = saved(byte_level(CHAT_MARKS, size=290, chat_template=STRICT), num_labels=1)
        component = {"model": str(reward), "on_error": on_error} | (
            {"substitute": -4.0} if on_error == "substitute" else {}
        )
        refused = "its chat template refuses 1 of 40 prompts (prompt 0 (from 0): no system role)"
        overrides = ["prompts.shuffle=false"]
        config = configure(policy, ONE_SYSTEM, component, LENGTH, overrides=overrides)
        if on_error == "fail":
            assert refused in problems(config)
            lenient = configure(policy, ONE_SYSTEM, component | {"on_error": "drop"}, LENGTH, overrides=overrides)
            bench = Bench.of(lenient)
            bench.config = config
        else:
            assert f"{refused}; on_error is {on_error}" in notes(config)
            bench = Bench.of(config)
        prompts = bench.prompts().batch
        rollouts = bench.rollouts(prompts).batch
        if on_error == "fail":
            with pytest.raises(
                NumericalError,
                match=r"reward0 could not read the conversation \(no system role\) for 1 of 32 samples \(i000000-p0",
            ):
                bench.scores(prompts, rollouts)
            return
        result = bench.scores(prompts, rollouts)
        assert result.metrics["reward/reward0_failed"] == 1.0
        assert result.batch.components_mask_BC[:, 0].tolist() == [on_error == "substitute", *[True] * 31]
        if on_error == "substitute":
            assert result.batch.components_BC[0, 0] == -4.0

    @pytest.mark.parametrize(
        ("own", "options", "sentence"),
        [
            ("{{ mood }}" + OTHER, {"mood": "kind"}, None),
            ("{{ mood }}" + OTHER, {"moods": "kind"}, "'moods', which the chat template of reward.components.0.model "),
            (None, {"mood": "kind"}, "reads these prompts by no chat template"),
        ],
    )
    def test_options_that_nothing_reads(
        self, own: str | None, options: Any, sentence: str | None, policy: Path, configure: Any, saved: Save
    ) -> None:
        reward = saved(byte_level(CHAT_MARKS, size=290, chat_template=own), num_labels=1)
        component = {"model": str(reward), "template_options": options, "chat_template": None if own else "raw"}
        config = configure(policy, CHATS, component)
        found = notes(config) if sentence is None else problems(config)
        assert (sentence or "reads chats by its own chat template") in found

    def test_a_template_that_leaves_thoughts_out(self, policy: Path, configure: Any, saved: Save) -> None:
        forgetful = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
        reward = saved(byte_level(CHAT_MARKS, size=290, chat_template=forgetful), num_labels=1)
        found = notes(configure(policy, CHATS, {"model": str(reward)}))
        assert "its chat template leaves out what stands in <think>…</think> of an answer" in found


@pytest.mark.parametrize("max_len", [4, 8, 64])
def test_an_encoder_keeps_what_frames_its_text(max_len: int, configure: Any, saved: Save, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig

    other = word_pieces()
    config = BertConfig(
        vocab_size=len(other), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=1, initializer_range=0.3,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    other.save_pretrained(tmp_path / "reward")
    policy = saved(byte_level())
    bench = Bench.of(configure(policy, PLAIN, {"model": str(tmp_path / "reward"), "max_len": max_len}))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    other.truncation_side = "left"
    wanted = [
        other(str(prompts.texts[q]) + text, truncation=True, max_length=max_len)["input_ids"]
        for q, text in zip(rollouts.prompt_rows.tolist(), rollouts.texts, strict=True)
    ]
    expected = scores_of(tmp_path / "reward", wanted)
    torch.testing.assert_close(bench.scores(prompts, rollouts).batch.score_B, expected, **F32_MODEL)


@pytest.mark.parametrize("answer", [None, "", "twelve", True, [72], {"a": 1}, r"\sqrt{3}"])
@pytest.mark.parametrize("on_error", ["fail", "drop"])
def test_an_answer_that_is_no_number_is_found_before_the_run(
    answer: Any, on_error: str, configure: Any, saved: Save
) -> None:
    policy = saved(byte_level())
    rows = [row | {"gold": "#### 72" if i else answer} for i, row in enumerate(PLAIN)]
    component = {"kind": "function", "function": "numeric_match", "params": {"column": "gold"}, "on_error": on_error}
    config = configure(policy, rows, component, LENGTH, overrides=["prompts.columns=[gold]"])
    sentence = (
        "needs a number, or a text with one in the column 'gold', where 1 of 40 prompts have none (prompt 0 (from 0)"
    )
    assert sentence in (problems(config) if on_error == "fail" else notes(config))


def test_every_response_is_its_eos_alone(configure: Any, saved: Save) -> None:
    """A reward model with another tokenizer then reads the prompt."""
    tokenizer, other = byte_level(), byte_level(size=290)
    reward = saved(other, num_labels=1)
    bench = Bench.of(configure(saved(tokenizer), PLAIN, {"model": str(reward)}))
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    rollouts.tokens_BR[:, 0], rollouts.response_mask_BR[:] = tokenizer.eos_token_id, False
    rollouts.response_mask_BR[:, 0] = True
    rollouts = type(rollouts)(**{**vars(rollouts), "texts": [""] * 32, "finish_reasons": ["eos"] * 32})
    expected = scores_of(reward, [other(prompts.texts[q])["input_ids"] for q in rollouts.prompt_rows.tolist()])
    torch.testing.assert_close(bench.scores(prompts, rollouts).batch.score_B, expected, **F32_MODEL)
    assert tokenizer.eos_token_id in special_ids(tokenizer)
