"""Iterations on disk that nobody computed: for tests of what keeps, archives and removes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_core.contracts.artifacts import Manifest, commit_stage
from rlhf_core.contracts.stage_graph import SCHEMAS

TEXTS = ["", "plain", "zwölf Boxkämpfer 🥊", 'a "quoted"\nline', "\u2028 separated"]


def commit_iteration(run_dir: Path, iteration: int, *, rows: int = 3, identity: str = "this run") -> list[Manifest]:
    """Commit all six stages of an iteration, with values of every type its schemas have."""
    return [
        commit_stage(
            run_dir,
            stage,
            iteration,
            pa.Table.from_pylist(
                [{field.name: _value(field, iteration, row) for field in schema} for row in range(rows)],
                schema=schema,
            ),
            key=f"key of {stage} {iteration}",
            inputs={"before": f"{iteration} ü"},
            seed=7,
            identity=identity,
            metrics={"objective/kl": 0.1 * iteration, "objective/scores": 1e-7},
            state={"cursor": {"epoch": 0, "position": iteration}},
            timing={"total_s": 0.25, "compute_s": 0.125},
        )
        for stage, schema in SCHEMAS.items()
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path of each file below a folder -> its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _value(field: pa.Field, iteration: int, row: int) -> Any:
    """Of any type, plausible enough for the checks of values: log-probs below 0, names once, lists equally long."""
    kind, salt = field.type, iteration + row
    if pa.types.is_list(kind):
        empty = field.name == "messages" and row % 2
        item = kind.value_field.with_name(field.name)
        return [] if empty else [_value(item, iteration, row) for _ in range(1 + salt % 4)]
    if pa.types.is_struct(kind):
        return {child.name: _value(child, iteration, row) for child in kind}
    if pa.types.is_string(kind):
        return f"i{iteration:06d}-p{row:06d}-s0" if field.name == "sample_id" else TEXTS[salt % len(TEXTS)]
    if pa.types.is_boolean(kind):
        return bool(salt % 2)
    if pa.types.is_floating(kind):
        return -1.5 * salt if field.name in ("logprobs", "ref_logprobs", "score") else salt / 64
    return row if field.name in ("step", "prompt_id") else 1
