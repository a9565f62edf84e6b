"""The prompt of a preference pair: what ``chosen`` and ``rejected`` begin with."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final, Literal, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.prompts.entries import PromptEntry, without_last_answer
from rlhf_core.prompts.markings import answer_start, parts_in_question
from rlhf_core.prompts.messages import shown

MESSAGES: Final = "chat messages"
WORDS: Final = "no marking"
"""Names of the two ways to find a prompt beside the markings."""
APART: Final = "chosen and rejected do not begin with the prompt"
_QUESTION_END: Final = re.compile(r"(?:[?\uff1f:][\"')\]]*\s+|\s*\n\s*)(?=\S)")


@dataclass(frozen=True)
class Parted:
    r"""Where two conversations part.

    Example: ``Parted("Human: Hi\n\nAssistant:", "HH", (" Hello", " Hey"))``
    """

    prompt: PromptEntry
    marking: str
    """The format whose mark was found, MESSAGES or WORDS."""
    answers: tuple[str, str]
    """How the answers begin, as a note shows them; empty for chats."""


def shared_prompt(chosen: PromptEntry, rejected: PromptEntry) -> PromptEntry:
    """The prompt that two answers share.

    Args:
        chosen: the preferred text or chat, prompt included.
        rejected: the other one, of the same kind.
    Returns: the shared beginning, see :func:`part_pair`.
    Raises:
        ValueError: as :func:`part_pair`.
    """
    return part_pair(chosen, rejected).prompt


def part_pair(chosen: PromptEntry, rejected: PromptEntry, prompt: PromptEntry | None = None) -> Parted:
    """Find where two conversations part.

    Args:
        chosen: the preferred text or chat, prompt included.
        rejected: the other one, of the same kind.
        prompt: of the same row, if the source has it; two texts without any marking that begin with it part there.
    Returns: the shared beginning, see :func:`shared_text` and :func:`shared_messages`, never empty; and how it was
        found.
    Raises:
        ValueError: text against chat, equal sides, or nothing shared; the message is a whole clause.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same, so no prompt can be told from them; drop the pair")
    if isinstance(chosen, str) and isinstance(rejected, str):
        parted = _part_texts(chosen, rejected, prompt)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        parted = Parted(shared_messages(chosen, rejected), MESSAGES, ("", ""))
    else:
        raise ValueError("one of chosen and rejected is a text, the other a chat; both must be of one kind")
    if not parted.prompt:
        raise ValueError(
            "chosen and rejected share no beginning that could be a prompt; drop the pair, or give the "
            "prompts a column of their own and name it in prompts.column"
        )
    return parted


def holds_prompt(chosen: PromptEntry, rejected: PromptEntry, prompt: PromptEntry | None) -> Literal["inside", "apart"]:
    """Whether a pair holds its prompt, or answers alone beside a prompt column.

    Args:
        chosen: the preferred text or chat.
        rejected: the other one.
        prompt: of the column beside them; None if that cell is none.
    """
    if isinstance(chosen, list) or isinstance(rejected, list):
        sides = [side for side in (chosen, rejected) if isinstance(side, list)]
        return "inside" if any(m["role"] != "assistant" for side in sides for m in side) else "apart"
    shared = chosen[: _shared_len(chosen, rejected)]
    if isinstance(prompt, str) and prompt.strip() and shared.lstrip().startswith(prompt.strip()):
        return "inside"
    return "inside" if answer_start(shared) or parts_in_question(chosen, rejected, shared) else "apart"


def shared_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages two chats begin with, without assistant messages at the end.

    Earlier assistant turns stay: they are part of the question the last answers differ on.

    Args:
        chosen: messages of {role, content}.
        rejected: likewise.
    Returns: the shared messages; empty if there are none.

    Example: ``[user, assistant, user, good]`` and ``[user, assistant, user, bad]`` share the first three.
    """
    length = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        length += 1
    return cast("list[Message]", without_last_answer(chosen[:length]))


def shared_text(chosen: str, rejected: str) -> str:
    r"""The characters two texts begin with, cut back to where a prompt may end.

    With a marking inside (:mod:`rlhf_core.prompts.markings`), the prompt ends right after the last opening of an
    answer: what follows is the start of the answers. Else it ends with the last whole word, without white space
    behind it.

    Args:
        chosen: prompt and preferred answer.
        rejected: prompt and other answer.
    Returns: the shared text; empty if there is none. It is a prefix of both.

    Example: ``"\n\nHuman: Hi\n\nAssistant: Hello!"`` and ``"\n\nHuman: Hi\n\nAssistant: Hey."`` share
    ``"\n\nHuman: Hi\n\nAssistant:"``; ``"2 + 2 is four"`` and ``"2 + 2 is five"`` share ``"2 + 2 is"``.
    """
    length = _shared_len(chosen, rejected)
    found = answer_start(chosen[:length])
    return chosen[: found[1]] if found else _whole_words(chosen, rejected, length)


def _part_texts(chosen: str, rejected: str, prompt: PromptEntry | None) -> Parted:
    shared = chosen[: _shared_len(chosen, rejected)]
    found = answer_start(shared)
    begins = isinstance(prompt, str) and prompt.strip() and shared.startswith(prompt)
    if isinstance(prompt, str) and begins and not (found and found[1] >= len(prompt)):
        found = "the column beside them", len(prompt)
    elif found is None and parts_in_question(chosen, rejected, shared):
        raise ValueError(
            f"chosen and rejected part before their first answer, after {shown(shared[-40:])}; drop the pair"
        )
    if found is None:
        words = _whole_words(chosen, rejected, len(shared))
        if len(shared) in (len(chosen), len(rejected)):
            words = _before_answer(shared)
        found = WORDS, len(words)
    name, end = found
    return Parted(chosen[:end], name, (chosen[end:][:40], rejected[end:][:40]))


def _before_answer(shared: str) -> str:
    """The part of a whole conversation that is its prompt: up to its last question mark, colon or line break."""
    ends = list(_QUESTION_END.finditer(shared))
    if not ends:
        raise ValueError(
            "one of chosen and rejected is the beginning of the other, and nothing marks where its answer begins; "
            "drop the pair"
        )
    return shared[: ends[-1].end()].rstrip()


def _whole_words(chosen: str, rejected: str, length: int) -> str:
    """The first ``length`` characters, which both begin with, without a part of a word or white space at the end."""
    prefix = chosen[:length]
    follows = chosen[length : length + 1], rejected[length : length + 1]
    if prefix and _in_word(prefix[-1]) and any(map(_in_word, follows)):
        while prefix and not prefix[-1].isspace():
            prefix = prefix[:-1]
    return prefix.rstrip()


def _shared_len(a: str, b: str) -> int:
    """Length of the longest common prefix, by bisection (slices compare far faster than characters)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _in_word(character: str) -> bool:
    """Whether a character is a letter, a digit or a mark upon one ("" is not)."""
    return character.isalnum() or any(unicodedata.category(c).startswith("M") for c in character)
