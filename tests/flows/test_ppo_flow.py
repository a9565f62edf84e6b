"""The flow on a real Prefect server: its artifacts, its exact trace, and a run that is stopped and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from iteration import tiny_tree

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import DriftError, NumericalError, RunLockedError, UserError
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.schemas import SCHEMA_VERSION
from rlhf_core.contracts.stage_graph import FILE_STEMS, SCHEMAS

Configure = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]


def digests(run_dir: Path) -> dict[str, str]:
    """sha256 of every artifact and checkpoint file of a run."""
    files = [*run_dir.glob("iterations/*/*.arrow"), *(p for p in run_dir.glob("checkpoints/**/*") if p.is_file())]
    return {str(p.relative_to(run_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A finished run of three iterations with a checkpoint after each second one."""
    from flows.ppo import train
    from rlhf_core.contracts.config_io import build_config

    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(build_config(tree(tiny)), str(run_dir))
    return run_dir


def tree(tiny: Any) -> dict[str, Any]:
    return tiny_tree(tiny) | {
        "policy": {"model": str(tiny.policy), "critic": {"init": "reward"}},
        "kl": {"horizon": 50.0, "target": 0.5},
        "checkpoint": {"every": 2},
    }


def test_every_stage_of_every_iteration_left_an_artifact_and_its_manifest(finished: Path) -> None:
    run = RunFolder.open(finished)
    assert run.num_finished() == 3
    for iteration in range(3):
        folder = finished / "iterations" / f"{iteration:06d}"
        expected = {f"{stem}{ending}" for stem in FILE_STEMS.values() for ending in (".arrow", ".json")}
        assert {p.name for p in folder.iterdir()} == expected
        for stage, manifest in run.manifests(iteration).items():
            table = read_artifact(finished, manifest.artifact)
            assert table.schema.equals(SCHEMAS[stage])
            assert manifest.artifact.rows == table.num_rows == (4 if stage == "ppo_update" else 8)
            metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
            assert metadata["rlhf.schema"] == f"{stage}/{SCHEMA_VERSION}"
            assert metadata["rlhf.iteration"] == str(iteration)
            assert json.loads(metadata["rlhf.inputs"]).keys()
    assert run.checkpoints() == [2, 3]


def test_lineage_names_the_digest_of_each_input(finished: Path) -> None:
    for iteration in range(3):
        manifests = RunFolder.open(finished).manifests(iteration)
        sha = {stage: manifest.artifact.sha256 for stage, manifest in manifests.items()}
        assert manifests["generate"].inputs["prompts"] == sha["sample_prompts"]
        assert manifests["score_rewards"].inputs["rollouts"] == sha["generate"]
        assert manifests["reference_logprobs"].inputs["rollouts"] == sha["generate"]
        assert manifests["shape_rewards"].inputs["scores"] == sha["score_rewards"]
        assert manifests["shape_rewards"].inputs["ref_logprobs"] == sha["reference_logprobs"]
        assert manifests["ppo_update"].inputs["experience"] == sha["shape_rewards"]


def test_kl_is_zero_at_iteration_0_and_grows(finished: Path) -> None:
    shaped = [RunFolder.open(finished).manifest("shape_rewards", i) for i in range(3)]
    kl = [manifest.metrics["objective/kl"] for manifest in shaped if manifest is not None]
    assert abs(kl[0]) < 1e-3
    assert kl[2] > 0.01


