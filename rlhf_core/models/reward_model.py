"""A fixed reward model: one logit for a conversation, read at its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.causality import is_causal
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.language_model import DTYPES
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.reward_text import PROBE, Conversation, Failure, RewardReader, in_a_line
from rlhf_core.models.templates import check_template
from rlhf_core.models.trunk import Trunk


class RewardModel:
    """An ``AutoModelForSequenceClassification`` with one logit and its own tokenizer.

    What it reads, :class:`RewardReader` says.

    Args:
        model: the transformers model.
        reader: turns conversations into its tokens.
        batch_size: rows at a time, sorted by length.
        device: where it lives.
    """

    def __init__(self, model: Any, reader: RewardReader, *, batch_size: int, device: torch.device) -> None:
        self.model = cast("nn.Module", model.to(device).eval().requires_grad_(False))
        self.is_decoder = isinstance(getattr(model, "score", None), nn.Linear) and is_causal(model.base_model)
        self._trunk = Trunk(model.base_model, dtype=torch.float32) if self.is_decoder else None
        self.reader, self.tokenizer = reader, reader.tokenizer
        self.batch_size, self.device = batch_size, device

    @classmethod
    def load(
        cls,
        config: ModelReward,
        *,
        field: str,
        policy_vocabulary: str,
        device: torch.device,
        frozen: FrozenModels | None = None,
        template_date: str | None = None,
    ) -> RewardModel:
        """Load from a folder or hub id, or take the copy in ``frozen``.

        Raises: UserError naming ``field``; more than one logit is refused.
        """
        reader = RewardReader.load(
            config, field=field, policy_vocabulary=policy_vocabulary, template_date=template_date
        )
        model = (frozen or FrozenModels()).load(
            "AutoModelForSequenceClassification", config.model, DTYPES[config.dtype], f"{field}.model"
        )
        if model.config.num_labels != 1:
            raise UserError(
                f"{field}.model {config.model!r} has {model.config.num_labels} logits; a reward model has one "
                "(num_labels: 1 in its config.json)"
            )
        context = num_positions(model) or reader.tokenizer.model_max_length
        reader = replace(reader, max_len=min(config.max_len or context, context))
        return cls(model, reader, batch_size=config.batch_size, device=device)

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation]) -> Tensor | list[float | Failure]:
        """[B] float32 raw scores on the CPU; a list where a conversation cannot be read, which fails alone."""
        if any(self.reader.source(is_chat=bool(c.messages)) == "own" for c in conversations):
            check_template(self.tokenizer.chat_template, PROBE, self.reader.named)
        rows = [self._token_ids(conversation) for conversation in conversations]
        read = {i: row for i, row in enumerate(rows) if not isinstance(row, Failure)}
        scores_B = torch.zeros(len(rows))
        order = sorted(read, key=lambda i: (len(read[i]), i))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            scores_B[index] = self._score_rows([read[i] for i in index]).cpu()
        if len(read) == len(rows):
            return scores_B
        scores = cast("list[float]", scores_B.tolist())
        return [row if isinstance(row, Failure) else score for row, score in zip(rows, scores, strict=True)]

    def _token_ids(self, conversation: Conversation) -> list[int] | Failure:
        try:
            ids = self.reader.token_ids(conversation)
        except Exception as error:  # jinja2's, and whatever a template or a tokenizer raises
            return Failure(f"could not read the conversation ({in_a_line(error)})", error)
        known = len(cast("Any", self.model).get_input_embeddings().weight)
        if not ids:
            return Failure("found no token in prompt and response")
        return ids if max(ids) < known else Failure(f"has no embedding for the token {max(ids)}, only for {known},")

    def _score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if self._trunk is not None:
            # the last token of a row is known here exactly: transformers looks for the last one that is not PAD,
            # and is wrong when a text ends with one
            packed = PackedRows.of(rows, self.device)
            head = cast("nn.Linear", self.model.score)
            return cast("Tensor", head(self._trunk(packed, packed.ends_B)))[:, 0].float()
        lens_n = torch.tensor([len(row) for row in rows])
        tokens_nL = torch.zeros(len(rows), int(lens_n.max()), dtype=torch.int64)
        mask_nL = torch.arange(tokens_nL.shape[1])[None, :] < lens_n[:, None]
        pad = self.tokenizer.pad_token_id
        tokens_nL.fill_(0 if pad is None else int(cast("int", pad)))
        tokens_nL[mask_nL] = torch.tensor([token for row in rows for token in row])
        tokens_nL, mask_nL = tokens_nL.to(self.device), mask_nL.to(self.device)
        return cast("Tensor", self.model(input_ids=tokens_nL, attention_mask=mask_nL.long()).logits)[:, 0].float()


def num_positions(model: Any) -> int | None:
    """The longest text a model reads, in tokens, where its config tells."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not length:
        return None
    for name, module in cast("nn.Module", model).named_modules():
        # RoBERTa and its kin count positions from the padding index on, so that a few of them are never used
        if name.endswith("position_embeddings") and isinstance(padding := getattr(module, "padding_idx", None), int):
            return int(length) - padding - 1
    return int(length)
