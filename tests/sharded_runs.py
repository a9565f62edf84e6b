"""Configs of runs by shards, for the tests of each engine."""

from __future__ import annotations

from typing import Any

from torture.runs import battery_config

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
