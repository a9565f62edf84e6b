"""What of a run lies where, and the same config with other places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_world import Tiny

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import IntegrityError, UserError
from rlhf_core.prompts.sources import PromptSet
from rlhf_core.replay.bundles import FORMAT, BundleRecord
from rlhf_core.replay.relocation import (
    ReadRows,
    bundle_plan,
    model_files,
    model_places,
    prompt_column,
    prompt_lines,
    relocated,
    template_texts,
)

Make = Callable[[Sequence[str]], RunConfig]
RECORD = BundleRecord(
    format=FORMAT, run="mine", iteration=1, vocab_size=300, with_models=True,
    models={"policy.model": "models/policy.model", "reward.components.0.model": "models/reward.components.0.model"},
    templates={}, prompt_rows=(30, 2), num_prompts=40, files={},
)  # fmt: skip
JINJA = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def unpacked(tiny: Tiny, tmp_path: Path) -> Path:
    """Folders as a bundle has them."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/policy.model").symlink_to(tiny.policy)
    (tmp_path / "models/reward.components.0.model").symlink_to(tiny.reward)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One was"}\n{"prompt": "Two felt"}\n')
    return tmp_path


class TestFiles:
    def test_what_libraries_read_and_no_code(self, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors", "model.py", "pytorch_model.bin", "tokenizer.json", ".hidden"):
            (tmp_path / name).touch()
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates/tool.jinja").touch()
        assert sorted(model_files(str(tmp_path), "policy.model")) == [
            "additional_chat_templates/tool.jinja", "config.json", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip

    def test_of_a_hub_id_what_is_in_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cached = tmp_path / "models--mine--policy"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs/main").write_text("abc")
        (cached / "blobs").mkdir()
        (cached / "blobs/123").write_text("{}")
        (cached / "snapshots/abc").mkdir(parents=True)
        (cached / "snapshots/abc/config.json").symlink_to("../../blobs/123")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert [f.read_text() for f in model_files("mine/policy", "policy.model").values()] == ["{}"]
        with pytest.raises(UserError, match=r"reference\.model 'mine/other' is neither a folder here nor in the hub's"):
            model_files("mine/other", "reference.model")


class TestConfig:
    def test_every_place_is_in_the_folder(self, tiny_config: Make, unpacked: Path) -> None:
        here = relocated(tiny_config(["prompts.from_preferences=true"]), RECORD, unpacked)
        assert set(model_places(here).values()) == {str(unpacked / place) for place in RECORD.models.values()}
        assert here.prompts.source == str(unpacked / "prompts.jsonl")
        assert here.device == "auto"
        assert not here.prompts.from_preferences

    def test_what_a_person_has_set_stays(self, tiny_config: Make, unpacked: Path) -> None:
        config = tiny_config(["reference.model=/mine"])
        assert relocated(config, RECORD, unpacked, own=["reference.model"]).reference.model == "/mine"
        with pytest.raises(IntegrityError, match=r"names reference\.model, and the bundle does not hold it"):
            relocated(config, RECORD, unpacked)

    def test_a_template_in_a_file_travels_as_text(self, tiny_config: Make, unpacked: Path) -> None:
        (unpacked / "mine.jinja").write_text(JINJA)
        config = tiny_config([f"reward.components.0.chat_template={unpacked / 'mine.jinja'}"])
        texts = template_texts(config)
        assert texts == {"reward.components.0.chat_template": JINJA}
        (component,) = relocated(config, replace(RECORD, templates=texts), unpacked).reward.components
        assert component.chat_template == JINJA  # pyright: ignore[reportAttributeAccessIssue]
        for evil in ({}, {"reward.components.0.chat_template": "/etc/passwd"}):
            with pytest.raises(IntegrityError, match=r"names reward\.components\.0\.chat_template"):
                relocated(config, replace(RECORD, templates=evil), unpacked)


class TestPrompts:
    def test_rows_keep_their_numbers(self, tiny_config: Make, unpacked: Path) -> None:
        config = relocated(tiny_config(["prompts.batch_size=2"]), RECORD, unpacked)
        prompt_set = bundle_plan(config, RECORD).prompt_set
        assert len(prompt_set.entries) == 40
        assert (prompt_set.entries[30], prompt_set.entries[2]) == ("One was", "Two felt")
        with pytest.raises(IntegrityError, match="prompt 3 of the source is not in the bundle"):
            prompt_set.entries[3]

    def test_lines_of_some_rows(self, tiny_config: Make) -> None:
        config = tiny_config(["prompts.columns=[prompt, answer]"])
        chat = [{"role": "user", "content": "ä"}]
        columns = [{"prompt": "raw", "answer": n} for n in range(3)]
        prompt_set = PromptSet(["a", "b", chat], "", 0, columns)
        assert prompt_column(config) == "_prompt"
        assert prompt_lines(prompt_set, [2, 0], config).decode().splitlines() == [
            '{"_prompt":[{"content":"ä","role":"user"}],"answer":2,"prompt":"raw"}',
            '{"_prompt":"a","answer":0,"prompt":"raw"}',
        ]

    def test_rows_that_were_read(self) -> None:
        rows = ReadRows("abcdef")
        assert (rows[4], rows[1], rows[4], len(rows)) == ("e", "b", "e", 6)
        assert list(rows.read) == [4, 1]
