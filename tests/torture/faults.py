"""Wrong numbers put into a real run of the tiny world, each where one stage of one iteration meets it.

A fault is planted in a child just before or after that stage works; the rest of the loop is left as it is. What
is planted on disk has a right digest and a right seal: only its value is wrong.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor, nn

from rlhf_core.contracts.artifacts import ArtifactRef, artifact_path, encode_table
from rlhf_core.contracts.batches import StageResult
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.records import read_record, seal
from rlhf_core.contracts.stage_graph import SCHEMAS, StageSpec
from rlhf_core.models.trunk import Trunk
from tasks.session.session import Session, open_session
from tasks.stage import Refs

ITERATION = 1
"""In which every fault is planted: there is one before it to come from, and one after it to spoil."""

Edit = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Plan:
    """What is done to a run around one stage. Everything is optional."""

    changes: tuple[str, ...] = ()
    """Overrides of the config: the run is made from its beginning."""
    before: Callable[[Session], None] | None = None
    """Something in memory or on disk, just before the stage."""
    result: Callable[[StageResult[Any]], StageResult[Any]] | None = None
    """What the stage has computed, before it is committed."""
    reads: tuple[str, Edit] | None = None
    """An artifact that the stage reads, by the stage that wrote it."""
    on_resume: Callable[[Path], None] | None = None
    """The run dies once the stage is committed; this is done to its folder; then it is resumed."""
    looks: bool = False
    """After ``on_resume`` a person opens the stage's artifact, instead of resuming."""
    world: tuple[str, Callable[[Path], Path]] | None = None
    """A knob, and what makes the broken files that it names; the run is made from its beginning."""
    spoils: str = ""
    """What is broken on disk afterwards and must be deleted, relative to the run folder; without a suffix, an artifact
    and its manifest."""


def plant(stage: str, plan: Plan) -> None:
    """Arm a plan in this process, which is a child and does nothing else."""
    module: Any = importlib.import_module(f"tasks.{stage}")
    task = getattr(module, stage)
    real_stage, real_run = task.fn, module.run_stage

    def stage_fn(run_dir: str, iteration: int, *refs: ArtifactRef) -> ArtifactRef:
        if iteration != ITERATION:
            return cast("ArtifactRef", real_stage(run_dir, iteration, *refs))
        if plan.before is not None:
            plan.before(open_session(run_dir))
        if plan.reads is not None:
            source, edit = plan.reads
            refs = tuple(poison(Path(run_dir), ref, edit) if ref.stage == source else ref for ref in refs)
        done = cast("ArtifactRef", real_stage(run_dir, iteration, *refs))
        if plan.on_resume is not None:
            os._exit(0)
        return done

    def run_stage(session: Session, spec: StageSpec, iteration: int, refs: Refs, compute: Any) -> Any:
        def computed(iteration: int, refs: Refs) -> Any:
            result = compute(iteration, refs)
            return plan.result(result) if plan.result is not None and iteration == ITERATION else result

        return real_run(session, spec, iteration, refs, computed)

    task.fn, module.run_stage = stage_fn, run_stage


def stop_before_the_iteration() -> None:
    """Let the run of this process end where the iteration of the faults begins."""
    from tasks.sample_prompts import sample_prompts

    real = sample_prompts.fn

    def stop(run_dir: str, iteration: int) -> ArtifactRef:
        if iteration == ITERATION:
            os._exit(0)
        return real(run_dir, iteration)

    sample_prompts.fn = stop


def poison(run_dir: Path, ref: ArtifactRef, edit: Edit) -> ArtifactRef:
    """Change an artifact and its manifest, so that digest and seal are right; returns the new reference."""
    path = run_dir / ref.path
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    metadata = {key.decode().removeprefix("rlhf."): value.decode() for key, value in table.schema.metadata.items()}
    edited = edit(table.replace_schema_metadata(None)).cast(SCHEMAS[ref.stage])
    changed = replace(ref, sha256=write_file(path, encode_table(edited, metadata)))
    manifest = read_record(path.with_suffix(".json"))
    manifest["artifact"]["sha256"] = changed.sha256
    write_file(path.with_suffix(".json"), seal(manifest))
    return changed


def poison_own(stage: str, edit: Edit) -> Callable[[Path], None]:
    """Change what the stage itself has committed."""

    def act(run_dir: Path) -> None:
        relative = artifact_path(ITERATION, stage)
        values = read_record((run_dir / relative).with_suffix(".json"))["artifact"]
        poison(run_dir, ArtifactRef(**values), edit)

    return act


