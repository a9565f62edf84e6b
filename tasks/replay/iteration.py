"""An iteration computed again from what is stored of it, stage by stage, and compared to the bit.

Each stage is given the stored artifacts of its predecessors, so that what differs in one is not passed on to the
next. Nothing is written into the run: the tasks work in a copy of links (:mod:`tasks.replay.shadow`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from rlhf_core.contracts.artifacts import META_PREFIX, ArtifactRef, Manifest, locate_artifact, read_artifact
from rlhf_core.contracts.errors import IntegrityError, NumericalError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import STAGES
from rlhf_core.replay.comparison import compare_tables, key_column
from rlhf_core.replay.outcome import Replay, StageReplay, Weights, changed_entries
from rlhf_core.replay.tokens import check_sample, sample_row, token_rows
from tasks.replay.shadow import compute_stage, put_stage, remove_stage, shadow_of
from tasks.replay.source import Source, load_weights, opened
from tasks.session.session import Session, open_session

Progress = Callable[[str], None]
"""Told what is computed now: a stage, or the weights before it."""
WEIGHT_STAGES = ("generate", "ppo_update")
"""What needs the weights that the iteration starts from."""


def replay_iteration(
    path: str,
    iteration: int | None = None,
    *,
    first: str | None = None,
    sample: str | None = None,
    num_threads: int | None = None,
    progress: Progress | None = None,
    trust: Sequence[str] = (),
    vllm_python: str | None = None,
) -> Replay:
    """Compute an iteration again and compare.

    Args:
        path: a run folder, or a bundle.
        iteration: finished; of a bundle it may be left out.
        first: the stage to begin with; None: the first one.
        sample: compare this response alone.
        num_threads: CPU threads; None: those of the run.
        progress: told what is computed now.
        trust: programs, functions and addresses that it names, and that the person accepts.
        vllm_python: interpreter of an environment with vLLM that the person names.
    Returns: each stage with its differences; and, if there are any, what differs in the conditions.
    Raises:
        UserError: no such run, iteration, stage or sample, or nothing of it can be computed here.
        IntegrityError: what is stored is damaged.
    """
    stages = _from(first)
    with opened(path, iteration, trust=trust, vllm_python=vllm_python) as source:
        stored = {stage: read_artifact(source.run.path, m.artifact) for stage, m in source.manifests.items()}
        if sample is not None:
            check_sample(stored["generate"], sample, source.iteration)
        if all(stage in source.missing for stage in stages):
            raise UserError(f"nothing of it can be computed here: {source.missing[stages[0]]}")
        plan = source.plan  # what a person may have done wrong is told before a stage begins
        with shadow_of(replace(source.run, config=source.config), source.iteration) as shadow:
            session = open_session(str(shadow.path))
            session.needs_same_files = False
            session.keep_plan(plan)
            if num_threads is not None:
                session.use_threads(num_threads)
            work = _Work(source, shadow, session, stored, sample, progress or (lambda _: None))
            for stage in stages:
                work.replay(stage)
        return work.result()


class _Work:
    """One replay in its shadow."""

    def __init__(
        self,
        source: Source,
        shadow: RunFolder,
        session: Session,
        stored: Mapping[str, pa.Table],
        sample: str | None,
        tell: Progress,
    ) -> None:
        self.source, self.shadow, self.session, self.stored, self.sample = source, shadow, session, stored, sample
        self.tell = tell
        self.refs: dict[str, ArtifactRef] = {stage: m.artifact for stage, m in source.manifests.items()}
        self.done: list[StageReplay] = []
        self.replayed: dict[str, pa.Table] = {}
        self.weights: Weights | None = None
        self._no_weights: IntegrityError | None = None
        """Why those that the iteration starts from are not here."""

    def replay(self, stage: str) -> None:
        """Compute a stage from the stored artifacts of its predecessors, compare, and put the stored one back."""
        manifest, iteration = self.source.manifests[stage], self.source.iteration
        about = StageReplay(stage, manifest.artifact.rows, manifest.artifact.sha256)
        if (reason := self.source.missing.get(stage)) is not None:
            self.done.append(replace(about, skipped=reason))
            return
        started = time.perf_counter()
        remove_stage(stage, iteration, self.shadow.path)
        try:
            if stage in WEIGHT_STAGES:
                self._load_weights()
                started = time.perf_counter()
            self.tell(stage)
            ref = compute_stage(self.shadow, stage, iteration, self.refs)
        except (IntegrityError, NumericalError) as error:
            self.done.append(replace(about, failed=str(error), seconds=time.perf_counter() - started))
        else:
            seconds = time.perf_counter() - started
            self.done.append(replace(self._compared(about, manifest, ref), seconds=seconds))
        put_stage(self.source.run, stage, iteration, self.shadow.path)

    def _load_weights(self) -> None:
        """Once, for both stages that need them."""
        if self.weights is None and self._no_weights is None:
            self.tell("the weights before it")
            try:
                self.weights = load_weights(self.session, self.source.iteration)
            except IntegrityError as error:
                self._no_weights = error
        if self._no_weights is not None:
            raise self._no_weights

    def _compared(self, about: StageReplay, manifest: Manifest, ref: ArtifactRef) -> StageReplay:
        stage = about.stage
        again = self.shadow.manifest(stage, self.source.iteration)
        assert again is not None, "it has just been committed"
        table = self.replayed[stage] = read_artifact(self.shadow.path, ref)
        before, after = (self._asked(stage, t) for t in (self.stored[stage], table))
        others: list[str] = []
        if self.sample is None or stage == "ppo_update":
            others += changed_entries(manifest.metrics, again.metrics, "metric")
            others += changed_entries(manifest.state, again.state, "loop state")
            others += self._provenance(manifest, ref)
        weights = None
        if "policy_after" in again.inputs:
            weights = manifest.inputs["policy_after"], again.inputs["policy_after"]
        difference = compare_tables(stage, before, after)
        return replace(about, replayed=ref.sha256, difference=difference, others=others, weights=weights)

    def _asked(self, stage: str, table: pa.Table) -> pa.Table:
        """The rows that are compared. An update has none of one sample: all of it is."""
        if self.sample is None or stage == "ppo_update":
            return table
        if key_column(stage) == "sample_id":
            return sample_row(table, "sample_id", self.sample)
        prompt = sample_row(self.stored["generate"], "sample_id", self.sample)["prompt_id"][0].as_py()
        return sample_row(table, "prompt_id", prompt)

    def _provenance(self, manifest: Manifest, ref: ArtifactRef) -> list[str]:
        """What the artifacts say of themselves, where that differs."""
        said: list[dict[str, str]] = []
        for where, artifact in ((self.source.run.path, manifest.artifact), (self.shadow.path, ref)):
            schema = pa.ipc.open_file(pa.BufferReader(locate_artifact(where, artifact)[1])).schema
            about: Mapping[bytes, bytes] = schema.metadata or {}
            said.append({k.decode().removeprefix(META_PREFIX): v.decode(errors="replace") for k, v in about.items()})
        return changed_entries(said[0], said[1], "provenance")

    def result(self) -> Replay:
        """What was found, and under which conditions if something was."""
        replay = Replay(
            run=self.source.name,
            iteration=self.source.iteration,
            stages=self.done,
            num_threads=self.session.num_threads,
            threads_of_run=int(self.source.run.identity["num_threads"]),
            weights=self.weights,
            sample=self.sample,
        )
        if self.sample is not None:
            tokens = token_rows(self.stored, self.replayed, self.sample, self.source.decode)
            replay = replace(replay, tokens=tokens)
        return (
            replay
            if replay.is_identical
            else replace(replay, conditions=tuple(self.source.conditions(self.session.num_threads)))
        )


def _from(first: str | None) -> list[str]:
    stages = list(STAGES)
    if first is None:
        return stages
    if first not in stages:
        raise UserError(f"--from {first} is not a stage; stages: {', '.join(stages)}")
    return stages[stages.index(first) :]
