"""The disk use that is predicted is that of real runs, within a quarter, where responses have full length."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Tiny
from torture.runs import start

from rlhf_core.contracts.compaction import loose_iterations
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.disk_use import DiskUse, free_bytes, predict_disk_use
from rlhf_core.preflight import preflight

WITHIN = 0.25
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def endless(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy, but one that never writes EOS: every response has full length."""
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny.policy, tmp_path_factory.mktemp("endless") / "policy"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.wte.weight[model.config.eos_token_id] -= 1.0
    model.save_pretrained(folder)
    return folder


def bytes_of(*folders: Path) -> int:
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "changes",
    [
        ["prompts.batch_size=32", "generation.max_new_tokens=40", "prompts.max_len=20"],
        ["generation.top_k=5", "generation.max_new_tokens=20", "prompts.max_len=20"],
        ["shaping.estimator=rloo", "prompts.samples_per_prompt=4", "prompts.batch_size=16"],
        ["policy.lora.rank=2", "ppo.num_ppo_epochs=8"],
        ["policy.lora.rank=2", "policy.lora.save=merged", "policy.critic.kind=shared", "policy.critic.init=null"],
    ],
)
def test_a_run_takes_what_was_predicted(
    changes: Sequence[str], tiny_config: Callable[..., RunConfig], endless: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        [f"policy.model={endless}", "num_iterations=4", "checkpoint.every=2", "artifacts.keep_iterations=1", *changes]
    )
    predicted = predict_disk_use(config, preflight(config))
    start(config, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    lens = [run.manifests(i)["generate"].metrics["rollout/response_len"] for i in range(4)]
    assert lens == [config.generation.max_new_tokens] * 4
    assert loose_iterations(run.path) == [2, 3]
    assert (predicted.loose, predicted.archived, predicted.checkpoints) == (2, 2, 2)
    near = {
        "iteration": (predicted.iteration, bytes_of(run.path / "iterations") / 2),
        "archived": (predicted.archived_iteration, bytes_of(run.path / "archive") / 2),
        "checkpoint": (predicted.checkpoint, bytes_of(run.checkpoint_path(4))),
        "run": (predicted.run, bytes_of(run.path)),
    }
    assert {name: round(a / b, 2) for name, (a, b) in near.items() if abs(a / b - 1) > WITHIN} == {}


def test_a_large_batch_is_extrapolated_by_rows(tiny_config: Callable[..., RunConfig]) -> None:
    def iteration(batch: int) -> int:
        config = tiny_config(
            [f"prompts.batch_size={batch}", f"prompts.samples_per_prompt={batch // 8}", "kl.controller=fixed"]
        )
        return predict_disk_use(config, preflight(config)).iteration

    few, many, more = (iteration(batch) for batch in (64, 6400, 12800))
    assert 40 * few < many < 100 * few
    assert (more - many) / (many - few) == pytest.approx(6400 / 6336, rel=0.01)


def test_only_so_many_checkpoints_count_as_there_are_at_a_time(tiny_config: Callable[..., RunConfig]) -> None:
    def checkpoints(*changes: str) -> int:
        config = tiny_config(["num_iterations=100", "checkpoint.every=10", *changes])
        return predict_disk_use(config, preflight(config)).checkpoints

    assert checkpoints() == 2 + 1 + 1  # keep_last, the best, and the new one before an old one goes
    assert checkpoints("checkpoint.keep_best=false", "checkpoint.keep_last=5") == 6
    assert checkpoints("checkpoint.every=60") == 2
    assert checkpoints("checkpoint.keep_last=1", "guards.kl_ceiling.action=stop", "guards.kl_ceiling.threshold=9") == 5


def test_the_archive_makes_a_long_run_smaller(tiny_config: Callable[..., RunConfig]) -> None:
    def predicted(keep: str) -> DiskUse:
        config = tiny_config(["num_iterations=1000", f"artifacts.keep_iterations={keep}", "prompts.batch_size=32"])
        return predict_disk_use(config, preflight(config))

    loose, archived, all_loose = predicted("null"), predicted("50"), predicted("600")
    assert (loose.loose, loose.archived) == (1000, 0)
    assert (archived.loose, archived.archived) == (100, 900)
    assert (all_loose.loose, all_loose.archived) == (1000, 0)
    assert archived.archived_iteration < 0.8 * loose.iteration
    assert archived.run < 0.85 * loose.run


def test_free_space_is_that_of_the_disk_the_run_will_be_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or Usage(9, 2, 7))
    assert free_bytes(tmp_path / "not" / "yet") == 7
    assert asked == [tmp_path]
