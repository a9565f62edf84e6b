"""The assembled prompt: the text, the messages and the tokens that the policy reads of an entry."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.entries import PromptEntry
from rlhf_core.prompts.pieces import special_tokens
from rlhf_core.prompts.rendering import render_prompt, render_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MANY: Final = 64
MAX_TRIED: Final = 1000
MAX_THREADS: Final = 4


@dataclass(frozen=True)
class AssembledPrompt:
    """One prompt as the policy reads it, and as reward functions and reward models are shown it."""

    text: str
    messages: Sequence[Message]
    """Empty for plain text."""
    tokens: list[int]
    num_truncated: int = 0
    """Tokens that were cut off."""


class PromptAssembler:
    """Renders, tokenizes and truncates the prompts of a run.

    A chat's special tokens are those that its template writes. A plain text gets those that the tokenizer adds to a
    text, with two exceptions: a BOS that the text begins with already is not added again, and an EOS is never added
    at the end, where it would end the text that the policy continues.

    Args:
        tokenizer: the policy's.
        config: ``as_chat``, ``system`` and the template's options.
        eos_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptsConfig, eos_ids: Collection[int]) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.added_before, self.added_behind = added_tokens(tokenizer)
        shown = tokenizer.decode(self.added_before, skip_special_tokens=False) if self.added_before else ""
        self.added_text = cast("str", shown)
        self.drops_eos = bool(self.added_behind) and self.added_behind[-1] in eos_ids

    def entry(self, entry: PromptEntry) -> PromptEntry:
        """The entry with ``as_chat`` and ``system`` applied."""
        return read_as(entry, self.config)

    def text(self, entry: PromptEntry) -> str:
        """The whole text of a prompt. Raises UserError if the chat template refuses it."""
        return self._rendered(self.entry(entry))

    def texts(self, entries: Sequence[PromptEntry]) -> list[str | UserError]:
        """The texts of many prompts, or what is wrong with each. Raises UserError if no chat can be rendered."""
        read = [self.entry(entry) for entry in entries]
        return render_prompts(
            read, self.tokenizer, options=self.config.template_options, date=self.config.template_date
        )

    def tokens(self, texts: Sequence[str], *, are_chats: bool) -> list[list[int]]:
        """The tokens of whole prompts, many at a time.

        Args:
            texts: as :meth:`text` returns them.
            are_chats: whether a chat template has written them.
        """
        if not texts:
            return []
        rows = _encoded(self.tokenizer, list(texts), add_special_tokens=not are_chats)
        return rows if are_chats else [self._framed(row) for row in rows]

    def is_chat(self, entry: PromptEntry) -> bool:
        """Whether a chat template writes this prompt."""
        return self.config.as_chat or not isinstance(entry, str)

    def assemble(self, entry: PromptEntry) -> AssembledPrompt:
        """A whole prompt. Raises UserError if the chat template refuses it."""
        return self._assembled(self.entry(entry))

    def truncated(self, whole: AssembledPrompt, longest: int) -> AssembledPrompt | None:
        """Cut the beginning of a prompt, so that ``longest`` tokens remain.

        A text keeps its BOS. A chat loses its oldest turns first; if the last one alone is too long, the beginning of
        its user's message. The system message goes only where nothing of the user's message would fit beside it.

        Args:
            whole: as :meth:`assemble` returns it.
            longest: tokens.
        Returns: the prompt, whose text and messages are cut too; None where the template's marks alone do not fit.
        """
        if len(whole.tokens) <= longest:
            return whole
        cut = self._truncated_chat(whole, longest) if whole.messages else self._truncated_text(whole, longest)
        if cut is None:
            return None
        return AssembledPrompt(cut.text, cut.messages, cut.tokens, len(whole.tokens) - len(cut.tokens))

    def can_be_truncated(self, whole: AssembledPrompt, longest: int) -> bool:
        """Whether :meth:`truncated` finds something that fits: one rendering, however long the prompt is."""
        if not whole.messages:
            return longest > len(self.frame(whole.tokens))
        last = _last_turn(_after_system(whole.messages)[1])
        return self._with_content_from(last, _starts(self.tokenizer, last[0]["content"])[-1], longest) is not None

    def frame(self, tokens: Sequence[int]) -> Sequence[int]:
        """The special tokens that stand before a text: those that the tokenizer adds, or a BOS of its own."""
        before = self.added_before
        if before and list(tokens[: len(before)]) == before:
            return before
        return list(tokens[:1]) if tokens and tokens[0] == self.tokenizer.bos_token_id else []

    def _rendered(self, entry: PromptEntry) -> str:
        return render_prompt(
            entry, self.tokenizer, options=self.config.template_options, date=self.config.template_date
        )

    def _assembled(self, entry: PromptEntry) -> AssembledPrompt:
        text, is_chat = self._rendered(entry), not isinstance(entry, str)
        return AssembledPrompt(text, [] if isinstance(entry, str) else entry, self.tokens([text], are_chats=is_chat)[0])

    def _framed(self, row: list[int]) -> list[int]:
        before, behind = self.added_before, self.added_behind
        if before and row[len(before) : 2 * len(before)] == before:
            row = row[len(before) :]
        return row[: -len(behind)] if self.drops_eos and row[-len(behind) :] == behind else row

    def _truncated_text(self, whole: AssembledPrompt, longest: int) -> AssembledPrompt | None:
        frame = list(self.frame(whole.tokens))
        if longest <= len(frame):
            return None
        num_cut = len(whole.tokens) - longest
        kept = whole.tokens[len(frame) + num_cut :]
        return AssembledPrompt(self._tail(whole, frame, kept), [], [*frame, *kept])

    def _tail(self, whole: AssembledPrompt, frame: Sequence[int], kept: Sequence[int]) -> str:
        """The text of the last tokens; a BOS that the text itself holds stays in it."""
        own = cast("str", self.tokenizer.decode(list(frame), skip_special_tokens=False)) if frame else ""
        shown = own if own and whole.text.startswith(own) else ""
        if self.tokenizer.is_fast:
            read = self.tokenizer(whole.text, add_special_tokens=False, return_offsets_mapping=True)
            if cast("list[int]", read["input_ids"])[-len(kept) :] == list(kept):
                return shown + whole.text[cast("list[tuple[int, int]]", read["offset_mapping"])[-len(kept)][0] :]
        return shown + cast("str", self.tokenizer.decode(list(kept), skip_special_tokens=False))

    def _truncated_chat(self, whole: AssembledPrompt, longest: int) -> AssembledPrompt | None:
        system, turns = _after_system(whole.messages)
        for start in [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]:
            if found := self._fitting([*system, *turns[start:]], longest):
                return found
        last = _last_turn(turns)
        for head in (system, []) if system else ([],):
            if found := self._with_content_from(last, None, longest, head):
                return found
        return None

    def _with_content_from(
        self, turn: Sequence[Message], start: int | None, longest: int, system: Sequence[Message] = ()
    ) -> AssembledPrompt | None:
        """The turn with its first message cut at a character, or (None) at the first one from which on it fits."""
        first, rest = turn[0], turn[1:]

        def at(position: int) -> AssembledPrompt | None:
            cut: Message = {"role": first["role"], "content": first["content"][position:]}
            return self._fitting([*system, cut, *rest], longest)

        if start is not None:
            return at(start)
        starts = [0, *_starts(self.tokenizer, first["content"])]
        index = bisect_left(starts, True, key=lambda position: at(position) is not None)
        return at(starts[index]) if index < len(starts) else None

    def _fitting(self, messages: list[Message], longest: int) -> AssembledPrompt | None:
        try:
            found = self._assembled(messages)
        except UserError:  # a template may refuse what is left of a chat
            return None
        return found if len(found.tokens) <= longest else None


