"""Reward models: what they read, and where the score is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tolerances import F32_MODEL

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.reward_model import Conversation, RewardModel
from rlhf_core.models.tokenizers import load_tokenizer, vocabulary_digest

CPU = torch.device("cpu")
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def load(folder: Path, *, shares_vocabulary: bool, **config: Any) -> RewardModel:
    digest = vocabulary_digest(load_tokenizer(str(folder), field="x")) if shares_vocabulary else "another"
    settings = ModelReward(model=str(folder), **config)
    return RewardModel.load(settings, field="reward.components.0", policy_vocabulary=digest, device=CPU)


def own_score(folder: Path, token_ids: list[int]) -> float:
    """transformers' own logit for one unpadded row."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(torch.tensor([token_ids])).logits[0, 0])


def conversation(tokens: list[int], text: str = "The film was", reply: str = " slow") -> Conversation:
    return Conversation(prompt_text=text, response_text=reply, messages=[], policy_tokens=tokens)


def test_scores_are_those_of_single_unpadded_rows(tiny: Any) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    model = load(tiny.reward, shares_vocabulary=True, batch_size=2)
    expected = torch.tensor([own_score(tiny.reward, row) for row in rows])
    torch.testing.assert_close(model.score([conversation(row) for row in rows]), expected, **F32_MODEL)
    assert float(expected.std()) > 0.1


def test_a_text_that_ends_with_the_pad_token_is_read_to_its_end(tiny: Any) -> None:
    """transformers looks for the last token that is not PAD; here the last real token is known."""
    model = load(tiny.reward, shares_vocabulary=True)
    pad = model.tokenizer.convert_tokens_to_ids("<|pad|>")
    scores = model.score([conversation([5, 6, cast("int", pad)]), conversation([5, 6])])
    with_pad, without = map(float, cast("torch.Tensor", scores))
    assert abs(with_pad - without) > 1e-3


def test_another_vocabulary_reads_text(tiny: Any) -> None:
    model = load(tiny.reward, shares_vocabulary=False)
    ids = model.tokenizer("The film was slow")["input_ids"]
    score = model.score([conversation([1, 2, 3])])
    torch.testing.assert_close(score, torch.tensor([own_score(tiny.reward, ids)]), **F32_MODEL)


def test_a_chat_goes_through_the_reward_models_own_template(tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.reward, tmp_path / "reward")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    model = load(folder, shares_vocabulary=False)
    chat = Conversation("ignored", "good", [{"role": "user", "content": "well?"}], [])
    ids = model.tokenizer("<user>well?<assistant>good")["input_ids"]
    torch.testing.assert_close(model.score([chat]), torch.tensor([own_score(folder, ids)]), **F32_MODEL)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_chat_template_of_the_config_is_for_chats_and_plain_prompts_and_wins(
    tiny: Any, tmp_path: Path, as_file: bool
) -> None:
    """Even against the policy's tokens, which have another form than the model wants."""
    template = CHATML
    if as_file:
        (tmp_path / "chat.jinja").write_text(CHATML)
        template = str(tmp_path / "chat.jinja")
    model = load(tiny.reward, shares_vocabulary=True, chat_template=template)
    chat = Conversation("ignored", "good", [{"role": "user", "content": "well?"}], [5])
    plain = Conversation("well?", "good", [], [5])
    expected = own_score(tiny.reward, model.tokenizer("<user>well?<assistant>good")["input_ids"])
    torch.testing.assert_close(model.score([chat, plain]), torch.tensor([expected, expected]), **F32_MODEL)


def test_a_tokenizer_of_the_config(tiny: Any, tmp_path: Path) -> None:
    """Its vocabulary is not the policy's, so text is read."""
    folder = shutil.copytree(tiny.reward, tmp_path / "tokenizer")
    tree = json.loads((folder / "tokenizer.json").read_text())
    ids = {"a": tree["model"]["vocab"]["a"], "b": tree["model"]["vocab"]["b"]}
    tree["model"]["vocab"] |= {"a": ids["b"], "b": ids["a"]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    model = load(tiny.reward, shares_vocabulary=True, tokenizer=str(folder))
    score = model.score([Conversation("a", "ab", [], [9])])
    expected = torch.tensor([own_score(tiny.reward, [ids["b"], ids["b"], ids["a"]])])
    torch.testing.assert_close(score, expected, **F32_MODEL)


def test_an_encoder_with_an_attention_mask(tmp_path: Path, tiny: Any) -> None:
    from transformers import AutoModelForSequenceClassification, DistilBertConfig

    config = DistilBertConfig(
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        vocab_size=300,
        max_position_embeddings=64,
        num_labels=1,  # pyright: ignore[reportCallIssue]
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    load_tokenizer(str(tiny.reward), field="x").save_pretrained(tmp_path)
    model = load(tmp_path, shares_vocabulary=True)
    rows = [[5, 6, 7, 8], [9, 10]]
    expected = torch.tensor([own_score(tmp_path, row) for row in rows])
    torch.testing.assert_close(model.score([conversation(row) for row in rows]), expected, **F32_MODEL)


def test_a_long_conversation_loses_its_beginning(tiny: Any) -> None:
    model = load(tiny.reward, shares_vocabulary=True, max_len=3)
    score = model.score([conversation([1, 2, 5, 6, 7])])
    torch.testing.assert_close(score, torch.tensor([own_score(tiny.reward, [5, 6, 7])]), **F32_MODEL)


def test_more_than_one_logit_is_refused(tiny: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    GPT2ForSequenceClassification(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, num_labels=2)  # pyright: ignore[reportCallIssue]
    ).save_pretrained(tmp_path)
    load_tokenizer(str(tiny.reward), field="x").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"reward\.components\.0\.model .* has 2 logits"):
        load(tmp_path, shares_vocabulary=True)
