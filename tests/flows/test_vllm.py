"""Responses drawn by vLLM in a process of its own: its protocol, its weights and its misfortunes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import lives, until
from sharded_runs import config, rollouts_of
from tiny_world import Tiny
from torture.runs import fingerprint, start
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel
from vllm_python import GIVEN, vllm_python

from rlhf_core.contracts.config_io import build_config, config_digest
from rlhf_core.contracts.errors import UserError, WorkerError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.models import vllm_process
from rlhf_core.models.vllm_engine import VllmProcess, end_vllm, vllm_version
from rlhf_core.preflight import preflight
from tasks.session.session import open_session

only_the_double = pytest.mark.skipif(GIVEN is not None, reason="the misfortunes of the double")


@pytest.fixture(scope="module")
def wide(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny world with a policy whose heads are as wide as vLLM's attention on CPUs wants them."""
    narrow: Any = AutoConfig.from_pretrained(tiny.policy)
    narrow.update({"n_embd": 64, "n_head": 1})
    folder = tmp_path_factory.mktemp("wide") / "policy"
    shutil.copytree(tiny.policy, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    policy: Any = GPT2LMHeadModel(narrow)
    with torch.no_grad():
        policy.transformer.ln_f.bias.fill_(0.5)  # read by the projection: adds 0.5 x 64 x 0.1 = 3.2 to EOS's logit
        policy.transformer.wte.weight[narrow.eos_token_id] += 0.1
    policy.save_pretrained(folder)
    return replace(tiny, policy=folder)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vllm_python(tmp_path_factory.mktemp("vllm") / "environment")


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    open_session.cache_clear()
    yield
    open_session.cache_clear()
    end_vllm()


def by_vllm(wide: Tiny, python: str, *more: str) -> Any:
    tree = config(wide, None, num_shards=1).model_dump()
    given = ["generation.engine=vllm", f"generation.vllm.python={python}", "ppo.learning_rate=1e-3"]
    return build_config(tree, [*given, *more])


@pytest.fixture(scope="module")
def run_dir(wide: Tiny, python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    start(by_vllm(wide, python), path)
    return path


def gap(model: Any, run_dir: Path, iteration: int) -> float:
    """Largest difference of a stored log-prob to a model's."""
    prompts, rollouts = rollouts_of(run_dir, iteration)
    largest = 0.0
    for prompt, response, logprobs in zip(prompts, rollouts["response_tokens"], rollouts["logprobs"], strict=True):
        with torch.no_grad():
            of_all = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        own = of_all.gather(1, torch.tensor(response)[:, None])[:, 0]
        largest = max(largest, float((own - torch.tensor(logprobs)).abs().max()))
    return largest


def test_each_iteration_is_answered_with_the_weights_as_they_are_then(run_dir: Path, wide: Tiny) -> None:
    first: Any = AutoModelForCausalLM.from_pretrained(wide.policy, dtype=torch.float32).eval()
    assert gap(first, run_dir, 0) < 1e-4
    assert gap(first, run_dir, 2) > 1e-3, "two updates have moved the policy"
    gaps = [RunFolder.open(run_dir).manifests(i)["ppo_update"].metrics["sampler/logprob_gap_max"] for i in range(3)]
    assert max(gaps) < 1e-4, "as the policy that learns from them has it"


def test_responses_end_as_they_should_and_differ_from_each_other(run_dir: Path) -> None:
    limit = RunFolder.open(run_dir).config.generation.max_new_tokens
    found = [rollouts_of(run_dir, iteration)[1] for iteration in range(3)]
    for rollouts in found:
        for response, reason in zip(rollouts["response_tokens"], rollouts["finish_reason"], strict=True):
            assert len(response) == limit if reason == "length" else len(response) <= limit
    assert {reason for rollouts in found for reason in rollouts["finish_reason"]} == {"eos", "length"}
    assert len({tuple(response) for rollouts in found for response in rollouts["response_tokens"]}) > 3


def test_the_same_run_by_another_process_gives_the_same(run_dir: Path, wide: Tiny, python: str, tmp_path: Path) -> None:
    start(by_vllm(wide, python, "generation.vllm.deadline_s=900"), tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(run_dir)


@pytest.mark.slow
def test_shards_have_a_process_each_where_they_have_workers(wide: Tiny, python: str, tmp_path: Path) -> None:
    changes = ["prompts.samples_per_prompt=2", "shaping.estimator=rloo", "num_iterations=2", "execution.num_shards=2"]
    for workers in (0, 2):
        start(by_vllm(wide, python, *changes, f"execution.num_workers={workers}"), tmp_path / str(workers))
    assert fingerprint(tmp_path / "0") == fingerprint(tmp_path / "2")
    _, rollouts = rollouts_of(tmp_path / "0", 1)
    pairs = list(zip(rollouts["response_tokens"][::2], rollouts["response_tokens"][1::2], strict=True))
    assert any(first != second for first, second in pairs), "two samples of a prompt are two draws"


@only_the_double
@pytest.mark.parametrize(
    ("misfortune", "deadline_s", "told"),
    [
        ("dies", 100, "vLLM ended before it could answer the prompts: .*nothing of this stage is committed"),
        pytest.param(
            "hangs",
            20,
            r"vLLM did not answer the prompts within generation.vllm.deadline_s = 20 s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_its_end_and_its_silence_are_told(
    misfortune: str,
    deadline_s: int,
    told: str,
    wide: Tiny,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RLHF_VLLM_MISFORTUNE", misfortune)
    with pytest.raises(WorkerError, match=told):
        start(by_vllm(wide, python, f"generation.vllm.deadline_s={deadline_s}"), tmp_path / "run")
    assert "generate" not in RunFolder.open(tmp_path / "run").manifests(0)


def test_what_vllm_does_not_take_is_told_in_its_words(
    wide: Tiny, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_VLLM_MISFORTUNE", "refuses")
    with pytest.raises(UserError, match=r"generation.engine vllm could not take the policy: .*max_num_seqs.*") as told:
        start(by_vllm(wide, python, "generation.vllm.options={max_num_seqs: 0}"), tmp_path / "run")
    assert "\n" not in str(told.value)
    assert str(told.value).endswith("; use generation.engine own")


def test_it_ends_with_whoever_has_started_it(python: str) -> None:
    program = f"""
        import os, signal
        from rlhf_core.contracts.generation_config import VllmConfig
        from rlhf_core.models.vllm_engine import VllmProcess
        process = VllmProcess(VllmConfig(python={python!r}), "float32", "cpu", 1)
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=False, stdout=subprocess.PIPE, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    until(lambda: not lives(int(killed.stdout)), 60)


def test_no_environment_but_its_own_is_needed(wide: Tiny, python: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation.vllm.python is not set; give the interpreter"):
        build_config(config(wide, None, num_shards=1).model_dump(), ["generation.engine=vllm"])
    missing = str(tmp_path / "nowhere" / "python")
    for wrong, told in ((missing, "is no Python that starts"), (sys.executable, "has no vLLM in its environment")):
        with pytest.raises(UserError, match=told):
            preflight(by_vllm(wide, wrong))
    moved = by_vllm(wide, missing)
    assert config_digest(moved) == config_digest(by_vllm(wide, python)), "where it is changes no number"
    assert "vllm" not in sys.modules
    assert vllm_version(python).startswith("vllm")


@pytest.mark.slow
def test_a_process_that_died_meanwhile_is_started_again(wide: Tiny, python: str, tmp_path: Path) -> None:
    started: list[int] = []

    class Counted(VllmProcess):
        def draw(self, **request: Any) -> dict[str, Any]:
            started.append(self.pid)
            answer = super().draw(**request)
            os.kill(self.pid, signal.SIGKILL)
            until(lambda: not self.is_alive())
            return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_core.models.vllm_engine.VllmProcess", Counted)
        start(by_vllm(wide, python, "num_iterations=2"), tmp_path / "run")
    assert len(set(started)) >= 2


def test_on_a_gpu_it_gives_memory_back_between_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls that vLLM's sleep mode asks for; on a GPU itself this has not run yet."""
    calls: list[str] = []

    class Recorded:
        def __init__(self, **options: Any) -> None:
            calls.append(f"begin, sleep mode {options['enable_sleep_mode']}")

        def __getattr__(self, name: str) -> Any:
            def call(*_: Any, tags: list[str] | None = None, **__: Any) -> list[Any]:
                calls.append(" ".join([name, *(tags or [])]))
                return []

            return call

    double = types.SimpleNamespace(LLM=Recorded, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", double)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = vllm_process.Engine()
    asked: dict[str, Any] = {"prompts": [], "seeds": [], "max_new_tokens": 1, "temperature": 1.0, "eos_ids": []}
    for _ in range(2):
        engine.load(model="folder", options={})
        engine.draw(**asked)
    first = ["begin, sleep mode True", "generate", "sleep"]
    wake = ["wake_up weights", "collective_rpc", "wake_up kv_cache", "reset_prefix_cache"]
    assert calls == [*first, *wake, "generate", "sleep"]


@pytest.mark.gpu
@pytest.mark.skipif(GIVEN is None, reason="needs vLLM itself: RLHF_VLLM_PYTHON")
def test_on_a_gpu_it_answers_with_the_weights_as_they_are_then(wide: Tiny, python: str, tmp_path: Path) -> None:
    on_gpu = ["device=cuda", "policy.dtype=bfloat16", "generation.vllm.options={gpu_memory_utilization: 0.3}"]
    start(by_vllm(wide, python, *on_gpu), tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    assert all(run.manifests(i)["ppo_update"].metrics["sampler/logprob_gap_avg"] < 0.02 for i in range(3))
