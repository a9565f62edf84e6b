"""Checkpoints read again: every file, the state and the weights that the iterations committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_core.contracts.artifacts import read_manifest
from rlhf_core.contracts.cleaned import Cleaned
from rlhf_core.contracts.config_io import digest_json
from rlhf_core.contracts.durable import hash_file, is_leftover, read_file
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.loop_state import LoopState
from rlhf_core.contracts.records import MAX_BYTES, read_json, read_record
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models.checkpoints import load_checkpoint
from rlhf_core.verification.findings import Finding, said

ALIAS = "last_good"


class CheckpointCheck:
    """Reads the checkpoints of a run.

    Args:
        run: the run folder.
        load_weights: also put each one into memory and compare the digest of what it gives.
    """

    def __init__(self, run: RunFolder, *, load_weights: bool) -> None:
        self.run, self.load_weights = run, load_weights
        self.intact: list[int] = []
        self.num_files = 0
        self.num_bytes = 0

    def one(self, iteration: int) -> list[Finding]:
        """Whatever is wrong with a checkpoint; none of it if it was removed meanwhile."""
        found = list(self._files(iteration)) or list(self._content(iteration))
        if not found:
            self.intact.append(iteration)
        return found

    def missing(self, num_finished: int, *, is_complete: bool) -> Iterator[Finding]:
        """Checkpoints that retention would have kept; the last one is due where the run's report is written."""
        settings, there = self.run.config.checkpoint, self.run.checkpoints()
        due = list(range(settings.every, num_finished, settings.every))
        if is_complete and num_finished == self.run.config.num_iterations:
            due.append(num_finished)
        ends = {self.run.config.num_iterations, *(extension.before for extension in self.run.extensions)}
        known = sorted({*due, *(i for i in there if i % settings.every == 0 or i in ends)})
        kept = known[-1 if self.run.last_good is not None else -settings.keep_last :]
        removed = Cleaned.of(self.run.path).checkpoints
        for iteration in kept:
            if iteration not in (*there, *removed) and not self.run.checkpoint_path(iteration).exists():
                yield self._rebuilt(self.run.checkpoint_path(iteration), iteration, "missing",
                                    "this checkpoint is missing", stops_resume=False)  # fmt: skip

    def alias(self) -> Iterator[Finding]:
        """The link to the last good checkpoint."""
        link = self.run.path / "checkpoints" / ALIAS
        if not (link.is_symlink() or link.exists()):
            return
        target = link.readlink().name if link.is_symlink() else ""
        if not target.isdecimal() or str(link.readlink()) != target:
            yield Finding(
                self._name(link), "damaged", "it is not a link to a checkpoint beside it",
                f"`rlhf resume {self.run.path} --repair` moves it aside; a guard that stops the run makes it again",
                moved_aside=True,
            )  # fmt: skip
        elif not link.exists():
            path = self.run.checkpoint_path(int(target))
            yield self._rebuilt(path, int(target), "missing", f"{ALIAS} points at this checkpoint, which is missing")

    def _files(self, iteration: int) -> Iterator[Finding]:
        folder = self.run.checkpoint_path(iteration)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            yield self._rebuilt(manifest, iteration, "missing", "this checkpoint has no manifest")
            return
        try:
            record = read_record(manifest)
        except IntegrityError as error:
            yield self._rebuilt(manifest, iteration, "damaged", said(error, manifest))
            return
        files: Any = record.get("files")
        if not isinstance(files, dict):
            yield self._rebuilt(manifest, iteration, "damaged", "it is not the manifest of a checkpoint")
            return
        if record.get("iteration") != iteration:
            problem = f"it is the manifest of checkpoint {record.get('iteration')}"
            yield self._rebuilt(manifest, iteration, "damaged", problem)
            return
        digests = cast("dict[str, str]", files)
        there = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
        for name, expected in digests.items():
            path = folder / name
            if name not in there or path.is_symlink():
                yield self._rebuilt(path, iteration, "missing", "this file of a checkpoint is missing")
                continue
            self.num_files += 1
            self.num_bytes += path.stat().st_size
            if hash_file(path) != expected:
                yield self._rebuilt(path, iteration, "damaged", "its sha256 is not the committed one")
        for name in sorted(there.keys() - digests.keys() - {"manifest.json"}):
            yield Finding(
                self._name(there[name]), "surplus", "this file was never committed in this checkpoint",
                f"`rlhf resume {self.run.path} --repair` moves it aside", moved_aside=True,
            )  # fmt: skip

    def _content(self, iteration: int) -> Iterator[Finding]:
        """What an intact folder says: it is of this place, this run, and these weights."""
        run, folder = self.run, self.run.checkpoint_path(iteration)
        record = read_record(folder / "manifest.json")
        drift = run.drift_at(iteration)
        identities = [run.identity_at(max(iteration - 1, 0)), run.identity_at(iteration)]
        identities += [drift.before for drift in run.drifts if drift.iteration == iteration]  # there and back again
        if record.get("identity") not in [digest_json(dict(identity)) for identity in identities]:
            problem = "it is a checkpoint of another run: its identity is not that of run.json"
        else:
            problem = self._against_update(iteration, record, drift.weights if drift is not None else None)
        if not problem and self.load_weights:
            try:
                load_checkpoint(folder, run.config, torch.device("cpu"))
            except Exception as error:  # whatever a loader says of a folder that is as it was committed
                problem = f"its weights do not load: {str(error).splitlines()[0] if str(error) else repr(error)}"
        if problem:
            yield self._rebuilt(folder / "manifest.json", iteration, "damaged", problem)

    def _against_update(self, iteration: int, record: dict[str, Any], weights: str | None) -> str:
        """What differs from what the update before has committed; empty if nothing does."""
        path = self.run.checkpoint_path(iteration) / "state.json"
        try:
            state = LoopState.from_json(read_json(read_file(path, MAX_BYTES), origin="state.json"))
            update = read_manifest(self.run.path, "ppo_update", iteration - 1)
            expected = None if update is None else LoopState.from_json(update.state)
        except IntegrityError as error:
            return str(error) if "state.json" in str(error) else ""  # the update has a finding of its own
        if update is None or expected is None:
            return ""
        if state != expected:
            return f"its state.json is not the state that iteration {iteration - 1} committed"
        if record.get("weights") != (weights or update.inputs["policy_after"]):
            return f"its weights are not those that iteration {iteration - 1} committed"
        return ""

    def _rebuilt(self, path: Path, iteration: int, kind: Any, problem: str, *, stops_resume: bool = True) -> Finding:
        drift = self.run.drift_after(iteration)
        if drift is None:
            remedy = f"`rlhf resume {self.run.path} --repair` rebuilds the checkpoint and compares its digests"
            if not stops_resume:
                remedy += "; a resume goes on without it"
        else:
            remedy = (
                f"put it back from a copy, or remove checkpoints/{iteration:06d}: it is older than the drift accepted "
                f"at iteration {drift.iteration}, so that it cannot be rebuilt here"
            )
        return Finding(
            self._name(path), kind, problem, remedy,
            recoverable=drift is None, stops_resume=stops_resume, checkpoint=iteration,
        )  # fmt: skip

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.run.path))


def strangers(folder: Path, known: frozenset[str]) -> Iterator[Path]:
    """What lies in a folder and is neither of the run's own names nor a leftover; links have findings of their own."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in known and not is_leftover(path) and not path.is_symlink():
            yield path