def poison_record(path: Path, old: str, new: str) -> None:
    """Change the text of a sealed record, and seal it again: numbers that ``seal`` itself refuses, too."""
    import hashlib

    body = path.read_text()
    body = body[: body.index(',"seal":')] + "}"
    assert old in body, f"{old} is not in {path}"
    changed = body.replace(old, new, 1)
    sealed = changed[:-1] + f',"seal":"{hashlib.sha256(changed.encode()).hexdigest()}"' + "}\n"
    write_file(path, sealed.encode())


def poison_loop_state(key: str, text: str) -> Callable[[Session], None]:
    """Change a number of the loop state that the iteration starts from."""

    def act(session: Session) -> None:
        path = (session.run.path / artifact_path(ITERATION - 1, "ppo_update")).with_suffix(".json")
        body = path.read_text()
        state = body[body.index('"state":') :]
        start = state.index(f'"{key}":')
        end = min(i for i in (state.find(",", start), state.find("}", start)) if i > 0)
        poison_record(path, state[start:end], f'"{key}":{text}')

    return act


def cell(column: str, value: Any, *, row: int = 2, token: int | None = 0) -> Edit:
    """Put a value into a column: of one row, and in a list at one token (None: the whole cell)."""

    def edit(table: pa.Table) -> pa.Table:
        values: list[Any] = table[column].to_pylist()
        if isinstance(values[row], list) and token is not None:
            values[row][token] = value
        else:
            values[row] = value
        return with_column(table, column, values)

    return edit


def longer(*columns: str, row: int = 2) -> Edit:
    """Repeat the last entry of the lists of a row."""

    def edit(table: pa.Table) -> pa.Table:
        for column in columns:
            values: list[Any] = table[column].to_pylist()
            values[row] = [*values[row], values[row][-1]]
            table = with_column(table, column, values)
        return table

    return edit


def emptied(*columns: str, row: int = 2) -> Edit:
    """Empty the lists of a row."""

    def edit(table: pa.Table) -> pa.Table:
        for column in columns:
            table = cell(column, [], row=row, token=None)(table)
        return table

    return edit


def zeroed(column: str) -> Edit:
    """0 in all lists of a column."""
    return lambda table: with_column(table, column, [[0.0] * len(row) for row in table[column].to_pylist()])


def twice(column: str) -> Edit:
    """Name two rows alike."""
    return lambda table: cell(column, table[column][0].as_py(), row=2)(table)


def with_column(table: pa.Table, column: str, values: Sequence[Any]) -> pa.Table:
    """The table with another content of one column."""
    index = table.column_names.index(column)
    return table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def reverse(table: pa.Table) -> pa.Table:
    """All rows in the opposite order."""
    return table.take(list(range(table.num_rows))[::-1])


def set_one(name: str, value: float) -> Callable[[StageResult[Any]], StageResult[Any]]:
    """Put a value at the first place of a tensor of what a stage has computed."""

    def edit(result: StageResult[Any]) -> StageResult[Any]:
        tensor = getattr(result.batch, name).clone()
        tensor[(2, 0) if tensor.dim() == 2 else 2] = value
        return replace(result, batch=replace(result.batch, **{name: tensor}))

    return edit


def set_all(name: str, value: float) -> Callable[[StageResult[Any]], StageResult[Any]]:
    """Put a value at all real places of a tensor of what a stage has computed."""

    def edit(result: StageResult[Any]) -> StageResult[Any]:
        tensor = getattr(result.batch, name)
        full = torch.full_like(tensor, value)
        changed = torch.where(result.batch.response_mask_BR, full, 0.0) if tensor.dim() == 2 else full
        return replace(result, batch=replace(result.batch, **{name: changed}))

    return edit


def set_metric(name: str, value: float) -> Callable[[StageResult[Any]], StageResult[Any]]:
    """Put a value into a metric of a stage."""
    return lambda result: replace(result, metrics={**result.metrics, name: value})


def set_step(name: str, value: float) -> Callable[[StageResult[Any]], StageResult[Any]]:
    """Put a value into the record of an optimiser step."""

    def edit(result: StageResult[Any]) -> StageResult[Any]:
        steps = [dict(step) for step in result.batch.steps]
        steps[1][name] = value
        return replace(result, batch=replace(result.batch, steps=steps))

    return edit


def spoil_padding(batch: Any) -> Any:
    """NaN, or a token of no vocabulary, wherever a batch is padded."""
    if not is_dataclass(batch):
        return batch
    mask = getattr(batch, "mask_QP", getattr(batch, "response_mask_BR", None))
    if mask is None:
        return batch
    changes: dict[str, Any] = {}
    for f in fields(batch):
        tensor = getattr(batch, f.name)
        if isinstance(tensor, Tensor) and tensor.dtype != torch.bool and tensor.shape == mask.shape:
            changes[f.name] = torch.where(mask, tensor, float("nan") if tensor.is_floating_point() else 1_000_000)
    assert changes, "a padded batch has tensors"
    return replace(cast("Any", batch), **changes)


