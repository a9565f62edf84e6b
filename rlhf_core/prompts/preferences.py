"""The prompt of a preference pair: what ``chosen`` and ``rejected`` begin with."""

from __future__ import annotations

import unicodedata

from rlhf_core.contracts.batches import Message
from rlhf_core.prompts.entries import PromptEntry

ASSISTANT_MARKER = "\n\nAssistant:"
"""Opens an assistant turn in the texts of Anthropic's HH."""


def shared_prompt(chosen: PromptEntry, rejected: PromptEntry) -> PromptEntry:
    """The prompt that two answers share.

    Args:
        chosen: the preferred text or chat, prompt included.
        rejected: the other one, of the same kind.
    Returns: the shared beginning, see :func:`shared_text` and :func:`shared_messages`; never empty.
    Raises:
        ValueError: text against chat, equal sides, or nothing shared; the message is a whole clause.
    """
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same, so no prompt can be told from them; drop the pair")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt: PromptEntry = shared_text(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt = shared_messages(chosen, rejected)
    else:
        raise ValueError("one of chosen and rejected is a text, the other a chat; both must be of one kind")
    if not prompt:
        raise ValueError(
            "chosen and rejected share no beginning that could be a prompt; drop the pair, or give the "
            "prompts a column of their own and name it in prompts.column"
        )
    return prompt


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
    while length and chosen[length - 1]["role"] == "assistant":
        length -= 1
    return chosen[:length]


def shared_text(chosen: str, rejected: str) -> str:
    r"""The characters two texts begin with, cut back to where a prompt may end.

    With the marker of HH inside, the prompt ends right after the last whole one: what follows is the start of
    the answers. Else it ends with the last whole word, without white space behind it.

    Args:
        chosen: prompt and preferred answer.
        rejected: prompt and other answer.
    Returns: the shared text; empty if there is none. It is a prefix of both.

    Example: ``"\n\nHuman: Hi\n\nAssistant: Hello!"`` and ``"\n\nHuman: Hi\n\nAssistant: Hey."`` share
    ``"\n\nHuman: Hi\n\nAssistant:"``; ``"2 + 2 is four"`` and ``"2 + 2 is five"`` share ``"2 + 2 is"``.
    """
    length = _shared_len(chosen, rejected)
    prefix = chosen[:length]
    marker = prefix.rfind(ASSISTANT_MARKER)
    if marker >= 0:
        return prefix[: marker + len(ASSISTANT_MARKER)]
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
