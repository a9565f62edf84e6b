"""Runs whose numbers a test chooses: commit records without artifacts, enough for whatever reads metrics alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_core.contracts.artifacts import ArtifactRef, Manifest, artifact_path, encode_table
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.records import write_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.schemas import SCHEMA_VERSION
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.evaluation.folder import FRONTIER, new_record
from rlhf_core.identity import identity_digest

IDENTITY: dict[str, Any] = {
    "config": "c", "source": "s" * 64, "prompts": "a" * 64, "device": "cpu", "instruction_set": "AVX2",
    "num_threads": 2, "models": {"policy": "b" * 64, "reference": "b" * 64, "reward0": "d" * 64},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
TREE: dict[str, Any] = {
    "num_iterations": 6,
    "prompts": {"source": "p.jsonl", "batch_size": 8},
    "policy": {"model": "a-policy"},
    "reward": {"components": [{"kind": "model", "model": "a-reward"}]},
    "kl": {"controller": "log_pi", "target": 2.0},
    "ppo": {"num_minibatches": 2},
}


def made_run(
    path: Path,
    scores: Sequence[float],
    kls: Sequence[float] | None = None,
    *,
    changes: Sequence[str] = (),
    identity: Mapping[str, Any] | None = None,
    is_reported: bool = True,
) -> RunFolder:
    """A run that has finished as many iterations as there are scores."""
    run = RunFolder.create(path, build_config(TREE, changes), IDENTITY | dict(identity or {}))
    for iteration, score in enumerate(scores):
        commit(run, iteration, score, kls[iteration] if kls is not None else 0.5 * iteration)
    if is_reported:
        sample = {"prompt": "p", "before": "b", "score_before": 0.0, "after": "a", "score_after": 1.0}
        write_record(path / "before_after.json", {"samples": [sample]})
    return run


def commit(run: RunFolder, iteration: int, score: float, kl: float, *, version: int = SCHEMA_VERSION) -> None:
    """The records of one more iteration."""
    metrics = {
        "generate": {"rollout/response_len": 10.0 + iteration, "rollout/eos_rate": 1.0, "rollout/num_tokens": 80.0,
                     "objective/entropy": 20.0},
        "shape_rewards": {"objective/scores": score, "objective/kl": kl, "kl/beta": 0.1},
        "ppo_update": {"policy/clipfrac_avg": 0.05, "update/num_steps": 4.0},
    }  # fmt: skip
    for stage in STAGES:
        reference = ArtifactRef(stage, iteration, artifact_path(iteration, stage), "0" * 64, 8)
        timing = {"compute_s": 0.4, "total_s": 0.5, "cpu_s": 0.75, "memory_bytes": 3e8, "peak_memory_bytes": 4e8}
        state = LoopState(iteration + 1, 0.1, episodes=8 * (iteration + 1)).to_json() if stage == "ppo_update" else {}
        manifest = Manifest(
            reference, version, "k", {}, run.config.seed, identity_digest(run.identity), metrics.get(stage, {}), state,
            timing,
        )  # fmt: skip
        write_record((run.path / reference.path).with_suffix(".json"), asdict(manifest))


def made_evaluation(run: RunFolder, name: str, *, score: float, kl: float, share: float | None = 0.7) -> Path:
    """A finished evaluation of the run's newest checkpoint."""

    def around(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.2}

    folder = run.path / "evaluations" / name
    write_record(folder / "evaluation.json", new_record(folder, run.config, run.identity, run.path, 0))
    numbers = {"score": around(score), "kl": around(kl), "win_rate": around(0.9), "blend": 1.0,
               "share_of_attainable": None if share is None else around(share)}  # fmt: skip
    blended = numbers | {"score": around(0.0), "blend": 0.5}
    summary = {"policies": {"000006@0.5": blended, "000006": numbers}, "reference": {"score": around(0.1)}}
    (folder / "summary.json").write_text(json.dumps(summary))
    points = [(0.0, 0.1, True), (1.0, 1.5, True), (2.0, 2.2, True), (9.0, 2.5, False)]
    rows = [{"beta": 1.0, "kl": k, "score": s, "score_by_half": s, "ess": 10.0, "trusted": t} for k, s, t in points]
    (folder / "frontier.arrow").write_bytes(encode_table(pa.Table.from_pylist(rows, schema=FRONTIER), {}))
    return folder
