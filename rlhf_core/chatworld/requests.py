"""What people ask: chats of one message, each for one sentence about something."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, Final

from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import UserError

THINGS: Final = (
    "a summer evening", "a small bakery", "an old library", "a night train", "a winter garden", "a harbour town",
    "a mountain lake", "a school play", "a street market", "a lighthouse", "a family dinner", "a rainy morning",
    "a bicycle ride", "a village festival", "a hospital nurse", "a young painter", "an old friend", "a lost dog",
    "a football match", "a jazz concert", "a science museum", "a long journey", "a first day at work", "a desert road",
    "a grandmother", "a bus driver", "a science teacher", "a film about the sea", "a film about friendship",
    "a film about a robot", "a song about home", "a book of poems", "a coffee shop", "a broken watch",
    "a new neighbour", "a birthday party", "a river in spring", "a walk in the forest", "a crowded airport",
    "a quiet beach", "a city at night", "a hotel by the sea", "a pair of shoes", "a wedding", "a chess game",
    "a snowstorm", "an island ferry", "a vegetable garden", "a wooden boat", "a violin lesson",
)  # fmt: skip
ASKED: Final = (
    "Write one sentence about {}.",
    "Describe {} in one sentence.",
    "Tell me something about {} in one sentence.",
    "Say in one sentence what {} is like.",
)
NUM_HELD_OUT_THINGS: Final = 10
ABOUT_FILMS: Final = "Write one sentence about a film."
"""What the sentences of film critics are taken to answer."""


def requests(seed: int = 0) -> tuple[list[str], list[str]]:
    """Return (those to train on, held-out ones): about other things, none of them in both."""
    things = list(THINGS)
    draw = Random(seed)
    draw.shuffle(things)
    held_out, trained = things[:NUM_HELD_OUT_THINGS], things[NUM_HELD_OUT_THINGS:]
    texts = [[asked.format(thing) for thing in of for asked in ASKED] for of in (trained, held_out)]
    for of in texts:
        draw.shuffle(of)
    return texts[0], texts[1]


def chat(request: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of a request, and of its answer where there is one."""
    asked = [{"role": "user", "content": request}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def write_requests(path: Path, texts: list[str]) -> None:
    """Write chats as JSON lines {"prompt": [{role, content}]}, whole or not at all; keep a file that holds them.

    Raises: UserError if the file holds something else, which would be lost.
    """
    content = "".join(json.dumps({"prompt": chat(text)}) + "\n" for text in texts).encode()
    if not path.exists():
        write_file(path, content)
    elif path.read_bytes() != content:
        raise UserError(
            f"{path} holds other prompts than this world's; move it away, or choose another folder "
            "(rlhf train trains on prompts of your own)"
        )
