"""Prompt files as people bring them: read as they are meant, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from inputs.preference_files import PAIRS
from inputs.prompt_files import CHAT_TEXTS, COLUMNS, FILES, LAYOUTS, ODDITIES

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.sources import load_prompt_set

BROUGHT = {
    f"{kind}-{brought.name}": brought
    for kind, files in {
        "chat_texts": CHAT_TEXTS,
        "layouts": LAYOUTS,
        "pairs": PAIRS,
        "files": FILES,
        "columns": COLUMNS,
        "oddities": ODDITIES,
    }.items()
    for brought in files
}


@pytest.mark.parametrize("name", BROUGHT)
def test_a_file_is_read_as_it_is_meant_or_refused(tmp_path: Path, name: str) -> None:
    brought = BROUGHT[name]
    path = tmp_path / brought.name
    path.write_bytes(brought.data)
    config = PromptsConfig(source=str(path), **brought.knobs)
    if brought.refused:
        with pytest.raises(UserError) as caught:
            load_prompt_set(config)
        [problem] = caught.value.problems
        assert brought.refused in problem
        return

    found = load_prompt_set(config)

    assert list(found.entries) == list(brought.entries)
    assert found.digest == digest_json(list(brought.entries))
    assert len(found.notes) == len(brought.notes), found.notes
    for note, part in zip(found.notes, brought.notes, strict=True):
        assert part in note
