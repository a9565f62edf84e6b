"""A fixed reward model: one logit for a conversation, read at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.language_model import DTYPES, load_transformers_model
from rlhf_core.models.tokenizers import load_tokenizer, vocabulary_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """What is scored: the prompt with its response, as text and as the policy's tokens."""

    prompt_text: str
    response_text: str
    messages: Sequence[Message]
    """The prompt as chat messages; empty for plain text."""
    policy_tokens: Sequence[int]
    """Prompt and response, the EOS included."""


class RewardModel:
    """An ``AutoModelForSequenceClassification`` with one logit and its own tokenizer.

    A model with the policy's vocabulary reads the policy's tokens as they are, EOS included: what was
    sampled is what is scored. Any other one reads text: the chat through its own template when it has one,
    else prompt and response one after the other.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.
        reads_policy_tokens: whether its vocabulary is the policy's.
        max_len: tokens read; a longer conversation loses its beginning.
        batch_size: rows at a time, sorted by length.
        device: where it lives.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reads_policy_tokens: bool,
        max_len: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.model = cast("nn.Module", model.to(device).eval().requires_grad_(False))
        self.tokenizer = tokenizer
        self.reads_policy_tokens = reads_policy_tokens
        self.max_len, self.batch_size, self.device = max_len, batch_size, device

    @classmethod
    def load(cls, config: ModelReward, *, field: str, policy_vocabulary: str, device: torch.device) -> RewardModel:
        """Load from a folder or hub id. Raises UserError naming ``field``; more than one logit is refused."""
        tokenizer = load_tokenizer(config.model, field=f"{field}.model")
        model = load_transformers_model(
            "AutoModelForSequenceClassification", config.model, DTYPES[config.dtype], f"{field}.model"
        )
        if model.config.num_labels != 1:
            raise UserError(
                f"{field}.model {config.model!r} has {model.config.num_labels} logits; a reward model has one "
                "(num_labels: 1 in its config.json)"
            )
        text_config = model.config.get_text_config()
        context = int(getattr(text_config, "max_position_embeddings", 0) or tokenizer.model_max_length)
        return cls(
            model,
            tokenizer,
            reads_policy_tokens=vocabulary_digest(tokenizer) == policy_vocabulary,
            max_len=min(config.max_len or context, context),
            batch_size=config.batch_size,
            device=device,
        )

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation]) -> Tensor:
        """[B] float32 raw scores on the CPU."""
        rows = [self._token_ids(c)[-self.max_len :] for c in conversations]
        scores_B = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            scores_B[index] = self._score_rows([rows[i] for i in index]).cpu()
        return scores_B

    def _token_ids(self, conversation: Conversation) -> Sequence[int]:
        if self.reads_policy_tokens:
            return conversation.policy_tokens
        if conversation.messages and getattr(self.tokenizer, "chat_template", None):
            reply = {"role": "assistant", "content": conversation.response_text}
            text = self.tokenizer.apply_chat_template([*conversation.messages, reply], tokenize=False)
            return cast("list[int]", self.tokenizer(cast("str", text), add_special_tokens=False)["input_ids"])
        text = conversation.prompt_text + conversation.response_text
        return cast("list[int]", self.tokenizer(text)["input_ids"])

    def _score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        lens_n = torch.tensor([len(row) for row in rows])
        tokens_nL = torch.zeros(len(rows), int(lens_n.max()), dtype=torch.int64)
        mask_nL = torch.arange(tokens_nL.shape[1])[None, :] < lens_n[:, None]
        pad = self.tokenizer.pad_token_id
        tokens_nL.fill_(0 if pad is None else int(cast("int", pad)))
        tokens_nL[mask_nL] = torch.tensor([token for row in rows for token in row])
        tokens_nL, mask_nL = tokens_nL.to(self.device), mask_nL.to(self.device)
        head: Any = getattr(self.model, "score", None)
        if isinstance(head, nn.Linear):
            # a decoder: causal, so right padding is never seen, and the last real token is known here exactly
            # (transformers looks for the last token that is not PAD, and is wrong when a text ends with one)
            base = cast("nn.Module", cast("Any", self.model).base_model)
            hidden_nLD = base(input_ids=tokens_nL, use_cache=False).last_hidden_state
            last_nD = hidden_nLD[torch.arange(len(rows), device=self.device), lens_n.to(self.device) - 1]
            return cast("Tensor", head(last_nD))[:, 0].float()
        return cast("Tensor", self.model(input_ids=tokens_nL, attention_mask=mask_nL.long()).logits)[:, 0].float()