def read_as(entry: PromptEntry, config: PromptsConfig) -> PromptEntry:
    """The entry with ``as_chat`` and ``system`` applied: what stands for it in conversations."""
    if isinstance(entry, str):
        if not config.as_chat:
            return entry
        entry = [{"role": "user", "content": entry}]
    if config.system is None or any(message["role"] == "system" for message in entry):
        return entry
    return [{"role": "system", "content": config.system}, *entry]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and behind a text."""
    special = set(special_tokens(tokenizer).values())
    for text in ("a", "0", ".", *islice(tokenizer.get_vocab(), MAX_TRIED)):  # one that the tokenizer does not drop
        if text in special:
            continue
        plain = cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = cast("list[int]", tokenizer(text)["input_ids"])
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of many texts. A long list goes to the Rust tokenizer at once, on several threads, without offsets."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    is_plain = isinstance(tokenizer, PreTrainedTokenizerFast) and (
        kind.__call__ is PreTrainedTokenizerFast.__call__ and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    if len(texts) < MANY or not is_plain:
        return cast("list[list[int]]", tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"])
    tokenizer(texts[0])  # settles what transformers asks of the Rust tokenizer: no padding, no truncation
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    size = -(-len(texts) // num_threads)

    def encode(start: int) -> list[list[int]]:
        some = texts[start : start + size]
        found = cast("Any", tokenizer).backend_tokenizer.encode_batch_fast(some, add_special_tokens=add_special_tokens)
        return [row.ids for row in found]

    with ThreadPoolExecutor(num_threads) as threads:
        return [row for rows in threads.map(encode, range(0, len(texts), size)) for row in rows]


def _after_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system messages that a chat begins with, and its turns; a chat of nothing else is one turn."""
    count = 0
    while count < len(messages) - 1 and messages[count]["role"] == "system":
        count += 1
    return list(messages[:count]), list(messages[count:])


def _last_turn(turns: Sequence[Message]) -> Sequence[Message]:
    """From the last user's message on; without one, the last message."""
    users = [index for index, message in enumerate(turns) if message["role"] == "user"]
    return turns[users[-1] if users else len(turns) - 1 :]


def _starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The characters at which tokens of a text begin, behind its first; at least one."""
    found: list[int] = []
    if tokenizer.is_fast and text:
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found = sorted({start for start, _ in cast("list[tuple[int, int]]", read["offset_mapping"]) if start})
    return found or list(range(1, len(text))) or [0]
