"""What a reward model reads of a prompt and its response: tokens, with no weights in sight.

One rule decides whose chat template is used, whether or not the vocabularies are equal:

1. ``chat_template`` of the config, for chats and for plain prompts (as a user's message);
2. for chats, the reward model's own template. Where vocabulary and template are the policy's, that is what the policy's
   tokens say, and they are read as they are, EOS included;
3. ``chat_template: raw``: what the policy has read and written, as it is: its tokens where the vocabularies are equal,
   else the text of the prompt with the response behind it. Plain prompts without a template are always read so.

A chat without any of them is refused: one model's markup means nothing to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.reward_config import RAW, ModelReward
from rlhf_core.models.templates import check_template
from rlhf_core.models.texts import prompt_ends, response_text, special_ids
from rlhf_core.models.tokenizers import VocabularyDigest, load_tokenizer, vocabulary_digest
from rlhf_core.models.untrusted import MAX_TEXT_BYTES
from rlhf_core.prompts.rendering import render_chat, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE: Final[tuple[Message, ...]] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)
"""What a chat template must be able to render."""
MAX_REASON: Final = 300


@dataclass(frozen=True)
class Failure:
    """Why a component has no score for a response; the reason follows its name in a sentence.

    Example: ``Failure("gave nan")``, ``Failure("raised KeyError: 'x'")``
    """

    reason: str
    error: Exception | None = None


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
    finish_reason: str = "length"
    """eos | stop | length"""


def text_with_special_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """The response's text with its special tokens by their names, but for the one that ended it: EOS or a stop mark.

    Args:
        tokenizer: the policy's.
        conversation: prompt and response.
    """
    tokens, num = list(conversation.policy_tokens), conversation.num_prompt_tokens
    (end,) = prompt_ends(tokenizer, [tokens[:num]])
    reason = conversation.finish_reason
    is_ended = reason == "eos" or (reason == "stop" and tokens[-1] in special_ids(tokenizer))
    return response_text(tokenizer, end, tokens[num:-1] if is_ended else tokens[num:], keep_special_tokens=True)


@dataclass(frozen=True)
class RewardReader:
    """What one reward model reads."""

    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedTokenizerBase | None
    """The policy's tokenizer, where it is known."""
    shares_vocabulary: bool
    """Whether the policy's token ids mean the same to this model."""
    template: str | None = None
    """Jinja text of the config's ``chat_template``."""
    raw: bool = False
    """Whether ``chat_template`` is ``raw``."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further variables of the template."""
    date: str | None = None
    """YYYY-MM-DD that a template's clock shows."""
    keep_special_tokens: bool = False
    """Whether a response that is read as text has its special tokens."""
    max_len: int | None = None
    """Tokens read; a longer conversation loses its beginning, but for the tokens that frame it."""

    @classmethod
    def load(
        cls,
        config: ModelReward,
        *,
        field: str,
        policy_vocabulary: str,
        template_date: str | None = None,
    ) -> RewardReader:
        """Load the tokenizer of a component and settle what it reads.

        Args:
            config: of the component.
            field: its place in the config, for messages.
            policy_vocabulary: of ``vocabulary_digest``, which knows the policy's tokenizer.
            template_date: of the run, for templates that show a date.
        Raises: UserError naming ``field``.
        """
        tokenizer, template = load_reward_tokenizer(config, field=field, date=template_date)
        policy = policy_vocabulary.tokenizer if isinstance(policy_vocabulary, VocabularyDigest) else None
        if config.keep_special_tokens and policy is None:
            raise UserError(f"{field}.keep_special_tokens needs the policy's tokenizer; give its vocabulary_digest")
        return cls(
            tokenizer,
            policy,
            shares_vocabulary=vocabulary_digest(tokenizer) == policy_vocabulary,
            template=template,
            raw=config.chat_template == RAW,
            options=config.template_options,
            date=template_date,
            keep_special_tokens=config.keep_special_tokens,
            max_len=config.max_len,
        )

    @property
    def named(self) -> str:
        """The reward model as messages name it."""
        return f"the reward model {self.tokenizer.name_or_path!r}"

    @property
    def has_own_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def source(self, *, is_chat: bool) -> str | None:
        """Where the tokens come from: given (template), own (template), tokens, raw; None: undecided, to be refused."""
        as_written = "tokens" if self.shares_vocabulary else "raw"
        if self.template is not None:
            return "given"
        if not is_chat or self.raw:
            return as_written
        if not self.has_own_template:
            return None
        same = self.policy is None or self.tokenizer.chat_template == self.policy.chat_template
        return "tokens" if self.shares_vocabulary and same and not self.options else "own"

    def token_ids(self, conversation: Conversation) -> list[int]:
        """What the model reads of a conversation. Raises whatever a template raises, or ValueError."""
        source = self.source(is_chat=bool(conversation.messages))
        if source is None:
            raise ValueError("it has no chat template, and chat_template is not set")
        if source == "tokens":
            return self._cut(list(conversation.policy_tokens))
        text = self.text(conversation)
        if source == "raw":
            return self._framed(self._plain_ids(text))
        ids = self._plain_ids(text)
        return self._framed(ids) if self._reads_cls else self._cut(ids)

    def text(self, conversation: Conversation) -> str:
        """The text that is read, if text is read at all: the whole of it, however much ``max_len`` leaves."""
        response = conversation.response_text
        if self.keep_special_tokens and self.policy is not None:
            response = text_with_special_tokens(self.policy, conversation)
        if self.source(is_chat=bool(conversation.messages)) in ("given", "own"):
            question: Message = {"role": "user", "content": conversation.prompt_text}
            return self.rendered([*(conversation.messages or [question]), {"role": "assistant", "content": response}])
        return conversation.prompt_text + response

    def rendered(self, messages: Sequence[Message]) -> str:
        """A conversation by the template. Raises whatever the template raises."""
        (found,) = self.all_rendered([messages])
        if isinstance(found, Exception):
            raise found
        return found

    def all_rendered(self, conversations: Sequence[Sequence[Message]]) -> list[str | Exception]:
        """Conversations by the template, or what it says against each. Raises UserError for one without an end."""
        return render_chats(
            self.tokenizer,
            conversations,
            add_generation_prompt=False,
            template=self.template,
            options=self.options,
            date=self.date,
        )

    def _plain_ids(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer writes before and behind a text."""
        plain, whole = self._plain_ids("a"), cast("list[int]", self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    @property
    def _reads_cls(self) -> bool:
        """Whether the tokenizer begins a text with [CLS], where an encoder's score is read."""
        return self.tokenizer.cls_token_id is not None and self.tokenizer.cls_token_id in self._frame[0]

    def _framed(self, ids: list[int]) -> list[int]:
        """A text within the tokens that frame it; one that it has already is not written twice."""
        before, behind = self._frame
        if before and ids[: len(before)] == before:
            ids = ids[len(before) :]
        if behind and ids[len(ids) - len(behind) :] == behind:
            ids = ids[: len(ids) - len(behind)]
        return self._cut([*before, *ids, *behind])

    def _cut(self, ids: list[int]) -> list[int]:
        """The last ``max_len`` tokens, but for those that begin a text, which stay."""
        if self.max_len is None or len(ids) <= self.max_len:
            return ids
        before, _ = self._frame
        firsts = (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        kept = len(before) if ids[: len(before)] == before else 0
        kept = kept or int(ids[0] in firsts)
        return ids[-self.max_len :] if kept >= self.max_len else [*ids[:kept], *ids[kept - self.max_len :]]


def load_reward_tokenizer(
    config: ModelReward, *, field: str, date: str | None = None
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer of a reward model, and the text of the config's chat template; None for ``raw`` or null.

    Args:
        config: its ``tokenizer``, or null for the model's, its ``chat_template`` and ``template_options``.
        field: of the component, for messages.
        date: that a template's clock shows.
    Raises: UserError naming ``field``: no tokenizer, no such file, or a template that renders no plain chat.
    """
    name = "tokenizer" if config.tokenizer is not None else "model"
    tokenizer = load_tokenizer(config.tokenizer or config.model, field=f"{field}.{name}")
    if config.chat_template is None or config.chat_template == RAW:
        return tokenizer, None
    template = chat_template_text(config.chat_template, field=f"{field}.chat_template")
    check_template(template, PROBE, f"{field}.chat_template")
    try:
        text = render_chat(
            tokenizer,
            PROBE,
            add_generation_prompt=False,
            template=template,
            options=config.template_options,
            date=date,
        )
    except Exception as error:  # jinja2's, and whatever a template raises
        raise UserError(
            f"{field}.chat_template does not render a question and its answer: {in_a_line(error)}"
        ) from None
    if "answer" not in text:
        raise UserError(f"{field}.chat_template leaves the answer out: it renders {text[:80]!r}")
    return tokenizer, template


def chat_template_text(template: str, *, field: str) -> str:
    """A Jinja text or ``raw`` as it is, or what the file of that name holds. Raises UserError naming ``field``."""
    if template == RAW or "{{" in template or "{%" in template:
        return template
    try:
        path = Path(template).expanduser()
        if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:  # a pipe or a device would never end
            raise OSError
        return path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError):
        raise UserError(
            f"{field} {template!r} is neither Jinja ({{{{ … }}}} or {{% … %}}) nor a file of it; {RAW} reads chats as "
            "the policy has them"
        ) from None


def in_a_line(error: Exception) -> str:
    """What an error says, on one line of at most MAX_REASON characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…"
