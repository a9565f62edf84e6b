"""Tokenizers: what is saved beside a checkpoint is the tokenizer, not the way it was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_core.models.tokenizers import load_tokenizer


def test_how_it_was_found_is_not_saved_with_it(tiny: Any, tmp_path: Path) -> None:
    """The tests are offline (HF_HUB_OFFLINE), which transformers would write down, so that bits depend on it."""
    load_tokenizer(str(tiny.policy), field="policy.model").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved == json.loads((tiny.policy / "tokenizer_config.json").read_text())
