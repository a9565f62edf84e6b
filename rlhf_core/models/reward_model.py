"""A fixed reward model: one logit for a conversation, read at its last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import ModelReward
from rlhf_core.models.causality import is_causal
from rlhf_core.models.frozen import FrozenModels
from rlhf_core.models.language_model import DTYPES
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.templates import check_template
from rlhf_core.models.tokenizers import load_tokenizer, vocabulary_digest
from rlhf_core.models.trunk import Trunk
from rlhf_core.models.untrusted import MAX_TEXT_BYTES
from rlhf_core.prompts.rendering import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE: Final[tuple[Message, ...]] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)
"""What a chat template must be able to render."""


@dataclass(frozen=True)
class Conversation:
    """What is scored: the prompt with its response, as text and as the policy's tokens."""

    prompt_text: str
    response_text: str
    messages: Sequence[Message]
    """The prompt as chat messages; empty for plain text."""
    policy_tokens: Sequence[int]
    """Prompt and response, the EOS included."""
    num_prompt_tokens: int = 0
    """How many of them are the prompt."""
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The dataset columns of the prompt, for functions and services."""


class RewardModel:
    """An ``AutoModelForSequenceClassification`` with one logit and its own tokenizer.

    A model with the policy's vocabulary reads the policy's tokens as they are, EOS included: what was
    sampled is what is scored. Any other one, or one with a chat template of the config, reads text: the chat
    through the template when it has one, else prompt and response one after the other.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.
        reads_policy_tokens: whether its vocabulary is the policy's.
        max_len: tokens read; a longer conversation loses its beginning.
        batch_size: rows at a time, sorted by length.
        device: where it lives.
        chat_template: of the config: Jinja, for chats and for plain prompts, which are a user's message then.
        date: what a chat template that reads the clock takes for today; None: the machine's.
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
        chat_template: str | None = None,
        date: str | None = None,
    ) -> None:
        self.model = cast("nn.Module", model.to(device).eval().requires_grad_(False))
        self.is_decoder = isinstance(getattr(model, "score", None), nn.Linear) and is_causal(model.base_model)
        self._trunk = Trunk(model.base_model, dtype=torch.float32) if self.is_decoder else None
        self.tokenizer = tokenizer
        self.tokenizer.truncation_side = "left"
        self.reads_policy_tokens = reads_policy_tokens
        self.max_len, self.batch_size, self.device = max_len, batch_size, device
        self.chat_template, self.date = chat_template, date

    @classmethod
    def load(
        cls,
        config: ModelReward,
        *,
        field: str,
        policy_vocabulary: str,
        device: torch.device,
        frozen: FrozenModels | None = None,
        date: str | None = None,
    ) -> RewardModel:
        """Load from a folder or hub id, or take the copy in ``frozen``.

        Raises: UserError naming ``field``; more than one logit is refused.
        """
        tokenizer, template = load_reward_tokenizer(config, field=field)
        model = (frozen or FrozenModels()).load(
            "AutoModelForSequenceClassification", config.model, DTYPES[config.dtype], f"{field}.model"
        )
        if model.config.num_labels != 1:
            raise UserError(
                f"{field}.model {config.model!r} has {model.config.num_labels} logits; a reward model has one "
                "(num_labels: 1 in its config.json)"
            )
        context = num_positions(model) or tokenizer.model_max_length
        return cls(
            model,
            tokenizer,
            reads_policy_tokens=template is None and vocabulary_digest(tokenizer) == policy_vocabulary,
            max_len=min(config.max_len or context, context),
            batch_size=config.batch_size,
            device=device,
            chat_template=template,
            date=date,
        )

    @torch.no_grad()
    def score(self, conversations: Sequence[Conversation]) -> Tensor:
        """[B] float32 raw scores on the CPU."""
        if not (self.chat_template or self.reads_policy_tokens) and any(c.messages for c in conversations):
            check_template(self.tokenizer.chat_template, PROBE, f"the reward model {self.tokenizer.name_or_path!r}")
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
        if self.chat_template or (conversation.messages and getattr(self.tokenizer, "chat_template", None)):
            question: Message = {"role": "user", "content": conversation.prompt_text}
            asked = conversation.messages or [question]
            reply: Message = {"role": "assistant", "content": conversation.response_text}
            text = render_chat(
                self.tokenizer,
                [*asked, reply],
                add_generation_prompt=False,
                template=self.chat_template,
                date=self.date,
            )
            return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])
        text = conversation.prompt_text + conversation.response_text
        # truncated by the tokenizer, which keeps the tokens that frame a text: an encoder's score is read at [CLS]
        return cast("list[int]", self.tokenizer(text, truncation=True, max_length=self.max_len)["input_ids"])

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


def load_reward_tokenizer(config: ModelReward, *, field: str) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer of a reward model, and the text of the config's chat template.

    Args:
        config: its ``tokenizer``, or null for the model's, and its ``chat_template``.
        field: of the component, for messages.
    Raises: UserError naming ``field``: no tokenizer, no such file, or a template that renders no plain chat.
    """
    name = "tokenizer" if config.tokenizer is not None else "model"
    tokenizer = load_tokenizer(config.tokenizer or config.model, field=f"{field}.{name}")
    if config.chat_template is None:
        return tokenizer, None
    template = chat_template_text(config.chat_template, field=f"{field}.chat_template")
    check_template(template, PROBE, f"{field}.chat_template")
    try:
        text = render_chat(tokenizer, PROBE, add_generation_prompt=False, template=template)
    except Exception as error:  # jinja2's, and whatever a template raises
        reason = " ".join(str(error).split())
        raise UserError(f"{field}.chat_template does not render a question and its answer: {reason}") from None
    if "answer" not in text:
        raise UserError(f"{field}.chat_template leaves the answer out: it renders {text[:80]!r}")
    return tokenizer, template


def chat_template_text(template: str, *, field: str) -> str:
    """A Jinja text as it is, or what the file of that name holds. Raises UserError naming ``field``."""
    if "{{" in template or "{%" in template:
        return template
    try:
        path = Path(template).expanduser()
        if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:  # a pipe or a device would never end
            raise OSError
        return path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError):
        raise UserError(f"{field} {template!r} is neither Jinja ({{{{ … }}}} or {{% … %}}) nor a file of it") from None
