"""What a config's iteration is made of, read from config.json files alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from llama_folders import PARAMETERS, llama_folder, llama_tree
from tiny_world import Tiny

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.costs.reading import read_workload
from rlhf_core.costs.workload import Workload


@pytest.mark.parametrize("size", ["1B", "7B"])
def test_a_config_json_is_enough(tmp_path: Path, size: str) -> None:
    work, lengths = read_workload(build_config(llama_tree(tmp_path, size), []), 16)
    assert work.policy.parameters == PARAMETERS[size]
    assert work.policy.stored_bytes == 2 * PARAMETERS[size]
    assert (work.rows, work.minibatch_rows, work.micro_batch_rows, work.steps) == (256, 64, 4, 4)
    assert lengths == "prompts of 512 tokens (prompts.max_len), responses of 512 (the limit)"


def test_prompts_at_hand_are_measured(tiny_config: Callable[[Sequence[str]], RunConfig]) -> None:
    work, lengths = read_workload(tiny_config([]), 2)
    assert 3 < work.prompt_len < 20
    assert lengths.startswith(f"prompts of {work.prompt_len} tokens (mean of the first 8)")


def test_lengths_are_never_guessed(tmp_path: Path) -> None:
    tree = llama_tree(tmp_path, "1B")
    del tree["prompts"]["max_len"]
    with pytest.raises(UserError, match=r"has no tokenizer, and prompts.max_len is null; set prompts.max_len"):
        read_workload(build_config(tree, []), 16)


def test_what_is_not_modelled_is_refused(tmp_path: Path) -> None:
    tree = llama_tree(tmp_path, "1B")
    tree["policy"]["model"] = str(_mixture(tmp_path / "moe"))
    with pytest.raises(UserError, match="mixture of experts"):
        read_workload(build_config(tree, []), 16)
    tree["policy"]["model"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"policy.model .* is not a folder here"):
        read_workload(build_config(tree, []), 16)


def _mixture(folder: Path) -> Path:
    llama_folder(folder, "1B", model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8)
    return folder


def test_knobs_reach_it(tmp_path: Path, tiny: Tiny) -> None:
    tree = llama_tree(tmp_path, "1B")

    def changed(*overrides: str) -> Workload:
        return read_workload(build_config(tree, list(overrides)), 16)[0]

    assert changed().critic is not None
    assert changed("policy.critic.kind=shared", "policy.critic.init=null").critic is None
    assert changed("shaping.estimator=reward").critic is None
    lora = changed("policy.lora.rank=16")
    assert lora.reference_shares_trunk
    assert lora.adapter == changed().with_lora().adapter
    assert changed("policy.gradient_checkpointing=true").recomputes
    assert not changed("frozen_models=cpu").frozen_stay
    assert changed("generation.batch_size=32").decoding_rows == 32
    assert changed("execution.num_shards=4", "execution.num_workers=2").workers == 2
    assert changed("prompts.samples_per_prompt=4").prompts == 64


def test_of_a_device_is_its_share_rounded_up(tmp_path: Path) -> None:
    whole, _ = read_workload(build_config(llama_tree(tmp_path, "1B"), ["prompts.samples_per_prompt=4"]), 16)
    one = whole.on(24)
    assert (one.prompts, one.rows, one.decoding_rows) == (3, 12, 12)
    assert (one.minibatch_rows, one.micro_batch_rows, one.workers, one.devices) == (3, 3, 1, 24)
    assert whole.on(1) == whole


def test_it_goes_through_json(tmp_path: Path) -> None:
    work, _ = read_workload(build_config(llama_tree(tmp_path, "1B"), []), 16)
    assert Workload.from_json(json.loads(json.dumps(work.to_json()))) == work
