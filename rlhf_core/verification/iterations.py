"""One iteration read again: six manifests, six artifacts, what names what, and the step of the loop state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_core.contracts.artifacts import (
    META_PREFIX,
    Manifest,
    artifact_path,
    provenance,
    read_artifact,
    read_manifest,
    stage_key,
)
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.config_io import config_digest, digest_json
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import FILE_STEMS, STAGES, WRITER_OF
from rlhf_core.ops.controller import next_state
from rlhf_core.verification.findings import Finding, said

FILES = frozenset(f"{stem}{ending}" for stem in FILE_STEMS.values() for ending in (".arrow", ".json"))


class IterationCheck:
    """Reads the iterations of a run in ascending order.

    Args:
        run: the run folder.
        archived: iterations that are in the archive, whose segments have been checked.
    """

    def __init__(self, run: RunFolder, archived: Collection[int] = ()) -> None:
        self.run, self.archived = run, archived
        self.cleaned = Cleaned.of(run.path)
        self.num_files = 0
        self.num_bytes = 0
        self._state: LoopState | None = LoopState(iteration=0, kl_coef=run.config.kl.coef)
        """Before the next iteration, as recorded; None where that is damaged."""
        self._policy: str | None = "initial"
        self._policy_before: str | None = "initial"
        """Of the iteration before."""

    def finished(self, iteration: int) -> Iterator[Finding]:
        """Whatever is wrong with a finished iteration."""
        if (drift := self.run.drift_at(iteration)) is not None:
            self._policy = self._policy_before = drift.weights
        loose = (self.run.path / f"iterations/{iteration:06d}").is_dir()
        if not loose and iteration in self.archived:
            yield from self._archived(iteration)
            return
        if not loose:
            stages = tuple((iteration, stage) for stage in STAGES)
            yield self._finding(f"iterations/{iteration:06d}", "missing", "this finished iteration is missing", stages)
            self._state = self._policy = self._policy_before = None
            return
        manifests: dict[str, Manifest] = {}
        samples: dict[str, pa.ChunkedArray] = {}
        for stage in STAGES:
            manifest, wrong = self._manifest(iteration, stage)
            if manifest is None:
                kind, problem = wrong or ("missing", "the manifest of this finished stage is missing")
                yield self._finding(_json(iteration, stage), kind, problem, ((iteration, stage),))
                continue
            problem = self._of_this_place(iteration, manifest)
            if problem:
                yield self._finding(_json(iteration, stage), "damaged", problem, ((iteration, stage),))
                continue
            manifests[stage] = manifest
            if self.cleaned.lacks(iteration) and not (self.run.path / manifest.artifact.path).exists():
                continue
            table, wrong = self._artifact(manifest)
            if table is None:
                kind, problem = wrong
                yield self._finding(manifest.artifact.path, kind, problem, ((iteration, stage),))
            elif "sample_id" in table.column_names:
                samples[stage] = table["sample_id"]
        yield from self._lineage(iteration, manifests)
        yield from self._aligned(iteration, samples)
        yield from self._loop_state(iteration, manifests)

    def begin_at(self, iteration: int) -> None:
        """Take what is recorded before an iteration for granted, and begin there."""
        self._state, self._policy, self._policy_before = self.run.state_before(iteration), None, None
        if iteration > 0 and (update := self.run.manifest("ppo_update", iteration - 1)) is not None:
            self._policy = update.inputs["policy_after"]

    def _archived(self, iteration: int) -> Iterator[Finding]:
        """What is wrong with an archived iteration beyond its segment, which has findings of its own."""
        manifests: dict[str, Manifest] = {}
        for stage in STAGES:
            try:
                manifest = read_manifest(self.run.path, stage, iteration)
            except IntegrityError:
                continue
            if manifest is None:
                continue
            problem = self._of_this_place(iteration, manifest)
            if problem:
                yield self._finding(_json(iteration, stage), "damaged", problem, ((iteration, stage),))
            else:
                manifests[stage] = manifest
        yield from self._lineage(iteration, manifests)
        yield from self._loop_state(iteration, manifests)

    def unfinished(self, iteration: int) -> Iterator[Finding]:
        """Whatever is wrong with the stages of the iteration that a resume goes on with."""
        for stage in STAGES:
            manifest, wrong = self._manifest(iteration, stage)
            path = _json(iteration, stage)
            if manifest is not None and manifest.identity not in self.run.identities:
                wrong = ("damaged", "it is of another run: its identity is not that of run.json")
            elif manifest is not None:
                _, wrong = self._artifact(manifest)
                path = manifest.artifact.path
            if wrong is not None:
                kind, problem = wrong
                remedy = f"its iteration is not finished: `rlhf resume {self.run.path}` computes it again"
                yield Finding(path, kind, problem, remedy, stops_resume=False)

    def _manifest(self, iteration: int, stage: str) -> tuple[Manifest | None, Any]:
        path = self.run.path / _json(iteration, stage)
        self._count(path)
        try:
            return read_manifest(self.run.path, stage, iteration), None
        except IntegrityError as error:
            return None, ("damaged", said(error, path))

    def _of_this_place(self, iteration: int, manifest: Manifest) -> str:
        """What a manifest says of itself that is wrong; empty if nothing is."""
        run, stage, inputs = self.run, manifest.artifact.stage, dict(manifest.inputs)
        identity = run.identity_digest_at(iteration)
        if manifest.identity != identity:
            return "it is of another run: its identity is not that of run.json"
        if manifest.seed != run.config.seed:
            return f"its seed is {manifest.seed}, the run's is {run.config.seed}"
        named = {*STAGES[stage].inputs, *STAGES[stage].outputs}
        if inputs.keys() != named:
            return f"it names the inputs {', '.join(sorted(inputs))}; {stage} reads {', '.join(sorted(named))}"
        inputs = {name: inputs[name] for name in STAGES[stage].inputs}
        if manifest.key != stage_key(stage, iteration, identity, inputs):
            return "its key does not follow from its inputs"
        return ""

    def _artifact(self, manifest: Manifest) -> tuple[pa.Table | None, Any]:
        path = self.run.path / manifest.artifact.path
        self._count(path)
        try:
            table = read_artifact(self.run.path, manifest.artifact)
        except IntegrityError as error:
            return None, ("damaged" if path.exists() else "missing", said(error, path))
        ref = manifest.artifact
        expected = provenance(
            ref.stage, ref.iteration,
            key=manifest.key, inputs=manifest.inputs, seed=manifest.seed, identity=manifest.identity,
        )  # fmt: skip
        found: Mapping[bytes, bytes] = table.schema.metadata or {}
        for name, value in expected.items():
            if found.get(f"{META_PREFIX}{name}".encode(), b"").decode(errors="replace") != value:
                return None, ("damaged", f"its own {name} is not the one in its manifest: it belongs elsewhere")
        return table, None

    def _lineage(self, iteration: int, manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
        """Every digest that a manifest names is the one of what it names."""
        state = None if self._state is None else digest_json(self._state.to_json())
        policies = {"generate": self._policy_before if self.run.updates_behind(iteration) else self._policy}
        for stage, manifest in manifests.items():
            for name, digest in manifest.inputs.items():
                producer = WRITER_OF.get(name)
                suspects = ((iteration, stage),)
                if producer is not None:
                    there = manifests[producer].artifact.sha256 if producer in manifests else None
                    suspects = ((iteration, producer), *suspects)
                else:
                    there = {"state": state, "policy": policies.get(stage, self._policy)}.get(name)
                    if iteration > 0:
                        suspects = ((iteration - 1, "ppo_update"), *suspects)
                if there is not None and there != digest:
                    problem = f"it was computed from {name} {digest[:12]}…, but there are {name} {there[:12]}…"
                    yield self._finding(_json(iteration, stage), "damaged", problem, suspects)

    def _aligned(self, iteration: int, samples: Mapping[str, pa.ChunkedArray]) -> Iterator[Finding]:
        """The same samples in the same order, from stage 2 to stage 5."""
        rollouts = samples.get("generate")
        if rollouts is None:
            return
        for stage, there in samples.items():
            if not there.equals(rollouts):
                problem = "its sample ids are not those of 02_rollouts.arrow"
                suspects = ((iteration, "generate"), (iteration, stage))
                yield self._finding(artifact_path(iteration, stage), "damaged", problem, suspects)

    def _loop_state(self, iteration: int, manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
        """β, cursor, moments and episodes follow from the state before, as ``ppo_update`` computes them."""
        before, self._state = self._state, None
        self._policy_before, self._policy = self._policy, None
        if "ppo_update" not in manifests:
            return
        update = manifests["ppo_update"]
        self._policy = update.inputs["policy_after"]
        blamed = ((iteration, "ppo_update"),)
        try:
            self._state = LoopState.from_json(update.state)
        except IntegrityError as error:
            yield self._finding(_json(iteration, "ppo_update"), "damaged", str(error), blamed)
            return
        same_config = self.run.identity_at(iteration).get("config") == config_digest(self.run.config_at(iteration))
        if before is None or not {"sample_prompts", "shape_rewards"} <= manifests.keys() or not same_config:
            return
        sampled, shaped = manifests["sample_prompts"], manifests["shape_rewards"]
        try:
            expected = next_state(
                before,
                self.run.config.kl,
                kl=shaped.metrics["objective/kl"],
                num_samples=shaped.artifact.rows,
                cursor=Cursor(**sampled.state["cursor"]),
                moments=ScoreMoments(**shaped.state["moments"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            yield self._finding(
                _json(iteration, "shape_rewards"), "damaged", f"no loop state follows from it: {error}",
                ((iteration, "sample_prompts"), (iteration, "shape_rewards")),
            )  # fmt: skip
            return
        wrong = [k for k, v in expected.to_json().items() if self._state.to_json()[k] != v]
        if wrong:
            problem = f"its loop state does not follow from the one before: {', '.join(wrong)} differ"
            yield self._finding(_json(iteration, "ppo_update"), "damaged", problem, blamed)

    def _finding(self, path: str, kind: Any, problem: str, stages: tuple[tuple[int, str], ...]) -> Finding:
        where = self.run.path
        drift = self.run.drift_after(stages[-1][0])
        if drift is not None:
            remedy = (
                f"put it back from a copy: it is older than the drift accepted at iteration {drift.iteration}, so that "
                "it cannot be computed again here"
            )
            return Finding(path, kind, problem, remedy, recoverable=False, stages=stages)
        remedy = f"`rlhf resume {where} --repair` computes it again and compares its sha256"
        return Finding(path, kind, problem, remedy, stages=stages)

    def _count(self, path: Path) -> None:
        if path.is_file():
            self.num_files += 1
            self.num_bytes += path.stat().st_size


def _json(iteration: int, stage: str) -> str:
    """Path of a stage's manifest, relative to the run folder."""
    return str(Path(artifact_path(iteration, stage)).with_suffix(".json"))
