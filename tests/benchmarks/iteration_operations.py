"""Operations of an iteration that was computed: from the lengths in its artifacts."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.costs.operations import Models, stage_operations


def iteration_operations(run_dir: Path, iteration: int, models: Models, *, epochs: int) -> dict[str, int]:
    """Operations of each stage, from the lengths in an iteration's artifacts."""
    import pyarrow as pa

    folder = run_dir / "iterations" / f"{iteration:06d}"
    asked = pa.ipc.open_file(folder / "01_prompts.arrow").read_all()
    answered = pa.ipc.open_file(folder / "02_rollouts.arrow").read_all()
    prompts = {
        i: len(t) for i, t in zip(asked["prompt_id"].to_pylist(), asked["prompt_tokens"].to_pylist(), strict=True)
    }
    lengths = [len(tokens) for tokens in answered["response_tokens"].to_pylist()]
    responses = list(zip(answered["prompt_id"].to_pylist(), lengths, strict=True))
    return stage_operations(models, prompts, responses, epochs=epochs)
