"""Every prompt rendered and tokenized once: what would surprise its owner in what the policy reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import canonical_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.tokenizers import PolicyTokenizer
from rlhf_core.prompts.assembly import AssembledPrompt, PromptAssembler
from rlhf_core.prompts.entries import PromptEntry, shown
from rlhf_core.prompts.pieces import special_tokens
from rlhf_core.prompts.rendering import render_chat
from rlhf_core.prompts.sources import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK: Final = 1000
"""Prompts that are tokenized at a time."""
MAX_ROWS: Final = 10
"""Rows that a message names."""
SHOWN_END: Final = 40

Progress = Callable[[int, int], None]
"""Called with the prompts read so far and the number of all."""


def end_of(text: str) -> str:
    """The value as a message shows it, where its end matters."""
    return repr(text) if len(text) <= SHOWN_END else f"'…{repr(text[-SHOWN_END:])[1:]}"


@dataclass
class Tally:
    """The prompts with one property: their rows, and the first of them."""

    rows: list[int] = field(default_factory=list[int])
    example: str = ""
    show: Callable[[str], str] = shown

    def add(self, row: int, example: str) -> None:
        """Count a prompt."""
        if not self.rows:
            self.example = self.show(example)
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def named(self) -> str:
        """The rows in words: ``prompt 30 (from 0)``."""
        if len(self.rows) == 1:
            return f"prompt {self.rows[0]} (from 0)"
        some = ", ".join(str(row) for row in self.rows[:MAX_ROWS])
        return f"{len(self.rows)} prompts ({some}{', …' if self.rows[MAX_ROWS:] else ''}; from 0)"

    @property
    def first(self) -> str:
        """The first of them: ``prompt 30: 'The film …'``."""
        return f"prompt {self.rows[0]}: {self.example}"


@dataclass
class Findings:
    """What reading all prompts has shown."""

    longest: int
    """Tokens that fit."""
    num_texts: int = 0
    """Prompts that no chat template writes."""
    refused: dict[str, Tally] = field(default_factory=dict[str, Tally])
    """Reason of the chat template -> the chats."""
    empty: Tally = field(default_factory=Tally)
    twice_bos: Tally = field(default_factory=Tally)
    own_bos: Tally = field(default_factory=Tally)
    without_bos: Tally = field(default_factory=Tally)
    ends_with_eos: Tally = field(default_factory=lambda: Tally(show=end_of))
    marks_in_text: Tally = field(default_factory=Tally)
    """Texts with special tokens, behind a BOS at the beginning."""
    marks_in_chat: Tally = field(default_factory=Tally)
    plain: Tally = field(default_factory=Tally)
    """Plain texts without any special token."""
    unknown: Tally = field(default_factory=Tally)
    lost: Tally = field(default_factory=lambda: Tally(show=str))
    """Prompts with characters that have no token."""
    over_long: Tally = field(default_factory=lambda: Tally(show=str))
    not_truncatable: Tally = field(default_factory=Tally)
    forms: dict[tuple[str, ...], int] = field(default_factory=dict[tuple[str, ...], int])
    """Roles of a chat -> the first chat that has them."""


def read_prompts(
    prompt_set: PromptSet,
    tokenizer: PolicyTokenizer,
    config: PromptsConfig,
    longest: int,
    progress: Progress | None = None,
) -> Findings:
    """Render and tokenize every prompt; kept for the process, since the command line and its flow both ask.

    Args:
        prompt_set: of the run.
        tokenizer: the policy's.
        config: of the prompts.
        longest: tokens that a prompt may have.
        progress: called after every chunk.
    """
    key = _key(prompt_set, tokenizer, config, longest)
    if key is None:
        return _Reader(prompt_set, tokenizer, config, longest).read(progress)
    if key not in _read:
        found = _Reader(prompt_set, tokenizer, config, longest).read(progress)
        while len(_read) >= 4:
            del _read[next(iter(_read))]
        _read[key] = found
    return _read[key]


_DRAWN: Final = {"batch_size", "samples_per_prompt", "shuffle", "columns"}
"""Settings that change no prompt."""
_read: dict[str, Findings] = {}
"""Digest of prompts, tokenizer and settings -> what was found."""


def _key(prompt_set: PromptSet, tokenizer: PolicyTokenizer, config: PromptsConfig, longest: int) -> str | None:
    own = tokenizer.tokenizer
    if not own.is_fast:  # what decides its tokens is not known
        return None
    digest = hashlib.sha256(cast("Any", own).backend_tokenizer.to_str().encode())
    about = [prompt_set.digest, longest, sorted(tokenizer.eos_ids), own.chat_template, str(own.special_tokens_map)]
    digest.update(canonical_json([*about, config.model_dump(exclude=_DRAWN)]))
    return digest.hexdigest()


class _Reader:
    def __init__(self, prompt_set: PromptSet, tokenizer: PolicyTokenizer, config: PromptsConfig, longest: int) -> None:
        self.entries, self.own, self.over_long = prompt_set.entries, tokenizer.tokenizer, config.over_long
        self.assembler = PromptAssembler(tokenizer.tokenizer, config, tokenizer.eos_ids)
        self.found = Findings(longest)
        self.marks = _special_tokens(self.own)
        self.eos_ids = tokenizer.eos_ids
        named = cast("list[str | None]", self.own.convert_ids_to_tokens(sorted(tokenizer.eos_ids)))
        self.eos_texts = tuple(name for name in named if name)
        self.bos, self.unk = self.own.bos_token_id, self.own.unk_token_id
        if self.unk in (*tokenizer.eos_ids, tokenizer.pad_id, self.bos):
            self.unk = None
        self.adds_bos = self.bos is not None and self.bos in self.assembler.added_before
        self.characters: set[str] = set()

    def read(self, progress: Progress | None) -> Findings:
        total = len(self.entries)
        for start in range(0, total, CHUNK):
            rows = range(start, min(start + CHUNK, total))
            self._read_chunk([(row, self.entries[row]) for row in rows])
            if progress is not None:
                progress(rows.stop, total)
        if lost := self._lost_characters():
            self._count_lost(lost)
        return self.found

    def _read_chunk(self, rows: Sequence[tuple[int, PromptEntry]]) -> None:
        for are_chats in (False, True):
            rendered: list[tuple[int, PromptEntry, str]] = []
            some = [(row, entry) for row, entry in rows if self.assembler.is_chat(entry) is are_chats]
            for (row, entry), text in zip(some, self.assembler.texts([entry for _, entry in some]), strict=True):
                if isinstance(text, UserError):
                    self.found.refused.setdefault(str(text), Tally()).add(row, "")
                else:
                    rendered.append((row, self.assembler.entry(entry), text))
            tokens = self.assembler.tokens([text for *_, text in rendered], are_chats=are_chats)
            for (row, entry, text), ids in zip(rendered, tokens, strict=True):
                self._look_at(row, entry, text, ids)

    def _look_at(self, row: int, entry: PromptEntry, text: str, ids: list[int]) -> None:
        found = self.found
        self.characters.update(text)
        if len(ids) <= len(self.assembler.frame(ids)):
            found.empty.add(row, text)
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            found.twice_bos.add(row, text)
        if self.unk is not None and self.unk in ids:
            found.unknown.add(row, text)
        if text.rstrip().endswith(self.eos_texts) or (ids and ids[-1] in self.eos_ids):
            found.ends_with_eos.add(row, text)
        if len(ids) > found.longest:
            found.over_long.add(row, f"of {len(ids)} tokens")
            whole = AssembledPrompt(text, [] if isinstance(entry, str) else entry, ids)
            if self.over_long == "truncate_left" and not self.assembler.can_be_truncated(whole, found.longest):
                found.not_truncatable.add(row, text)
        if isinstance(entry, str):
            self._look_at_text(row, text)
        else:
            found.forms.setdefault(tuple(message["role"] for message in entry), row)
            if self.adds_bos and ids[:1] != [self.bos]:
                found.without_bos.add(row, text)
            for message in entry:
                if mark := self.marks.search(message["content"]):
                    found.marks_in_chat.add(row, mark.group())
                    break

    def _look_at_text(self, row: int, text: str) -> None:
        self.found.num_texts += 1
        has_own = bool(self.assembler.added_text) and text.startswith(self.assembler.added_text)
        if has_own:
            self.found.own_bos.add(row, text)
        if mark := self.marks.search(text, len(self.assembler.added_text) if has_own else 0):
            self.found.marks_in_text.add(row, mark.group())
        elif not has_own:
            self.found.plain.add(row, text)

    def _lost_characters(self) -> frozenset[str]:
        """Characters of the prompts that the tokenizer turns into nothing, not even into an unknown token."""
        characters = sorted(c for c in self.characters if not c.isspace())
        if not characters:
            return frozenset()
        rows = cast("list[list[int]]", self.own(characters, add_special_tokens=False)["input_ids"])
        return frozenset(c for c, row in zip(characters, rows, strict=True) if not row)

    def _count_lost(self, lost: frozenset[str]) -> None:
        refused = {row for tally in self.found.refused.values() for row in tally.rows}
        for row, entry in enumerate(self.entries):
            content = entry if isinstance(entry, str) else entry[-1]["content"]
            if row in refused or not (gone := lost.intersection(content)):
                continue
            self.found.lost.add(row, " ".join(sorted(gone)[:MAX_ROWS]))
            if self.assembler.is_chat(entry) and all(c in lost or c.isspace() for c in content):
                self.found.empty.add(row, content)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the tokens that a tokenizer reads as special ones wherever their text stands."""
    texts = set(special_tokens(tokenizer).values())
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True) if t.strip()) or r"(?!)")


def render_both(assembler: PromptAssembler, entry: PromptEntry, answer: str) -> tuple[str, str, str | None]:
    """A chat as the policy reads it, without the opening of an answer, and with an answer; None: refused."""
    messages = assembler.entry(entry)
    assert not isinstance(messages, str)
    config = assembler.config

    def render(more: Iterable[Message], *, opened: bool) -> str:
        return render_chat(
            assembler.tokenizer,
            [*messages, *more],
            add_generation_prompt=opened,
            options=config.template_options,
            date=config.template_date,
        )

    try:
        answered = render([{"role": "assistant", "content": answer}], opened=False)
    except Exception:
        answered = None
    return assembler.text(entry), render([], opened=False), answered