def test_beta_follows_the_controller_and_is_carried_on(finished: Path) -> None:
    """β <- β (1 + clip(KL / target - 1, ±0.2) · n / horizon), worked out here."""
    run = RunFolder.open(finished)
    for iteration in range(3):
        before, after = run.state_before(iteration), run.state_before(iteration + 1)
        shaped = run.manifest("shape_rewards", iteration)
        assert shaped is not None
        assert shaped.metrics["kl/beta"] == before.kl_coef
        error = min(max(shaped.metrics["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after.kl_coef == pytest.approx(before.kl_coef * (1 + error * 8 / 50), rel=1e-12)
        assert after.episodes == 8 * (iteration + 1)


def test_the_result_of_a_run_is_a_picture_a_page_and_a_comparison(finished: Path) -> None:
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "view.html").read_bytes().startswith(b"<!doctype html>")
    samples = json.loads((finished / "before_after.json").read_text())["samples"]
    assert len(samples) == 5
    assert any(row["before"] != row["after"] for row in samples)


def test_two_runs_are_equal_digest_for_digest(finished: Path, tiny: Any, tmp_path: Path) -> None:
    from flows.ppo import train
    from rlhf_core.contracts.config_io import build_config

    train(build_config(tree(tiny)), str(tmp_path / "again"))
    assert digests(tmp_path / "again") == digests(finished)


def test_the_trace_is_exactly_the_committed_one_on_this_machine(finished: Path) -> None:
    """A refactor keeps these numbers. They depend on library versions and processor, so elsewhere: close."""
    golden = json.loads((Path(__file__).parent / "trace.json").read_text())
    run = RunFolder.open(finished)
    trace = [
        {name: run.manifests(i)[stage].metrics[name] for name, stage in golden["metrics"].items()} for i in range(3)
    ]
    same = run.identity["versions"] == golden["versions"] and processor() == golden["processor"]
    for ours, theirs in zip(trace, golden["trace"], strict=True):
        assert ours == (theirs if same else pytest.approx(theirs, rel=0.02, abs=2e-3))


def processor() -> str:
    """The CPU, exactly: matrix libraries choose their kernels by it."""
    if not Path("/proc/cpuinfo").exists():
        return "unknown"
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    facts = dict(line.replace("\t", "").split(": ", 1) for line in first if ": " in line)
    return ", ".join(facts.get(name, "?") for name in ("vendor_id", "cpu family", "model", "stepping", "cache size"))


KILL_AFTER = {
    "in the middle of an iteration": ("000001", "02_rollouts.json"),
    "between the side-by-side stages and the update": ("000001", "05_experience.json"),
    "after an update, before its checkpoint": ("000001", "06_update.json"),
    "before the first checkpoint": ("000000", "03_scores.json"),
}


@pytest.mark.parametrize("iteration_and_file", KILL_AFTER.values(), ids=KILL_AFTER.keys())
def test_a_killed_run_resumes_to_the_same_digests(
    iteration_and_file: tuple[str, str], finished: Path, tiny: Any, tmp_path: Path
) -> None:
    """A process of its own is killed with SIGKILL by the write of a manifest; another one resumes it."""
    from flows.ppo import resume

    run_dir = tmp_path / "killed"
    script = tmp_path / "run.py"
    script.write_text(
        "import json, os, signal, sys\n"
        "from pathlib import Path\n"
        "from rlhf_core.contracts.durable import Disk\n"
        "rename = Disk.rename\n"
        "def rename_then_die(disk, source, path):\n"
        "    rename(disk, source, path)\n"
        f"    if path.parent.name == {iteration_and_file[0]!r} and path.name == {iteration_and_file[1]!r}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Disk.rename = rename_then_die\n"
        "import torch; torch.set_num_threads(1)\n"
        "from rlhf_core.contracts.config_io import build_config\n"
        "from flows.ppo import train\n"
        f"train(build_config(json.loads({json.dumps(tree(tiny))!r})), {str(run_dir)!r})\n"
    )
    from prefect.settings import PREFECT_API_URL

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    died = subprocess.run([sys.executable, str(script)], env=environment, check=False, timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert digests(run_dir) != digests(finished)
    resume(str(run_dir))
    assert digests(run_dir) == digests(finished)


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    from flows.ppo import resume

    before = digests(finished)
    resume(str(finished))
    assert digests(finished) == before


def test_a_damaged_artifact_is_computed_again(finished: Path, tiny: Any, tmp_path: Path) -> None:
    """The last iteration's scores rot on disk before its update is committed."""
    import shutil

    from flows.ppo import resume

    run_dir = shutil.copytree(finished, tmp_path / "damaged")
    (run_dir / "iterations/000002/06_update.json").unlink()
    shutil.rmtree(run_dir / "checkpoints/000003")
    scores = run_dir / "iterations/000002/03_scores.arrow"
    data = bytearray(scores.read_bytes())
    data[len(data) // 2] ^= 1
    scores.write_bytes(data)
    resume(str(run_dir))
    assert digests(run_dir) == digests(finished)


def test_drift_is_refused_with_a_readable_difference(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from tasks.lifecycle import start as lifecycle

    run_dir = shutil.copytree(finished, tmp_path / "moved")
    here = RunFolder.open(run_dir).identity
    moved = {**here, "versions": {**here["versions"], "torch": "99.0"}}
    monkeypatch.setattr(lifecycle, "run_identity", lambda *_: moved)
    with pytest.raises(DriftError, match=r"versions\.torch: .* -> 99\.0\n.*--accept-drift"):
        lifecycle.check_resumable(str(run_dir), accept_drift=False)
    assert lifecycle.check_resumable(str(run_dir), accept_drift=True).seed == 7


def test_a_second_run_on_the_folder_is_refused(finished: Path, tiny: Any) -> None:
    from flows.ppo import resume, train
    from rlhf_core.contracts.config_io import build_config

    with pytest.raises(UserError, match="already holds a run; continue it with `rlhf resume"):
        train(build_config(tree(tiny)), str(finished))
    with RunFolder.open(finished).locked(), pytest.raises(RunLockedError, match="another process"):
        resume(str(finished))


def test_a_score_that_is_not_finite_stops_the_run_in_one_sentence_and_leaves_it_resumable(
    tiny: Any, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.ppo import train
    from rlhf_core.contracts.config_io import build_config

    (tmp_path / "overflowing.py").write_text("def score(responses, **_):\n    return [float('inf')] * len(responses)\n")
    monkeypatch.syspath_prepend(tmp_path)
    component = {"kind": "function", "function": "overflowing:score"}
    config = build_config({**tree(tiny), "reward": {"components": [component]}}, ["policy.critic.init=policy"])
    with pytest.raises(NumericalError, match="reward component reward0 gave inf"):
        train(config, str(tmp_path / "run"))
    names = {p.name for p in (tmp_path / "run/iterations/000000").iterdir()}
    assert "03_scores.arrow" not in names
    assert "02_rollouts.json" in names


def test_the_flow_form_refuses_bad_values() -> None:
    """What the Prefect UI validates: the flow's parameter is the config model itself."""
    from prefect.exceptions import ParameterTypeError

    from flows.ppo import train

    schema = train.parameters.model_dump()
    assert "RunConfig" in schema["definitions"]
    with pytest.raises(ParameterTypeError, match=r"kl\.target"):
        train.validate_parameters({"config": {"kl": {"target": -1.0}}})
