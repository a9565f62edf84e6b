"""A folder that somebody else made is data, or it is refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.errors import UserError
from rlhf_core.models.adapters import base_at_hand, read_adapter
from rlhf_core.models.templates import check_template
from rlhf_core.models.untrusted import check_is_data, check_size


@pytest.fixture
def folder(tmp_path: Path, tiny: Any) -> Path:
    return Path(shutil.copytree(tiny.policy, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_is_data(str(folder), "policy.model")
    (problem,) = caught.value.problems
    assert problem.startswith(f"policy.model '{folder}' ")
    return problem


def test_a_model_as_it_was_saved_is_data(folder: Path) -> None:
    check_is_data(str(folder), "policy.model")
    check_size("AutoModelForCausalLM", str(folder), "policy.model")
    check_is_data("owner/name", "policy.model")


def test_a_snapshot_of_the_hubs_cache_is_data(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    check_is_data(str(snapshot), "policy.model")


def test_links_out_of_the_folder_and_pipes_are_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").symlink_to("/etc/passwd")
    assert "a link out of the folder (to /etc/passwd)" in refused(folder)
    (folder / "chat_template.jinja").unlink()
    os.mkfifo(folder / "vocab.json")
    assert "no file but a pipe" in refused(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"attn_implementation": "owner/kernel"}, "'owner/kernel', which could be code of a hub"),
        ({"_attn_implementation": "sdpa_evil"}, "could be code of a hub"),
        ({"_experts_implementation": "owner/kernel"}, "could be code of a hub"),
        ({"text_config": {"attn_implementation": {"": "owner/kernel"}}}, "could be code of a hub"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"n_layer": 10**6}, "says n_layer 1000000 in its config.json; at most 1024"),
        ({"vocab_size": 10**12}, "says vocab_size 1000000000000"),
    ],
)
def test_a_config_that_asks_for_more_than_a_model_is_refused(folder: Path, values: dict[str, Any], said: str) -> None:
    change(folder / "config.json", **values)
    assert said in refused(folder)


def test_known_ways_of_attention_are_taken(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="eager")
    check_is_data(str(folder), "policy.model")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "https://host/x.safetensors", "x.bin"])
def test_a_shard_is_a_file_of_the_folder(folder: Path, shard: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "a shard is a *.safetensors file of that folder" in refused(folder)


def test_an_adapter_beside_a_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "move the adapter into a folder of its own" in refused(folder)


def test_a_model_without_its_numbers_is_refused_before_the_memory_is_taken(folder: Path) -> None:
    change(folder / "config.json", vocab_size=2**30)
    with pytest.raises(UserError, match="describes a model of 343"):
        check_size("AutoModelForCausalLM", str(folder), "policy.model")


def adapter(tmp_path: Path, **values: Any) -> str:
    plain = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "base_model_name_or_path": "owner/name"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(plain | values))
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("values", [{"target_modules": "((a)+)+#"}, {"rank_pattern": {"(.*)*x": 2}}, {"r": 10**9}])
def test_a_pattern_without_end_and_a_huge_rank_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"could take for ever|at most 65536"):
        read_adapter(adapter(tmp_path, **values), "policy.adapter")


def test_a_plain_pattern_is_taken(tmp_path: Path) -> None:
    read_adapter(adapter(tmp_path, target_modules=r".*\.h\.\d+\.attn\.(c_attn|c_proj)"), "policy.adapter")


def test_a_base_that_only_the_adapter_names_is_never_fetched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names the base 'owner/name' in its adapter_config.json, which is neither"):
        base_at_hand(adapter(tmp_path), "policy.model")


def test_a_template_has_an_end() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    check_template("{% for m in messages %}{{ m.content }}{% endfor %}", chat, "policy.model 'a'")
    check_template({"default": "{{ raise_exception('no') }}"}, chat, "policy.model 'a'")
    check_template(None, chat, "policy.model 'a'")
    with pytest.raises(UserError, match="does not render a conversation of 1 messages within 5 seconds"):
        check_template("{{ ('a' * 99999999) * 99999 }}", chat, "policy.model 'a'")
