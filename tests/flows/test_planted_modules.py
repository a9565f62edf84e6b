"""``cd RUN && rlhf resume .``: Python files of a run folder are no modules, in the command nor in what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chores import write_down
from damage import finished_run
from strangers import chdir_into
from tiny_world import Tiny

from flows.child_processes import RLHF, Child
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import RlhfError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.search_path import ROOT, settle_search_path
from rlhf_core.contracts.update_config import UpdateConfig
from rlhf_core.evaluation.request import Request
from rlhf_core.models import templates
from rlhf_core.models.vllm_engine import vllm_version
from rlhf_core.rewards.imports import make_importable
from tasks.evaluation.evaluate import check_evaluation
from tasks.lifecycle.start import check_resumable
from tasks.ranks.group import RankGroup
from tasks.replay.iteration import replay_iteration
from tasks.session.session import open_session
from tasks.shards.local_workers import LocalWorkers

NAMES = (
    "torch", "sitecustomize", "usercustomize", "multiprocessing", "uvicorn", "numpy", "typer", "rich", "prefect",
    "transformers", "pyarrow", "pydantic", "flash_attn", "ray", "mlflow", "vllm", "json", "tasks", "flows",
    "rlhf_core", "shutil", "tempfile", "jinja2", "cloudpickle", "apex", "kernels", "xformers",
)  # fmt: skip
"""Of libraries, of optional ones that are not installed, of Python's own and of this package."""
HERE = os.pathsep.join(("", ".", "iterations/.."))
"""Entries of PYTHONPATH that mean the working folder."""


@pytest.fixture(scope="module")
def honest(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = finished_run(tiny, tmp_path_factory.mktemp("honest") / "run")
    mark = run.parent / "mark"
    for name in NAMES:
        code = f"open({str(mark)!r}, 'a').write(__file__ + '\\n')\n"
        (run / f"{name}.py").write_text(code)
    return run


@pytest.fixture
def run(honest: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with PYTHONPATH as people write it: ``PYTHONPATH=.:$PYTHONPATH``."""
    chdir_into(monkeypatch, honest)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((HERE, ROOT, str(Path(ROOT) / "tests"))))
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_ENABLED", "false")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(honest)])
    open_session.cache_clear()
    yield honest
    open_session.cache_clear()
    planted = honest.parent / "mark"
    assert not planted.exists(), planted.read_text()


def test_this_process(run: Path) -> None:
    settle_search_path()
    assert str(run) not in sys.path
    make_importable(None)
    make_importable(str(run))
    assert str(run) not in sys.path, "a run folder holds no reward function either"
    check_resumable(".", accept_drift=False)
    check_evaluation(Request(".", num_prompts=2, samples=2, frontier_samples=64), None)
    replay_iteration(".", 2)


def test_the_command(run: Path) -> None:
    """As a person types it: not even what is imported first comes from here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((ROOT, str(Path(ROOT) / "tests")))}
    for command in (["-c", RLHF[-1]], ["-m", "flows.cli"]):
        found = subprocess.run(
            [sys.executable, *(["-P"] if command[0] == "-c" else []), *command, "resume", "."],
            env=environment | ({"PYTHONSAFEPATH": "1"} if command[0] == "-m" else {}),
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr


def test_a_run_of_a_sweep_and_a_server_of_ui(run: Path, tmp_path: Path) -> None:
    for number, environment in enumerate((None, dict(os.environ))):
        child = Child([*RLHF, "inspect", "."], tmp_path / f"{number}.log", environment)
        until = time.monotonic() + 60
        while (code := child.poll()) is None and time.monotonic() < until:
            time.sleep(0.05)
        assert code == 0, child.last_lines(20)


def test_a_template(run: Path) -> None:
    templates._check.cache_clear()
    templates.check_template("{{ messages[0].content }}", [{"role": "user", "content": "a"}], "a template")


def test_workers_of_shards(run: Path, tmp_path: Path) -> None:
    there = LocalWorkers(1)
    try:
        there.call("generate", "a note", write_down, tmp_path / "note")
    finally:
        there.close()
    assert (tmp_path / "note").is_file()


def test_torchrun_and_its_ranks(run: Path) -> None:
    group = RankGroup(UpdateConfig(launcher="torchrun", nproc_per_node=1, deadline_s=60.0), "cpu", 1)
    try:
        group._start()
        assert len(group.process_ids()) == 1
    finally:
        group.end()


def test_vllm(run: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n{sys.executable} -c "import torch, vllm" 2> /dev/null\necho vllm 0.0\n')
    python.chmod(0o755)
    assert vllm_version(str(python)) == "vllm 0.0", "and what it starts in turn"


@pytest.mark.parametrize("module", ["uvicorn", "prefect", "mlflow"])
def test_servers_that_libraries_start_inherit_it(module: str, run: Path) -> None:
    """Prefect's temporary server and MLflow's are `python -m uvicorn` with the environment of this process."""
    settle_search_path()
    find = f"import importlib.util; print(importlib.util.find_spec({module!r}).origin)"
    for command in (["-c", find], ["-m", module, "--version"]):
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=120)
        assert str(run) not in found.stdout


@pytest.mark.slow
def test_prefects_temporary_server(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_ENABLED", "true")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    child = Child([*RLHF, "resume", "."], run.parent / "resume.log")
    while (code := child.poll()) is None:
        time.sleep(0.1)
    assert code == 0, child.last_lines(20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_workers_of_ray(run: Path, tmp_path: Path, tiny: Tiny) -> None:
    from sharded_runs import config

    from tasks.ray.workers import RayWorkers

    tree = config(tiny, 1, num_shards=2).model_dump()
    tree["execution"] |= {"engine": "ray"}
    of_ray = RunFolder.open(run)
    there = RayWorkers(RunFolder(of_ray.path.absolute(), build_config(tree), of_ray.identity))
    try:
        there.call("generate", "a note", write_down, tmp_path / "note")
    finally:
        there.close()
    assert (tmp_path / "note").is_file()


def test_a_reward_function_of_a_run_folder_is_refused_before_its_import(run: Path, tiny: Tiny) -> None:
    from iteration import tiny_tree

    from rlhf_core.preflight import preflight

    (run / "mine_in_a_run.py").write_text((run / "torch.py").read_text())
    given = {"kind": "function", "function": "mine_in_a_run:score", "folder": str(run)}
    with pytest.raises(RlhfError) as told:
        preflight(build_config(tiny_tree(tiny) | {"reward": {"components": [given]}}))
    assert isinstance(told.value, UserError)
    assert "mine_in_a_run" in str(told.value)
