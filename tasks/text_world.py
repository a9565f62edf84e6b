"""Task that builds the embedded world of the quickstart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_core.textworld import TextWorld, build_text_world


def prepare_text_world(folder: Path, on_progress: Callable[[str, int, int], None]) -> TextWorld:
    """The world's policy, reward model and prompts, built once and used again while its recipe stays."""
    return build_text_world(folder, on_progress=on_progress)
