"""One iteration packed into one file, with everything that it takes to compute it again elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.durable import write_file
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.places import model_places
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.replay.bundles import FORMAT, MODELS, PROMPTS, RUN, BundleRecord, write_bundle
from rlhf_core.replay.relocation import ReadRows, model_files, prompt_lines, template_texts
from rlhf_core.stages.sample_prompts import sample_prompts
from tasks.lifecycle.start import save_state
from tasks.replay.shadow import manifest_path, shadow_of
from tasks.replay.source import Source, opened
from tasks.session.session import Session, open_session


def make_bundle(run_dir: str, iteration: int, out: str, *, with_models: bool = True) -> BundleRecord:
    """Pack an iteration of a run.

    Args:
        run_dir: its folder.
        iteration: finished.
        out: the file, which must not exist yet.
        with_models: also the weights that it starts from, and every model and tokenizer that the config names; without
            them the bundle is small, and shaping alone can be computed from it.
    Returns: what the bundle says of itself.
    Raises:
        UserError: there is no such iteration, a model is gone, or ``out`` is there.
        IntegrityError: what is stored is damaged, or the weights cannot be had here as they were.
    """
    run = RunFolder.open(Path(run_dir))
    with (
        opened(run_dir, iteration) as source,
        shadow_of(replace(source.run, config=source.config), iteration) as shadow,
    ):
        stored = {stage: read_artifact(run.path, manifest.artifact) for stage, manifest in source.manifests.items()}
        sources = _record_and_artifacts(source, shadow)
        record = BundleRecord(
            format=FORMAT,
            run=run.path.resolve().name,
            iteration=iteration,
            vocab_size=_num_tokens(stored),
            with_models=with_models,
            models={},
            templates={},
            prompt_rows=(),
            num_prompts=0,
            files={},
        )
        if with_models:
            session = open_session(str(shadow.path))
            session.needs_same_files = False
            session.keep_plan(source.plan)
            record = replace(record, templates=template_texts(run.config), vocab_size=session.plan.vocab_size)
            record = _with_prompts(record, source, session, stored, shadow.path / PROMPTS)
            sources[PROMPTS] = shadow.path / PROMPTS
            if iteration not in shadow.checkpoints():
                save_state(session, iteration)
            folder = shadow.checkpoint_path(iteration)
            sources |= {
                f"{RUN}/checkpoints/{folder.name}/{file.relative_to(folder)}": file
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
            record, files = _with_models(record, run)
            sources |= files
        return write_bundle(Path(out), sources, record)


def _record_and_artifacts(source: Source, shadow: RunFolder) -> dict[str, Path]:
    """The run's record as it is, the iteration, and the manifest of the update before it."""
    iteration = source.iteration
    names = [manifest_path(iteration - 1, "ppo_update")] if iteration > 0 else []
    for stage, manifest in source.manifests.items():
        names += [manifest.artifact.path, manifest_path(iteration, stage)]
    return {f"{RUN}/run.json": source.run.path / "run.json"} | {f"{RUN}/{name}": shadow.path / name for name in names}


def _with_prompts(
    record: BundleRecord, source: Source, session: Session, stored: Mapping[str, pa.Table], path: Path
) -> BundleRecord:
    """Write those prompts that the iteration looks at, also the ones that it drops, and note their rows."""
    config, prompt_set = source.config, session.plan.prompt_set
    read = ReadRows(prompt_set.entries)
    drawn = sample_prompts(
        replace(prompt_set, entries=read),
        session.tokenizer,
        config.prompts,
        cursor=source.run.state_before(source.iteration).cursor,
        seed=config.seed,
        max_prompt_len=session.plan.max_prompt_len,
    ).batch
    if list(drawn.prompt_ids) != stored["sample_prompts"]["prompt_id"].to_pylist():
        raise IntegrityError(
            f"prompts.source {config.prompts.source!r} is not what iteration {source.iteration} drew from; "
            f"`rlhf replay {source.name} --iteration {source.iteration}` tells more"
        )
    rows = list(read.read)
    write_file(path, prompt_lines(prompt_set, rows, config))
    return replace(record, prompt_rows=rows, num_prompts=len(prompt_set.entries))


def _with_models(record: BundleRecord, run: RunFolder) -> tuple[BundleRecord, dict[str, Path]]:
    """Each model once, in a folder named after the first field that names it."""
    folders: dict[str, str] = {}
    files: dict[str, Path] = {}
    for field, place in model_places(run.config).items():
        if place not in folders:
            folders[place] = f"{MODELS}/{field}"
            files |= {f"{folders[place]}/{name}": file for name, file in model_files(place, field).items()}
    models = {field: folders[place] for field, place in model_places(run.config).items()}
    return replace(record, models=models), files


def _num_tokens(stored: Mapping[str, pa.Table]) -> int:
    """One more than the largest token of an iteration: as much of a vocabulary as it tells."""
    columns = [stored["sample_prompts"]["prompt_tokens"], stored["generate"]["response_tokens"]]
    return 1 + max(token for column in columns for row in column.to_pylist() for token in row)
