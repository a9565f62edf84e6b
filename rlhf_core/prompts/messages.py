"""Messages of a chat, in the layouts that datasets have.

    {role, content}                       OpenAI, TRL, most datasets of the hub
    {from, value}                         ShareGPT; its speakers are human, gpt, observation, ...
    content: [{type: text, text}, ...]    content in parts, as vision models have

All become ``{role, content}`` of two texts. What this would change in silence is refused (tool calls, images) or
remarked (further keys, roles of other names).
"""

from __future__ import annotations

from typing import Any, Final, cast

from rlhf_core.contracts.batches import Message
from rlhf_core.prompts.remarks import Remarks

ROLES: Final = ("system", "user", "assistant", "tool")
"""Roles that chat templates know by these names."""
SPEAKERS: Final = {name: name for name in ROLES} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""Other names of the roles, in lower case."""
CALLS: Final = ("tool_calls", "function_call")
"""Keys of messages whose content a template writes, and which this project does not pass to templates."""
WRAPPERS: Final = ("messages", "conversations", "conversation")
"""Only keys of an object that wraps the list of messages."""
MAX_SHOWN: Final = 60


def as_message(place: str, value: object, remarks: Remarks | None = None) -> Message:
    """A message of any layout as {role, content}.

    Args:
        place: of the message, for errors.
        value: what the source holds, in plain Python types.
        remarks: counts what is read in another way than it stands.
    Returns: the message; its content may be empty.
    Raises:
        ValueError: it is no message, or it holds tool calls, an image or another part that is no text.
    """
    remarks = remarks or Remarks()
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    calls = next((key for key in CALLS if fields.get(key)), None)
    if calls:
        raise ValueError(
            f"{place} has {calls}, which is not passed to chat templates; write the call into its content as the "
            "model's template does, or leave the row out"
        )
    speaker, said = _either(fields, "role", "from"), _either(fields, "content", "value")
    role, content = fields.get(speaker), fields.get(said)
    if isinstance(content, list):
        content = _joined(place, cast("list[object]", content))
        remarks.see("hold content in parts, whose texts are joined without a separator", shown(fields[said]))
    if not (isinstance(role, str) and role and isinstance(content, str)):
        raise ValueError(f"{place} is {shown(value)}; a message is {{role, content}}, both of them texts")
    for key in fields:
        if key not in (speaker, said) and fields[key] not in (None, "", [], {}):
            remarks.see(f"have messages with the key {shown(key)}, which is not used: role and content alone are")
            remarks.unused.setdefault(key, [])
    return {"role": _role(place, role, speaker, remarks), "content": unicode_text(place, content)}


def unwrapped(value: object) -> object:
    """The list of messages inside an object that holds nothing else; any other value as it is.

    A table of messages by columns, ``{role: [...], content: [...]}``, becomes their list: some readers of Parquet
    give it for a sequence of structs.
    """
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    if len(fields) == 1 and isinstance(inner := next(iter(fields.values())), list) and next(iter(fields)) in WRAPPERS:
        return cast("list[object]", inner)
    lens = {len(cast("list[object]", column)) if isinstance(column, list) else -1 for column in fields.values()}
    if len(lens) == 1 and lens != {-1} and {"role", "from"} & fields.keys() and {"content", "value"} & fields.keys():
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
    return cast("object", value)


def is_chat(value: object) -> bool:
    """Whether a value of JSON has the layout of messages: a list of them, one alone, or a wrapped list."""
    found = unwrapped(value)
    messages = cast("list[object]", found) if isinstance(found, list) else [found]
    return bool(messages) and all(
        isinstance(message, dict)
        and isinstance(message.get("role", message.get("from")), str)
        and ("content" in message or "value" in message)
        for message in cast("list[Any]", messages)
    )


def shown(value: object) -> str:
    """The value as a message shows it: its repr, cut to MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def unicode_text(place: str, text: str) -> str:
    r"""The text itself, unless it holds half a surrogate pair, which JSON can write as ``\ud83d``."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is no Unicode text: half a surrogate pair at character {error.start}") from None
    return text


def _either(fields: dict[str, Any], usual: str, other: str) -> str:
    """The key that a message uses; a table may have both, one of them null."""
    return other if fields.get(usual) is None and fields.get(other) is not None else usual


def _role(place: str, role: str, speaker: str, remarks: Remarks) -> str:
    known = SPEAKERS.get(role.strip().lower())
    if role == known:
        return role
    if speaker == "from" and role == "function":  # the result of a function, as LLaMA-Factory and Axolotl have it
        known = "tool"
    if known:
        remarks.see(f"have messages of {role!r}, which are read as of {known!r}")
        return known
    if speaker == "from":
        raise ValueError(f"{place} is from {shown(role)}; known are {', '.join(SPEAKERS)} and function")
    remarks.see(
        f"have messages of the role {shown(role)}, which goes to the chat template as it stands; most templates "
        f"know {', '.join(ROLES)}"
    )
    return unicode_text(place, role)


def _joined(place: str, parts: list[object]) -> str | None:
    """The texts of content in parts. None if it is no list of parts."""
    texts: list[str] = []
    for part in parts:
        fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if not isinstance(kind, str):
            return None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f"{place} holds a part of the type {shown(kind)}, {shown(part)}; only parts {{type: text, text}} are "
                "read, because the policy reads text alone"
            )
        texts.append(text)
    return "".join(texts)
