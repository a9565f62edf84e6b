"""`rlhf evaluate` on a real Prefect server: what it writes and uses again, what reaches MLflow, what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from flows.cli import EXIT_MISTAKE, main
from rlhf_core.contracts.config_io import build_config, config_template
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.evaluation.folder import FRONTIER, SIDE_BY_SIDE, EvaluationFolder

if TYPE_CHECKING:
    from tiny_world import Tiny

UNTRACKED = ("--set", "tracking.enabled=false")
FEW = ("--num-prompts", "6", "--samples", "4", "--frontier-samples", "40")
ENTRY = "prompts-eval"


def tree(tiny: Any) -> dict[str, Any]:
    return {
        "num_iterations": 3,
        "device": "cpu",
        "num_threads": 1,
        "prompts": {"source": str(tiny.prompts), "batch_size": 8},
        "policy": {"model": str(tiny.policy), "critic": {"kind": "shared"}},
        "reward": {"components": [{"kind": "model", "model": str(tiny.reward)}]},
        "generation": {"max_new_tokens": 4},
        "kl": {"coef": 0.01},
        "ppo": {"num_ppo_epochs": 2, "num_minibatches": 1, "learning_rate": 3e-3},
        "checkpoint": {"every": 1, "keep_last": 2, "keep_best": False},
    }


@pytest.fixture(scope="module")
def run(tiny: Any, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A finished run with the checkpoints 2 and 3, in MLflow; beside it held-out prompts."""
    from flows.ppo import train

    folder = tmp_path_factory.mktemp("evaluated")
    train(build_config(tree(tiny)), str(folder / "run"))
    texts = ["The film was", "This play felt", "A new story began", "Her concert was", "A film seemed", "It was not"]
    rows = [*texts, *(f"{text} so" for text in texts[:2])]
    (folder / f"{ENTRY}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(run: Path) -> EvaluationFolder:
    """All checkpoints of the run, on the held-out prompts."""
    evaluate(run, "--prompts", str(run.parent / f"{ENTRY}.jsonl"), "--checkpoint", "all", *FEW)
    (found,) = (run / "evaluations").iterdir()
    return EvaluationFolder.open(found)


def evaluate(*arguments: object) -> int | str | None:
    """The exit code of ``rlhf evaluate``."""
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *map(str, arguments)])
    return caught.value.code


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def written(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.arrow")}


def table(path: Path) -> pa.Table:
    return pa.ipc.open_file(str(path)).read_all()


def mlflow_run(run: Path) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    return client, client.get_run(json.loads((run / "mlflow.json").read_text())["run_id"])


def test_what_it_writes(evaluated: EvaluationFolder, run: Path) -> None:
    assert evaluated.path.name.startswith(f"{ENTRY}-")
    names = {p.name for p in evaluated.path.iterdir()}
    assert names >= {"evaluation.json", "prompts.arrow", "samples.arrow", "frontier.arrow", "summary.json", "parts"}
    assert (evaluated.path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    samples = table(evaluated.path / "samples.arrow")
    assert samples.schema.remove_metadata().equals(SIDE_BY_SIDE)
    assert samples.num_rows == 2 * 6 * 4
    assert set(samples["policy"].to_pylist()) == {"000002", "000003"}
    frontier = table(evaluated.path / "frontier.arrow")
    assert frontier.schema.remove_metadata().equals(FRONTIER)
    assert frontier["kl"].to_pylist() == sorted(frontier["kl"].to_pylist())
    parts = {p.name for p in (evaluated.path / "parts").glob("*.arrow")}
    assert parts == {"reference-000.arrow", "reference-001.arrow", "000002-000.arrow", "000003-000.arrow"}


def test_its_numbers_are_those_of_its_samples(evaluated: EvaluationFolder) -> None:
    summary, rows = evaluated.summary(), table(evaluated.path / "samples.arrow").to_pylist()
    assert summary["prompts"]["num_prompts"] == 6
    assert summary["prompts"]["num_trained_on"] == 0
    assert (summary["samples"], summary["reference_samples"]) == (4, 40)
    for name, numbers in summary["policies"].items():
        mine = [row for row in rows if row["policy"] == name]
        for number, column in (("score", "score"), ("kl", "kl"), ("response_len", "response_len")):
            mean = sum(row[column] for row in mine) / len(mine)
            assert numbers[number]["mean"] == pytest.approx(mean, rel=1e-5), number
            assert numbers[number]["low"] < mean < numbers[number]["high"]
        base = summary["reference"]["score"]["mean"]
        assert numbers["gain"]["mean"] == pytest.approx(numbers["score"]["mean"] - base)
    assert [row["n"] for row in summary["best_of_n"]] == [2, 4, 8]
    policies = summary["policies"]
    assert policies["000003"]["kl"]["mean"] > 0.001, "it moved"
    assert policies["000002"]["score"]["mean"] != policies["000003"]["score"]["mean"], "each its own weights"


def test_a_checkpoints_samples_are_those_of_its_weights(evaluated: EvaluationFolder, run: Path) -> None:
    """Log-probs of the stored responses under the checkpoint's policy folder and the reference's, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(run / "checkpoints/000003/policy")
    reference: Any = AutoModelForCausalLM.from_pretrained(evaluated.config.reference_model)
    prompts = evaluated.prompts()
    rows = table(evaluated.path / "parts/000003-000.arrow").to_pylist()
    for row in rows[::5]:
        at = list(prompts.prompt_ids).index(row["prompt_id"])
        prompt = prompts.tokens_QP[at][prompts.mask_QP[at]]
        response = torch.tensor(row["response_tokens"])
        with torch.no_grad():
            ids = torch.cat([prompt, response])[None]
            mine, its = (
                m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(1).gather(1, response[:, None]).sum()
                for m in (policy, reference)
            )
        assert row["kl"] == pytest.approx(float(mine - its), abs=1e-4)


def test_evaluating_again_draws_nothing_and_more_samples_add_to_those_there_are(
    evaluated: EvaluationFolder, run: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(run.parent, tmp_path / "copy") / "run"
    folder = copied / "evaluations" / evaluated.path.name
    before, files = digests(folder), written(folder)
    held_out = ("--prompts", run.parent / f"{ENTRY}.jsonl", *UNTRACKED)
    assert evaluate(copied, *held_out, "--checkpoint", "all", *FEW) == 0
    del before["evaluation.json"]  # it says that this one is not tracked
    assert {name: sha for name, sha in digests(folder).items() if name in before} == before
    parts = {name: time for name, time in files.items() if name.startswith("parts/")}
    assert {name: time for name, time in written(folder).items() if name.startswith("parts/")} == parts
    # more of the reference: its second part grows from 8 to 32, a third one comes, the rest stays
    assert evaluate(copied, *held_out, *FEW[:4], "--frontier-samples", 70, "--checkpoint", "best") == 0
    now = written(folder)
    assert [name for name in parts if now[name] != parts[name]] == ["parts/reference-001.arrow"]
    assert "parts/reference-002.arrow" in now
    assert EvaluationFolder.open(folder).summary()["reference_samples"] == 70


def test_a_stopped_evaluation_goes_on_to_the_same_bytes(
    evaluated: EvaluationFolder, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.evaluation import evaluate as tasks

    copied = shutil.copytree(run.parent, tmp_path / "copy") / "run"
    folder = copied / "evaluations" / evaluated.path.name
    shutil.rmtree(folder)
    commit, committed = EvaluationFolder.commit, list[str]()

    def stop_after_two(self: EvaluationFolder, policy: str, *rest: Any) -> None:
        if len(committed) == 2:
            raise KeyboardInterrupt
        committed.append(policy)
        commit(self, policy, *rest)

    command = (copied, "--prompts", run.parent / f"{ENTRY}.jsonl", "--checkpoint", "all", *FEW, *UNTRACKED)
    monkeypatch.setattr(tasks.EvaluationFolder, "commit", stop_after_two)
    assert evaluate(*command) == 130
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr(tasks.EvaluationFolder, "commit", commit)
    assert evaluate(*command) == 0
    same = digests(evaluated.path)
    del same["mlflow.json"], same["evaluation.json"]
    assert {name: sha for name, sha in digests(folder).items() if name in same} == same


def test_metrics_picture_and_samples_reach_the_runs_own_mlflow_run_once(evaluated: EvaluationFolder, run: Path) -> None:
    client, found = mlflow_run(run)
    policies = evaluated.summary()["policies"]
    for metric, number in (("eval/score", "score"), ("eval/kl", "kl"), ("eval/win_rate", "win_rate")):
        history = client.get_metric_history(found.info.run_id, metric)
        expected = {int(name): numbers[number]["mean"] for name, numbers in policies.items()}
        assert {m.step: m.value for m in history} == pytest.approx(expected)
        assert len(history) == 2
    place = f"evaluations/{evaluated.path.name}"
    artifacts = {Path(item.path).name for item in client.list_artifacts(found.info.run_id, place)}
    assert artifacts >= {"evaluation.png", "summary.json", "frontier.arrow"}
    (samples,) = (name for name in artifacts if name.startswith("samples-"))
    shown = json.loads(Path(client.download_artifacts(found.info.run_id, f"{place}/{samples}")).read_text())
    assert "ref_response" in shown["columns"]
    assert len(shown["data"]) == 48
    evaluate(run, "--prompts", run.parent / f"{ENTRY}.jsonl", "--checkpoint", "all", *FEW)
    assert len(client.get_metric_history(found.info.run_id, "eval/score")) == 2, "once"
    assert client.get_run(found.info.run_id).info.status == "FINISHED"


def test_a_tracker_that_is_down_is_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tasks.tracking import tracker as tracking

    warnings: list[str] = []
    monkeypatch.setattr(tracking.logger, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert evaluate(run, *FEW, "--out", tmp_path / "out") == 0
    assert any("MLflow did not take the evaluation" in warning for warning in warnings)
    assert (tmp_path / "out/summary.json").is_file()
    assert not (tmp_path / "out/mlflow.json").exists()


def test_a_bare_model_has_a_folder_and_an_mlflow_run_of_its_own(
    run: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{run.parent / 'mlflow.db'}"
    Path("own.yaml").write_text(config_template(build_config({**tree(tiny), "tracking": {"uri": store}})))
    model = run / "checkpoints/000003/policy"
    held_out = ("--prompts", run.parent / f"{ENTRY}.jsonl")
    assert evaluate(model, "--config", "own.yaml", *held_out, *FEW, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    (folder,) = (tmp_path / "evaluations").glob(f"policy-{ENTRY}-*")
    assert EvaluationFolder.open(folder).summary() == summary
    assert summary["run"] is None
    (numbers,) = summary["policies"].values()
    assert numbers["kl"]["mean"] > 0.001, "the reference stayed the one of the config"
    of_run = [r for r in table_of_run(run) if r["policy"] == "000003"]
    assert [r["response"] for r in table(folder / "samples.arrow").to_pylist()] == [r["response"] for r in of_run]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    logged = client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])
    assert logged.info.status == "FINISHED"
    assert logged.info.run_id != json.loads((run / "mlflow.json").read_text())["run_id"]
    assert logged.data.metrics["eval/score"] == pytest.approx(numbers["score"]["mean"])


def table_of_run(run: Path) -> list[dict[str, Any]]:
    (folder,) = (run / "evaluations").glob(f"{ENTRY}-*")
    return table(folder / "samples.arrow").to_pylist()


def test_the_terminal_names_the_share_and_the_files(
    evaluated: EvaluationFolder, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (run, "--prompts", run.parent / f"{ENTRY}.jsonl", "--checkpoint", "all", *FEW)
    assert evaluate(*command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6 prompts x 4 responses, reference 40" in out
    assert "Best-of-n of the reference" in out
    assert "evaluation.png" in out
    assert "note:" not in out, "these prompts are held out"
    for name, numbers in evaluated.summary()["policies"].items():
        share = numbers["share_of_attainable"]
        kl = numbers["kl"]["mean"]
        said = f"at KL {kl:.2f} it has {share['mean']:.0%}" if share else numbers["share_note"]
        assert f"iteration {int(name)}" in out
        assert said in out
    assert evaluate(run, *FEW, "--out", run.parent / "own") == 0
    assert "these prompts are among those of training" in " ".join(capsys.readouterr().out.split())


def test_what_lies_between_is_a_table_and_no_metric_of_its_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, found = mlflow_run(run)
    before = client.get_metric_history(found.info.run_id, "eval/kl")
    held_out = ("--prompts", run.parent / f"{ENTRY}.jsonl")
    assert evaluate(run, *held_out, *FEW, "--blend", "0.75,0.5", "--out", tmp_path / "out") == 0
    out = " ".join(capsys.readouterr().out.split())
    policies = EvaluationFolder.open(tmp_path / "out").summary()["policies"]
    assert list(policies) == ["000003@0.5", "000003@0.75", "000003"]
    assert "Interpolated towards the reference" in out
    for name, called in (("000003@0.5", "0.5 of iteration 3"), ("000003@0.75", "0.75 of iteration 3")):
        assert f"{called} {policies[name]['kl']['mean']:.2f} ± " in out
    assert "0.5 of iteration 3: " not in out, "one verdict"
    parts = {p.name for p in (tmp_path / "out/parts").glob("0*.arrow")}
    assert parts == {"000003@0.5-000.arrow", "000003@0.75-000.arrow", "000003-000.arrow"}
    sent = client.get_metric_history(found.info.run_id, "eval/kl")[len(before) :]
    assert [(m.step, m.value) for m in sent] == [(3, pytest.approx(policies["000003"]["kl"]["mean"]))]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone"], "gone does not exist: there is no such run and no such model folder here; beside it: the run begun"),
        (["./gone"], "./gone does not exist: there is no such run and no such model folder here"),
        (["full/gone", "--config", "own.yaml"], "full/gone does not exist: there is no such run and no such model"),
        (["empty"], "empty is neither a run folder (it has no run.json) nor a model folder (no config.json)"),
        (["{run}", "--samples", "0"], "--samples is 0; at least 1 response a prompt is needed"),
        (["{run}", "--frontier-samples", "5"], "--frontier-samples is 5; a frontier needs at least 20"),
        (["{run}", "--checkpoint", "1"], "--checkpoint 1 is not kept in {run}; there are: 2, 3"),
        (["{run}", "--checkpoint", "last"], "--checkpoint is 'last'; choose newest, best, last_good, all"),
        (["{run}", "--checkpoint", "last_good"], "--checkpoint is last_good, but no guard has stopped {run}"),
        (["{run}", "--blend", "0.5;0.7"], "--blend is '0.5;0.7'; give shares between 0 and 1 with commas: 0.5,0.7"),
        (["{run}", "--blend", "0.5,1"], "--blend names 1; a share lies between 0 (the reference) and 1 (the policy)"),
        (["{run}", "--prompts", "gone.jsonl"], "--prompts 'gone.jsonl' does not exist"),
        (["{run}", "--prompts", "nothing.jsonl"], "--prompts 'nothing.jsonl' holds no rows"),
        (["{run}", "--config", "own.yaml"], "--config own.yaml is for a bare model; {run} is a run"),
        (["{run}", "--set", "generation.temperature=0"], "generation.temperature is 0"),
        (["{run}", "--out", "full"], "--out full is not an empty folder; choose a new one"),
        (["{model}"], "{model} is no run folder, so --config is needed"),
        (["{model}", "--config", "own.yaml", "--checkpoint", "all"], "--checkpoint is all, but {model} is no run"),
        (["{begun}"], "{begun} has no checkpoint yet: the first comes after 1 iterations"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    arguments: list[str], said: str, run: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("nothing.jsonl").touch()
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.txt").touch()
    Path("own.yaml").write_text(config_template(build_config(tree(tiny))))
    begun = RunFolder.create(tmp_path / "begun", build_config(tree(tiny)), {}).path
    places = {"run": str(run), "model": str(tiny.policy), "begun": str(begun)}
    before = digests(tmp_path), digests(run)
    assert evaluate(*(a.format(**places) for a in arguments)) == EXIT_MISTAKE
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    (line,) = err.splitlines()
    assert line.startswith(f"error: {said.format(**places)}")
    assert (digests(tmp_path), digests(run)) == before


def test_the_newest_run_of_a_folder_is_the_one_that_saved_last(run: Path, tmp_path: Path) -> None:
    from flows.evaluate import newest_run
    from rlhf_core.contracts.errors import UserError

    with pytest.raises(UserError, match=f"runs is {tmp_path}, which holds no run folder with a checkpoint"):
        newest_run(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name, symlinks=True)
    (tmp_path / "begun").mkdir()
    (tmp_path / "a/checkpoints/000003/manifest.json").touch()
    assert newest_run(tmp_path).path == tmp_path / "a"
    (tmp_path / "b/checkpoints/000002/manifest.json").touch()
    assert newest_run(tmp_path).path == tmp_path / "b"
