"""Ways in which a run folder gets damaged, each as a function of the folder, and what a verification says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny_world import Tiny
from torture.runs import battery_config, start
from zoo import copy_of_run

from rlhf_core.contracts.records import read_record, write_record


@dataclass(frozen=True)
class Damage:
    """One way, its name, and the findings as (path, kind)."""

    name: str
    harm: Callable[[Path], object]
    found: frozenset[tuple[str, str]]
    stops_resume: bool = True


def finished_run(tiny: Tiny, run_dir: Path) -> Path:
    """A finished run of three iterations with checkpoints 2 and 3."""
    return copy_of_run(battery_config(tiny, {"checkpoint": {"every": 2, "keep_last": 2}}), run_dir, start)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _resealed(path: Path, key: str, value: object) -> None:
    """A record that somebody has changed and sealed again."""
    write_record(path, {**read_record(path), key: value})


def _exchanged(run: Path) -> None:
    """An artifact and its manifest under the name of the ones of another iteration."""
    for ending in ("arrow", "json"):
        shutil.copy(run / f"iterations/000000/02_rollouts.{ending}", run / f"iterations/000001/02_rollouts.{ending}")


def _of(*found: tuple[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(found)


I, C = "iterations", "checkpoints"
DAMAGES = [
    *(
        Damage(f"{ending} of {stem} is flipped", lambda r, p=f"{I}/000001/{stem}.{ending}": flip(r / p),
               _of((f"{I}/000001/{stem}.{ending}", "damaged")))
        for stem in ("01_prompts", "02_rollouts", "03_scores", "04_ref_logprobs", "05_experience", "06_update")
        for ending in ("arrow", "json")
    ),
    Damage("the newest update's manifest is flipped", lambda r: flip(r / f"{I}/000002/06_update.json"),
           _of((f"{I}/000002/06_update.json", "damaged"))),
    Damage("an artifact is gone", lambda r: remove(r / f"{I}/000000/05_experience.arrow"),
           _of((f"{I}/000000/05_experience.arrow", "missing"))),
    Damage("a manifest is gone", lambda r: remove(r / f"{I}/000000/01_prompts.json"),
           _of((f"{I}/000000/01_prompts.json", "missing"))),
    Damage("an iteration is gone", lambda r: remove(r / f"{I}/000001"), _of((f"{I}/000001", "missing"))),
    Damage("an iteration stands where another was", _exchanged, _of((f"{I}/000001/02_rollouts.json", "damaged"))),
    Damage("a loop state is another", lambda r: _resealed(
        r / f"{I}/000002/06_update.json", "state",
        {**read_record(r / f"{I}/000002/06_update.json")["state"], "kl_coef": 0.5}),
        _of((f"{I}/000002/06_update.json", "damaged"), (f"{C}/000003/manifest.json", "damaged"))),
    Damage("a key is another", lambda r: _resealed(r / f"{I}/000000/04_ref_logprobs.json", "key", "0" * 64),
           _of((f"{I}/000000/04_ref_logprobs.json", "damaged"))),
    Damage("an identity is another", lambda r: _resealed(r / f"{I}/000000/03_scores.json", "identity", "0" * 64),
           _of((f"{I}/000000/03_scores.json", "damaged"))),
    Damage("weights of a checkpoint are flipped", lambda r: flip(r / f"{C}/000003/policy/model.safetensors"),
           _of((f"{C}/000003/policy/model.safetensors", "damaged"))),
    Damage("the state of a checkpoint is gone", lambda r: remove(r / f"{C}/000002/state.json"),
           _of((f"{C}/000002/state.json", "missing"))),
    Damage("the manifest of a checkpoint is flipped", lambda r: flip(r / f"{C}/000003/manifest.json"),
           _of((f"{C}/000003/manifest.json", "damaged"))),
    Damage("the manifest of a checkpoint is gone", lambda r: remove(r / f"{C}/000003/manifest.json"),
           _of((f"{C}/000003/manifest.json", "missing"))),
    Damage("weights recorded in a checkpoint are others", lambda r: _resealed(
        r / f"{C}/000003/manifest.json", "weights", "0" * 64), _of((f"{C}/000003/manifest.json", "damaged"))),
    Damage("a checkpoint is gone", lambda r: remove(r / f"{C}/000002"), _of((f"{C}/000002", "missing")),
           stops_resume=False),
    Damage("a checkpoint has another number", lambda r: (r / f"{C}/000002").rename(r / f"{C}/000009"),
           _of((f"{C}/000002", "missing"), (f"{C}/000009", "surplus"))),
    Damage("a checkpoint holds a file more", lambda r: (r / f"{C}/000003/policy/x.bin").touch(),
           _of((f"{C}/000003/policy/x.bin", "surplus"))),
    Damage("an iteration follows that was never computed", lambda r: shutil.copytree(
        r / f"{I}/000001", r / f"{I}/000007"), _of((f"{I}/000007", "surplus"))),
    Damage("a folder is a link", lambda r: (r / "elsewhere").symlink_to("/etc"), _of(("elsewhere", "surplus"))),
    Damage("the last good one is no link", lambda r: (r / f"{C}/last_good").mkdir(),
           _of((f"{C}/last_good", "damaged"))),
    Damage("the guards' record is torn", lambda r: (r / "guards.json").write_bytes(b'{"tripped":{}'),
           _of(("guards.json", "damaged"))),
    Damage("three things at once", lambda r: (
        flip(r / f"{I}/000000/03_scores.arrow"), flip(r / f"{I}/000002/04_ref_logprobs.json"),
        flip(r / f"{C}/000002/optimizer.safetensors")),
        _of((f"{I}/000000/03_scores.arrow", "damaged"), (f"{I}/000002/04_ref_logprobs.json", "damaged"),
            (f"{C}/000002/optimizer.safetensors", "damaged"))),
]  # fmt: skip
"""Damage that a repair makes good."""
