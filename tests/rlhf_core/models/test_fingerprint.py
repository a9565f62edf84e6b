"""The fingerprint of a machine: the same in each process, another one under each setting that changes last bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import made_run
from tiny_world import Tiny

from rlhf_core.comparing.comparison import compare
from rlhf_core.contracts.config import RunConfig
from rlhf_core.identity import FINGERPRINT, identity_drift, machine_identity, model_digest, run_identity
from rlhf_core.models import fingerprint as module
from rlhf_core.models.devices import using_threads
from rlhf_core.models.fingerprint import fingerprint
from rlhf_core.preflight import preflight

MakeConfig = Callable[[Sequence[str]], RunConfig]
CHEAP_S = 0.2
PROGRAM = "from rlhf_core.models.fingerprint import fingerprint; print(fingerprint(1), fingerprint(2))"


def elsewhere(**settings: str) -> list[str]:
    """The fingerprints with 1 and 2 threads of a process with other settings."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **settings}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def here() -> list[str]:
    return elsewhere()


def test_it_is_the_same_in_every_process_whatever_the_environment_says_of_threads(here: list[str]) -> None:
    assert fingerprint(1) == here[0]
    assert elsewhere(OMP_NUM_THREADS="3", MKL_NUM_THREADS="1", PYTHONHASHSEED="7") == here


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"MKL_CBWR": "COMPATIBLE"}, marks=pytest.mark.skipif(
            not torch.backends.mkl.is_available(), reason="torch without MKL")),
        {"ATEN_CPU_CAPABILITY": "default"},
        pytest.param({"ONEDNN_MAX_CPU_ISA": "SSE41"}, marks=pytest.mark.skipif(
            not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")),
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_another_way_to_compute_does_not_pass_as_the_same_machine(settings: dict[str, str], here: list[str]) -> None:
    assert elsewhere(**settings)[0] != here[0]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_a_setting_of_openmp_is_seen_where_there_are_threads(here: list[str]) -> None:
    assert elsewhere(OMP_THREAD_LIMIT="1")[1] != here[1]


def test_it_is_cheap_and_computed_once_for_each_number_of_threads() -> None:
    module._fingerprint.cache_clear()
    began = time.process_time()
    first = fingerprint(1)
    assert time.process_time() - began < CHEAP_S
    assert fingerprint(1) == first
    assert module._fingerprint.cache_info().misses == 1


def test_nothing_of_the_process_is_changed() -> None:
    with using_threads(1):
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        module._fingerprint.cache_clear()
        fingerprint(2)
        assert torch.get_num_threads() == 1
        assert torch.is_grad_enabled()
        assert torch.equal(torch.random.get_rng_state(), before)
        module._fingerprint.cache_clear()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            under = fingerprint(1)
    module._fingerprint.cache_clear()
    assert fingerprint(1) == under


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 37, 24)])
def test_inputs_are_exact_numbers_without_a_pattern(shape: tuple[int, ...]) -> None:
    made = module._numbers(*shape)
    assert made.shape == shape
    assert torch.equal(made * 32_768, (made * 32_768).round())
    assert made.abs().max() <= 1
    assert len(made.unique()) == made.numel()
    assert not torch.equal(made, module._numbers(*shape, shift=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_finite_and_of_their_type(dtype: torch.dtype) -> None:
    results = list(module._results(dtype))
    assert len(results) == 9
    assert all(result.dtype is dtype and bool(result.isfinite().all()) for result in results)


def test_it_stands_in_the_identity_of_the_machine_at_the_runs_threads(tiny_config: MakeConfig) -> None:
    config = tiny_config([])
    assert machine_identity(config)[FINGERPRINT] == fingerprint(1)
    other = machine_identity(config.model_copy(update={"num_threads": 2}))
    assert other[FINGERPRINT] == fingerprint(2)


def test_another_fingerprint_is_a_drift_that_explains_itself() -> None:
    (line,) = identity_drift({"fingerprint": "a", "x": 1}, {"fingerprint": "b", "x": 1})
    assert line.startswith("fingerprint: a -> b (the same small computation gives other last bits here: another CPU")


def test_an_old_run_without_one_is_not_refused_for_that() -> None:
    assert identity_drift({"x": 1}, {"fingerprint": "b", "x": 1}) == []
    assert identity_drift({"x": 1}, {"fingerprint": "b", "x": 2}) == ["x: 1 -> 2"]


def test_with_another_number_of_threads_the_number_says_it_all() -> None:
    then, now = {"fingerprint": "a", "num_threads": 1}, {"fingerprint": "b", "num_threads": 2}
    assert identity_drift(then, now) == ["num_threads: 1 -> 2"]


def test_a_run_is_refused_on_a_machine_that_computes_otherwise(
    tiny: Tiny, tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_core.contracts.errors import DriftError
    from rlhf_core.contracts.run_folder import RunFolder
    from tasks.lifecycle.start import check_resumable

    config = tiny_config([])
    identity = run_identity(config, preflight(config).prompt_set)
    RunFolder.create(tmp_path / "run", config, identity)
    RunFolder.create(tmp_path / "old", config, {k: v for k, v in identity.items() if k != FINGERPRINT})
    monkeypatch.setattr("rlhf_core.identity.fingerprint", lambda _: "of another machine")
    with pytest.raises(DriftError, match=r"fingerprint: [0-9a-f]{32} -> of another machine \(the same small comp"):
        check_resumable(str(tmp_path / "run"), accept_drift=False)
    assert check_resumable(str(tmp_path / "old"), accept_drift=False) == config


def test_runs_that_are_compared_differ_by_it_where_threads_do_not_explain_it(tmp_path: Path) -> None:
    def note(name: str, *identities: dict[str, Any]) -> list[str]:
        paths = [tmp_path / f"{name}{i}" for i in range(len(identities))]
        for path, identity in zip(paths, identities, strict=True):
            made_run(path, [1.0], identity=identity)
        return [line for line in compare(paths).notes if line.startswith(FINGERPRINT)]

    assert len(note("a", {FINGERPRINT: "x"}, {FINGERPRINT: "y"})) == 1
    assert note("b", {FINGERPRINT: "x", "num_threads": 1}, {FINGERPRINT: "y", "num_threads": 2}) == []
    assert note("c", {FINGERPRINT: "x"}, {}) == []


def test_additional_chat_templates_are_in_the_identity_of_a_run(
    tiny: Tiny, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    policy = Path(shutil.copytree(tiny.policy, tmp_path / "policy"))
    config = tiny_config([f"policy.model={policy}"])
    prompt_set, found = preflight(config).prompt_set, list[Any]()
    for text in (None, "{{ messages }}", "{{ messages[0] }}"):
        if text is not None:
            (policy / "additional_chat_templates").mkdir(exist_ok=True)
            (policy / "additional_chat_templates/rag.jinja").write_text(text)
        model_digest.cache_clear()
        found.append(run_identity(config, prompt_set)["models"]["policy"])
    assert len(set(found)) == 3
