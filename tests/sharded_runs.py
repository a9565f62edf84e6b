"""Configs of runs by shards, and what was drawn in one, for the tests of each engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torture.runs import battery_config

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.run_folder import RunFolder

SECTIONS: dict[str, Any] = {
    "separate critic": {},
    "lora": {"policy": {"lora": {"rank": 2}, "critic": {"kind": "shared"}}},
    "k samples, no critic": {
        "prompts": {"batch_size": 8, "samples_per_prompt": 2},
        "shaping": {"estimator": "rloo"},
        "generation": {"max_new_tokens": 6, "top_k": 20},
    },
}


def config(tiny: Any, num_workers: int | None, sections: dict[str, Any] | None = None, num_shards: int = 3) -> Any:
    tree: dict[str, Any] = {"execution": {"num_shards": num_shards, "num_workers": num_workers}}
    for name, section in (sections or {}).items():
        given = {"source": str(tiny.prompts)} if name == "prompts" else {}
        tree[name] = ({"model": str(tiny.policy)} if name == "policy" else given) | section
    return battery_config(tiny, tree)


def rollouts_of(run_dir: Path, iteration: int = 0) -> tuple[list[list[int]], dict[str, list[Any]]]:
    """The prompts of an iteration, and its rollouts by column."""
    manifests = RunFolder.open(run_dir).manifests(iteration)
    prompts = read_artifact(run_dir, manifests["sample_prompts"].artifact)
    return prompts["prompt_tokens"].to_pylist(), read_artifact(run_dir, manifests["generate"].artifact).to_pydict()