def spoil_result(result: StageResult[Any]) -> StageResult[Any]:
    """The same of what a stage has computed."""
    return replace(result, batch=spoil_padding(result.batch))


def spoil_inputs(session: Session) -> None:
    """From now on whatever is read from artifacts has spoilt padding."""
    for name in ("prompts", "rollouts", "scores", "reference_logprobs", "experience"):
        real = getattr(session, name)
        setattr(session, name, lambda *a, real=real: spoil_padding(real(*a)))


def stop_spoiling(session: Session) -> None:
    """Read artifacts as they are again."""
    for name in ("prompts", "rollouts", "scores", "reference_logprobs", "experience"):
        vars(session).pop(name, None)


def model_of(session: Session, stage: str) -> nn.Module:
    """The model that a stage computes with."""
    if stage == "score_rewards":
        return cast("nn.Module", cast("Any", session.models.reward_components[0]).model)
    if stage == "reference_logprobs":
        return session.models.reference.model
    return session.policy.trainer(ITERATION).actor_critic.policy.model


def set_weight(stage: str, value: float) -> Callable[[Session], None]:
    """Overwrite a weight matrix of the stage's model, in memory."""

    def act(session: Session) -> None:
        model = model_of(session, stage)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.c_fc.weight"):
                    parameter.fill_(value)

    return act


def one_bad_pass(stage: str) -> Callable[[Session], None]:
    """Let the first pass of the stage's model give NaN for two rows, and no other."""

    def act(session: Session) -> None:
        model: Any = model_of(session, stage)

        def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
            handle.remove()
            output.last_hidden_state[:2] = float("nan")
            return output

        if stage != "generate":
            assert trunk_of(session, stage).packs, "it has been asked: its probe is not the pass that is spoilt"
        handle = model.base_model.register_forward_hook(spoil)

    return act


def trunk_of(session: Session, stage: str) -> Trunk:
    """The trunk of a stage's frozen model."""
    component: Any = session.models.reward_components[0]
    return component._trunk if stage == "score_rewards" else session.models.reference._reads


def one_bad_gradient(session: Session) -> None:
    """Let the first gradient of one weight be NaN, and no other."""
    parameter = session.policy.trainer(ITERATION).actor_critic.policy_parameters()[0][1]

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        return torch.full_like(gradient, float("nan"))

    handle = parameter.register_hook(spoil)


def broken_model(source: Path) -> Callable[[Path], Path]:
    """Copy a model folder with one NaN among its weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    def make(folder: Path) -> Path:
        copy = folder / "broken"
        shutil.copytree(source, copy)
        tensors = load_file(copy / "model.safetensors")
        next(t for name, t in tensors.items() if name.endswith("mlp.c_fc.weight"))[0, 0] = float("nan")
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def broken_prompts(source: Path) -> Callable[[Path], Path]:
    """Copy a prompt file with a NaN where a prompt stood."""

    def make(folder: Path) -> Path:
        lines = source.read_text().splitlines()
        lines[3] = '{"prompt": NaN}'
        (folder / "broken.jsonl").write_text("\n".join(lines) + "\n")
        return folder / "broken.jsonl"

    return make


def poison_checkpoint(run_dir: Path) -> None:
    """A NaN in the optimizer's moments of the newest checkpoint, its digest made right."""
    import hashlib

    from safetensors.torch import load_file, save_file

    folder = max(p for p in (run_dir / "checkpoints").iterdir() if p.name.isdecimal())
    path = folder / "optimizer.safetensors"
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = load_file(path)
    next(t for name, t in tensors.items() if name.endswith("exp_avg_sq"))[0] = float("nan")
    save_file(tensors, path)
    poison_record(folder / "manifest.json", old, hashlib.sha256(path.read_bytes()).hexdigest())


def poison_own_manifest(stage: str, key: str) -> Callable[[Path], None]:
    """A number too large for any float in the manifest that the stage has committed."""

    def act(run_dir: Path) -> None:
        path = (run_dir / artifact_path(ITERATION, stage)).with_suffix(".json")
        value = json.loads(path.read_text())
        number = next(group[key] for group in (value["metrics"], value["timing"]) if key in group)
        poison_record(path, f'"{key}":{json.dumps(number)}', f'"{key}":1e999')

    return act
