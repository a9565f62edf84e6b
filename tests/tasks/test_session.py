"""Models in memory: one copy of equal weights, frozen ones sent away between stages, and LoRA runs that resume."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_sft_adapter
from iteration import tiny_tree

from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import DriftError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.identity import model_digest
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.preflight import preflight
from tasks.generate import generate
from tasks.lifecycle.start import check_resumable, save_due_checkpoint, start_run
from tasks.ppo_update import ppo_update
from tasks.reference_logprobs import reference_logprobs
from tasks.sample_prompts import sample_prompts
from tasks.score_rewards import score_rewards
from tasks.session.session import Session, open_session
from tasks.shape_rewards import shape_rewards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sft(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sft_adapter(tiny.policy, tmp_path_factory.mktemp("sft") / "sft")


def tree(tiny: Any) -> dict[str, Any]:
    return tiny_tree(tiny) | {
        "policy": {"model": str(tiny.policy), "critic": {"kind": "shared"}},
        "checkpoint": {"every": 2},
    }


def begin(tiny: Any, run_dir: Path, *overrides: str) -> Session:
    start_run(build_config(tree(tiny), overrides), str(run_dir))
    return open_session(str(run_dir))


def play(run_dir: Path, before_stage: Callable[[], object] = lambda: None) -> None:
    """The iterations that are missing, as the flow plays them, without its server."""
    folder = RunFolder.open(run_dir)
    for iteration in range(folder.num_finished(), 3):
        done: dict[str, Any] = {}
        before_stage()
        save_due_checkpoint.fn(str(run_dir), iteration)
        for task, inputs in (
            (sample_prompts, ()),
            (generate, ("sample_prompts",)),
            (score_rewards, ("sample_prompts", "generate")),
            (reference_logprobs, ("sample_prompts", "generate")),
            (shape_rewards, ("sample_prompts", "generate", "score_rewards", "reference_logprobs")),
            (ppo_update, ("sample_prompts", "generate", "shape_rewards")),
        ):
            before_stage()
            done[task.name] = task.fn(str(run_dir), iteration, *(done[name] for name in inputs))
    before_stage()
    save_due_checkpoint.fn(str(run_dir), 3)


def digests(run_dir: Path, pattern: str = "*") -> dict[str, str]:
    """sha256 of every artifact and checkpoint file."""
    files = [*run_dir.glob("iterations/*/*.arrow"), *(p for p in run_dir.glob("checkpoints/**/*") if p.is_file())]
    found = {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}
    return {path: digest for path, digest in found.items() if Path(path).match(pattern)}


@pytest.fixture(scope="module")
def lora_run(tiny: Any, sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains a copy of an SFT adapter, never stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    begin(tiny, run_dir, f"policy.adapter={sft}")
    play(run_dir)
    return run_dir


def test_kl_is_zero_at_iteration_0_alone(lora_run: Path) -> None:
    run = RunFolder.open(lora_run)
    kl = [run.manifests(i)["shape_rewards"].metrics["objective/kl"] for i in range(3)]
    assert abs(kl[0]) < 1e-5
    assert kl[2] > 1e-3


def test_every_stage_could_run_in_a_process_of_its_own(lora_run: Path, tiny: Any, sft: Path, tmp_path: Path) -> None:
    """Nothing in memory from stage to stage: trunk, adapters and optimizer come from the run folder each time."""
    begin(tiny, tmp_path / "run", f"policy.adapter={sft}")
    play(tmp_path / "run", before_stage=open_session.cache_clear)
    assert digests(tmp_path / "run") == digests(lora_run)


def test_a_killed_lora_run_resumes_to_the_same_digests(lora_run: Path, tiny: Any, sft: Path, tmp_path: Path) -> None:
    """SIGKILL at the commit of an update, before the first checkpoint; another process goes on."""
    run_dir, script, manifest = tmp_path / "run", tmp_path / "run.py", "06_update.json"
    begin(tiny, run_dir, f"policy.adapter={sft}")
    script.write_text(
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "import rlhf_core.contracts.durable as durable\n"
        "torch.set_num_threads(1)\n"
        "write = durable.Disk.rename\n"
        "def rename_then_die(disk, source, path):\n"
        "    write(disk, source, path)\n"
        f"    if path.parent.name == '000001' and path.name == {manifest!r}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "durable.Disk.rename = rename_then_die\n"
        "from test_session import play\n"
        f"play(Path({str(run_dir)!r}))\n"
    )
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "1"}
    died = subprocess.run([sys.executable, str(script)], env=environment, check=False, timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert (run_dir / "iterations/000001" / manifest).exists()
    assert not (run_dir / "iterations/000002").exists()
    open_session.cache_clear()
    check_resumable(str(run_dir), accept_drift=False)
    play(run_dir)
    assert digests(run_dir) == digests(lora_run)


def test_another_adapter_in_the_same_folder_is_drift(tiny: Any, sft: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sft, tmp_path / "sft")
    begin(tiny, tmp_path / "run", f"policy.adapter={folder}")
    check_resumable(str(tmp_path / "run"), accept_drift=False)
    shutil.copytree(save_sft_adapter(tiny.policy, tmp_path / "other", seed=9), folder, dirs_exist_ok=True)
    model_digest.cache_clear()
    with pytest.raises(DriftError, match=r"models\.policy\.adapter: .*\n.*models\.reference\.adapter: "):
        check_resumable(str(tmp_path / "run"), accept_drift=False)
    identity = RunFolder.open(tmp_path / "run").identity
    assert "peft" in identity["versions"]


def test_a_merged_run_goes_on_from_the_adapter_beside_it(tiny: Any, sft: Path, tmp_path: Path) -> None:
    settings = [f"policy.adapter={sft}", "policy.lora.save=merged", "policy.gradient_checkpointing=true"]
    begin(tiny, tmp_path / "whole", *settings)
    play(tmp_path / "whole")
    begin(tiny, tmp_path / "stopped", *settings)
    with pytest.raises(InterruptedError):
        play(tmp_path / "stopped", before_stage=_interrupt_after(tmp_path / "stopped/checkpoints/000002"))
    open_session.cache_clear()
    play(tmp_path / "stopped")
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    checkpoint = tmp_path / "whole/checkpoints/000003"
    assert {p.name for p in (checkpoint / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (checkpoint / "policy/model.safetensors").exists()


def _interrupt_after(checkpoint: Path) -> Callable[[], None]:
    def interrupt() -> None:
        if checkpoint.exists():
            raise InterruptedError

    return interrupt


def test_reference_and_policy_have_one_trunk(tiny: Any, tmp_path: Path) -> None:
    session = begin(tiny, tmp_path / "run", "policy.lora.rank=4")
    reference = session.models.reference
    trainer = session.policy.trainer(0)
    assert reference.model is trainer.actor_critic.policy.model, "also when the reference is asked for first"
    assert session.models.reference.model is reference.model
    play(tmp_path / "run")
    assert session.policy.trainer(3) is trainer
    assert session.models.reference.model is trainer.actor_critic.policy.model
    plain = begin(tiny, tmp_path / "plain")
    assert plain.models.reference.model is not plain.policy.trainer(0).actor_critic.policy.model


def test_the_reference_has_all_threads_where_no_model_scores_beside_it(tiny: Any, tmp_path: Path) -> None:
    with_model = begin(tiny, tmp_path / "model", "num_threads=4")
    stages = ("score_rewards", "reference_logprobs", "generate")
    assert [with_model.threads_of(stage) for stage in stages] == [2, 2, 4]
    with_function = begin(
        tiny, tmp_path / "function", "num_threads=4", "reward.components.0={kind: function, function: length}"
    )
    assert with_function.threads_of("reference_logprobs") == 4


def test_an_earlier_trainer_is_loaded_anew_and_the_reference_follows(lora_run: Path) -> None:
    open_session.cache_clear()
    session = open_session(str(lora_run))
    late, expected = session.policy.trainer(3), session.policy_digest(2)
    early = session.policy.trainer(2)
    assert early is not late
    assert early.digest() == expected
    assert session.models.reference.model is early.actor_critic.policy.model


def test_the_trainer_that_comes_with_a_reference_has_its_weights(lora_run: Path) -> None:
    open_session.cache_clear()
    session = open_session(str(lora_run))
    assert session.models.reference.model is session.policy.trainer(3).actor_critic.policy.model
    assert session.policy.trainer(3).digest() == session.policy_digest(3)


@pytest.fixture(scope="module")
def plain_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of whole weights that keeps its frozen models."""
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    begin(tiny, run_dir)
    play(run_dir)
    return run_dir


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_sending_frozen_models_away_changes_no_number(where: str, plain_run: Path, tiny: Any, tmp_path: Path) -> None:
    begin(tiny, tmp_path / "run", f"frozen_models={where}")
    play(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(plain_run)


def frozen_modules(session: Session) -> list[Any]:
    """The transformers models behind reference and reward model."""
    return [session.models.reference.model, session.models.reward_components[0].model]  # pyright: ignore[reportAttributeAccessIssue]


def test_on_disk_nothing_is_in_memory_between_stages(tiny: Any, tmp_path: Path) -> None:
    session = begin(tiny, tmp_path / "run", "frozen_models=disk")
    alive = [weakref.ref(module) for module in frozen_modules(session)]
    for stage in ("generate", "reference_logprobs"):
        session.models.stage_done(stage)
    gc.collect()
    assert [ref() is None for ref in alive] == [True, False], "each with its own stage"
    session.models.stage_done("score_rewards")
    gc.collect()
    assert alive[1]() is None
    assert all(p.device.type == "cpu" for module in frozen_modules(session) for p in module.parameters())


def test_a_stage_sends_its_models_away_also_when_it_fails(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(tiny, tmp_path / "run", "frozen_models=disk")
    alive: list[Any] = []

    def fail(reference: LanguageModel, *_: Any, **__: Any) -> None:
        alive.append(weakref.ref(reference.model))
        raise InterruptedError

    monkeypatch.setattr("rlhf_core.stages.reference_logprobs.reference_logprobs", fail)
    prompts = sample_prompts.fn(str(tmp_path / "run"), 0)
    rollouts = generate.fn(str(tmp_path / "run"), 0, prompts)
    with pytest.raises(InterruptedError):
        reference_logprobs.fn(str(tmp_path / "run"), 0, prompts, rollouts)
    gc.collect()
    assert alive[0]() is None
    assert session.models.reference.model is not None


def test_in_cpu_memory_they_move_there_and_back(tiny: Any, tmp_path: Path) -> None:
    """Seen on the meta device, which every machine has: whatever is not on it has been moved."""
    session = begin(tiny, tmp_path / "run", "frozen_models=cpu")
    modules = frozen_modules(session)
    session.device = torch.device("meta")
    assert frozen_modules(session) == modules
    assert all(p.device.type == "meta" for module in modules for p in module.parameters())
    session.device = torch.device("cpu")


@pytest.mark.gpu
def test_on_a_gpu_they_leave_it_between_stages(tiny: Any, tmp_path: Path) -> None:
    session = begin(tiny, tmp_path / "run", "frozen_models=cpu", "device=cuda")
    modules = frozen_modules(session)
    assert all(p.device.type == "cuda" for module in modules for p in module.parameters())
    session.models.stage_done("score_rewards")
    session.models.stage_done("reference_logprobs")
    assert all(p.device.type == "cpu" for module in modules for p in module.parameters())
    assert all(p.device.type == "cuda" for module in frozen_modules(session) for p in module.parameters())


def test_components_that_name_one_folder_share_its_weights(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny.reward)
    components = [
        {"kind": "model", "model": str(tiny.reward)},
        {"kind": "model", "model": str(tmp_path / "link"), "name": "again", "batch_size": 2},
        {"kind": "model", "model": str(tiny.reward), "name": "rounded", "dtype": "bfloat16"},
    ]
    session = begin(tiny, tmp_path / "run", f"reward.components={json.dumps(components)}")
    first, again, rounded = (component.model for component in session.models.reward_components)  # pyright: ignore
    assert first is again
    assert first is not rounded
    one = preflight(build_config(tree(tiny)))
    twice = json.dumps([components[0], components[0] | {"name": "b"}])
    two = preflight(build_config(tree(tiny), [f"reward.components={twice}"]))
    assert two.memory_bytes == one.memory_bytes


def test_a_plan_tells_what_sending_away_is_worth(tiny: Any) -> None:
    def plan(*overrides: str) -> Any:
        return preflight(build_config(tree(tiny), overrides))

    keep, disk, cpu = plan(), plan("frozen_models=disk"), plan("frozen_models=cpu")
    assert keep.peak_bytes == sum(keep.memory_bytes.values()) == cpu.peak_bytes
    frozen = keep.memory_bytes["reference"] + keep.memory_bytes["reward models"]
    update = keep.memory_bytes["activations of a micro-batch"] + keep.memory_bytes["logits held at a time"]
    assert disk.peak_bytes == keep.peak_bytes - min(frozen, update)
    assert disk.notes == ["frozen models leave the device between their stages (frozen_models disk)"]
    assert cpu.notes[0].startswith("frozen_models cpu changes nothing on a CPU")
    recomputed = plan("policy.gradient_checkpointing=true")
    name = "activations of a micro-batch"
    assert recomputed.memory_bytes[name] < keep.memory_bytes[name]
