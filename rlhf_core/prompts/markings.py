"""The marks that chat formats put before an assistant's answer, to find where a prompt ends in a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

_BREAK: Final = r"(?:\r?\n)?"
_LINE: Final = r"(?:\A|\n)[ \t]*"
_ASKS: Final = r"(?<!#)###[ ]*(?:Instruction|Question|Input|User|Human|Prompt|Query|System)s?\b"


@dataclass(frozen=True)
class Marking:
    r"""One chat format, as regular expressions.

    Example: ``Marking("HH", ("Assistant:",), r"\n\nHuman:", r"\n\nAssistant:")``
    """

    name: str
    needles: tuple[str, ...]
    """Texts of which each opening of an answer holds one: looked for first, because that is fast."""
    other: str
    """Opens a turn of the user, the system or a tool."""
    answer: str
    """Opens a turn of the assistant, with the line breaks that belong to the opening."""
    special: bool = False
    """Made of special tokens, which texts hardly quote."""
    asked: bool = False
    """Counts only behind a turn of somebody else: a question may hold "A: red" or "Output: 3" itself."""

    @cached_property
    def others(self) -> re.Pattern[str]:
        """``other``, compiled."""
        return re.compile(self.other)

    @cached_property
    def answers(self) -> re.Pattern[str]:
        """``answer``, compiled."""
        return re.compile(self.answer)

    @cached_property
    def _start(self) -> re.Pattern[str]:
        return re.compile(rf"(?:{_BOS})*\s*(?:{self.other})|\s*(?:{self.other})")

    def end(self, text: str) -> int | None:
        """Where the last answer of a text begins.

        An opening counts only if somebody else has spoken since the one before: an answer may quote it.

        Args:
            text: the beginning that two conversations share.
        Returns: the index behind the opening; None if there is none.
        """
        end: int | None = None
        for found in self.answers.finditer(text):
            first = end is None and not self.asked
            if first or self.others.search(text, max((end or 0) - 1, 0), found.start() + 1):
                end = found.end()
        return end

    def opens(self, text: str) -> bool:
        """Whether a text begins with a turn of this format."""
        return self._start.match(text) is not None


_BOS: Final = r"<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|\[gMASK\]|<sop>|<\uff5cbegin\u2581of\u2581sentence\uff5c>"
MARKINGS: Final = (
    Marking(
        "ChatML",
        ("<|im_start|>assistant",),
        r"<\|im_start\|>(?!assistant)\w",
        rf"<\|im_start\|>assistant(?:<\|im_sep\|>|{_BREAK})",
        special=True,
    ),
    Marking(
        "Llama 3",
        ("<|start_header_id|>assistant",),
        r"<\|start_header_id\|>(?!assistant)\w",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>(?:\n\n)?",
        special=True,
    ),
    Marking(
        "Llama 4",
        ("<|header_start|>assistant",),
        r"<\|header_start\|>(?!assistant)\w",
        r"<\|header_start\|>assistant<\|header_end\|>(?:\n\n)?",
        True,
    ),
    Marking(
        "Gemma",
        ("<start_of_turn>model",),
        r"<start_of_turn>(?!model)\w",
        rf"<start_of_turn>model{_BREAK}",
        special=True,
    ),
    Marking(
        "Granite",
        ("<|start_of_role|>assistant",),
        r"<\|start_of_role\|>(?!assistant)\w",
        r"<\|start_of_role\|>assistant<\|end_of_role\|>",
        special=True,
    ),
    Marking(
        "Cohere",
        ("<|CHATBOT_TOKEN|>",),
        r"<\|START_OF_TURN_TOKEN\|><\|(?:USER|SYSTEM)_TOKEN\|>",
        r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>",
        special=True,
    ),
    Marking("Harmony", ("<|start|>assistant",), r"<\|start\|>(?!assistant)\w", r"<\|start\|>assistant", special=True),
    Marking("DeepSeek", ("\uff5cAssistant\uff5c",), r"<\uff5cUser\uff5c>", r"<\uff5cAssistant\uff5c>", special=True),
    Marking(
        "<|assistant|>",
        ("<|assistant|>",),
        r"<\|(?:user|system|prompter|observation|tool)\|>",
        rf"<\|assistant\|>{_BREAK}",
        special=True,
    ),
    Marking("[INST]", ("[/INST]",), r"\[INST\]", r"\[/INST\]", special=True),
    Marking("HH", ("\n\nAssistant:",), r"\n\nHuman:", r"\n\nAssistant:"),
    Marking("Human: / Assistant:", ("Assistant:",), rf"{_LINE}(?:Human|User):", r"\n[ \t]*Assistant:"),
    Marking("Human: / AI:", ("AI:",), rf"{_LINE}(?:Human|User):", r"\n[ \t]*AI:", asked=True),
    Marking("USER: / ASSISTANT:", ("ASSISTANT:",), r"(?<![A-Za-z])USER:", rf"(?<![A-Za-z])ASSISTANT:{_BREAK}"),
    Marking("GPT4 Correct", ("GPT4 Correct Assistant:",), r"GPT4 Correct User:", r"GPT4 Correct Assistant:"),
    Marking("### Response:", ("###",), _ASKS, rf"(?<!#)###[ ]*(?:Response|Answer|Assistant):{_BREAK}"),
    Marking(
        "###",
        ("###",),
        _ASKS,
        rf"(?<!#)###[ ]*(?:Response|Answer|Assistant|Output|Completion|Solution)(?:[ ]*:|[ \t]*(?=\r?\n)){_BREAK}",
        asked=True,
    ),
    Marking(
        "Instruct: / Output:",
        ("Output:", "Response:"),
        rf"{_LINE}Instruct(?:ion)?:",
        rf"\n[ \t]*(?:Output|Response):{_BREAK}",
        asked=True,
    ),
    Marking("Question: / Answer:", ("Answer:",), rf"{_LINE}Question:", rf"\n[ \t]*Answer:{_BREAK}", asked=True),
    Marking("Q: / A:", ("\nA:", " A:", "\tA:"), rf"{_LINE}Q:", rf"\n[ \t]*A:{_BREAK}", asked=True),
    Marking("POST: / TL;DR:", ("TL;DR:",), rf"{_LINE}POST:", r"\n[ \t]*TL;DR:", asked=True),
)
"""Of two that begin alike the stricter one comes first."""
_NEEDLES: Final = [(needle, index) for index, marking in enumerate(MARKINGS) for needle in marking.needles]


def answer_start(shared: str) -> tuple[str, int] | None:
    """Where the answers begin that continue a text.

    The format is the one whose turn the text begins with; else one of special tokens; else one whose other
    turns are in the text; else the one whose opening comes first.

    Args:
        shared: the beginning that two conversations share.
    Returns: (name of the format, index behind the opening of the answer); None if no format is found.
    """
    likely = dict.fromkeys(index for needle, index in _NEEDLES if needle in shared)
    ends = [(MARKINGS[index], end) for index in likely if (end := MARKINGS[index].end(shared)) is not None]
    if len(ends) <= 1:
        return (ends[0][0].name, ends[0][1]) if ends else None

    def rank(found: tuple[Marking, int]) -> tuple[bool, bool, bool, int]:
        marking, _ = found
        first = marking.answers.search(shared)
        return (
            not marking.opens(shared),
            not marking.special,
            marking.others.search(shared) is None,
            first.start() if first else 0,
        )

    marking, end = min(ends, key=rank)
    return marking.name, end


def answered(text: str) -> bool:
    """Whether a text of a chat format goes on after the mark of its last answer, without a further turn."""
    found = answer_start(text)
    if found is None or not text[found[1] :].strip():
        return False
    marking = next(marking for marking in MARKINGS if marking.name == found[0])
    return marking.others.search(text) is not None and not marking.others.search(text, found[1])


def parts_in_question(chosen: str, rejected: str, shared: str) -> bool:
    """Whether two marked conversations part before their first answer."""
    for marking in MARKINGS:
        if marking.opens(shared):
            return all(marking.answers.search(text) for text in (chosen, rejected))
    return False
