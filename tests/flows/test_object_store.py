"""A run in an object store as a person works with it: the same commands, the same run, the address in every message."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from iteration import tiny_tree
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings
from s3_server import S3Server
from tiny_world import Tiny
from torture.runs import fingerprint, start

from flows import cli
from rlhf_core.contracts.config_io import build_config
from rlhf_core.store.address import CACHE
from rlhf_core.store.objects import Objects
from rlhf_core.store.opening import reading
from rlhf_core.tables import open_run
from tasks.session.session import open_session

Answer = tuple[int, str, str]


@pytest.fixture(scope="module", autouse=True)
def machine(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the server is, no Prefect, and the copies of this machine."""
    folder = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as environment:
        here = {CACHE: str(folder / "cache"), "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}
        for name, value in {**s3.environment, **here}.items():
            environment.setenv(name, value)
        with temporary_settings({PREFECT_SERVER_EPHEMERAL_ENABLED: False}, restore_defaults={PREFECT_API_URL}):
            yield folder


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture(scope="module")
def config(tiny: Tiny, bucket: str) -> dict[str, Any]:
    tracking = {"enabled": True, "artifact_location": f"s3://{bucket}/mlflow"}
    return tiny_tree(tiny) | {"num_iterations": 2, "checkpoint": {"every": 1}, "tracking": tracking}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Answer]:
    monkeypatch.chdir(tmp_path)
    for module in ("looking", "training", "measuring", "replaying"):
        monkeypatch.setattr(f"flows.commands.{module}.console", cli.Console(width=200))
    open_session.cache_clear()
    return lambda *arguments: call(capsys, *arguments)


@pytest.fixture(scope="module")
def trained(config: dict[str, Any], bucket: str, machine: Path) -> str:
    """The address of a run that `rlhf train` has made."""
    (machine / "tiny.json").write_text(json.dumps(config))
    url = f"s3://{bucket}/experiments/run"
    open_session.cache_clear()
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--config", str(machine / "tiny.json"), "--run-dir", url])
    assert not ended.value.code
    return url


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another machine."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def on_disk(config: dict[str, Any], machine: Path) -> Path:
    """The same run in a folder of this machine."""
    open_session.cache_clear()
    start(build_config(config | {"tracking": {"enabled": False}}), machine / "disk")
    return machine / "disk"


def test_it_is_the_run_that_a_disk_would_hold(trained: str, on_disk: Path, elsewhere: Path) -> None:
    assert fingerprint(reading(trained)) == fingerprint(on_disk)


def test_every_command_takes_its_address_and_shows_it(
    trained: str, on_disk: Path, rlhf: Callable[..., Answer], elsewhere: Path
) -> None:
    for command, says in {
        ("inspect", trained): f"{trained}: 2 of 2 iterations",
        ("inspect", trained, "--json"): f'"run": "{trained}"',
        ("verify", trained): f"{trained}: 2 of 2 iterations finished, 2 checkpoints",
        ("view", trained): "run-view.html",
        ("compare", trained, str(on_disk), "--json"): f'"path": "{trained}"',
        ("replay", trained, "--iteration", "1"): f"{trained}, all 6 stages, bit for bit",
        ("bundle", trained, "--iteration", "1", "--without-models"): "run-i000001.rlhf.zip",
    }.items():
        code, out, err = rlhf(*command)
        assert (code, says in out) == (0, True), (command, out, err)
        assert str(elsewhere) not in out + err, command
    assert open_run(trained).iterations().arrow().num_rows == 2


@pytest.mark.slow
def test_an_evaluation_is_kept_beside_it(trained: str, rlhf: Callable[..., Answer], elsewhere: Path) -> None:
    code, out, err = rlhf(
        "evaluate", trained, "--num-prompts", "4", "--samples", "2", "--frontier-samples", "32", "--json"
    )
    assert code == 0, err
    (summary,) = reading(trained).glob("evaluations/*/summary.json")
    assert json.loads(out) == json.loads(summary.read_text())


def test_what_it_wrote_to_mlflow_is_in_the_store(trained: str, bucket: str, s3: S3Server, tmp_path: Path) -> None:
    import mlflow
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{reading(trained).parent / 'mlflow.db'}"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("rlhf-flow")
    assert experiment is not None
    assert experiment.artifact_location == f"s3://{bucket}/mlflow"
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["rlhf.run_dir"] == trained
    assert f"rlhf resume {trained}" in run.data.tags["mlflow.note.content"]
    there = s3.names(f"s3://{bucket}/mlflow")
    assert sum(name.endswith("model.safetensors") for name in there) == 2
    assert any(name.endswith("config.yaml") for name in there)
    mlflow.set_tracking_uri(store)
    version = client.get_model_version_by_alias("rlhf-policy", "newest")
    got = mlflow.artifacts.download_artifacts(f"models:/rlhf-policy/{version.version}", dst_path=str(tmp_path))
    kept = reading(trained) / "checkpoints" / "000002" / "policy" / "model.safetensors"
    assert (Path(got) / "model.safetensors").read_bytes() == kept.read_bytes()


def test_an_experiment_that_keeps_its_files_elsewhere_is_not_used(
    trained: str, config: dict[str, Any], bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    from tasks.tracking.outbox import RefusalError
    from tasks.tracking.store import kept_experiment

    class Elsewhere:
        name, artifact_location, experiment_id = "rlhf-flow", "s3://other/place/", "1"

    from rlhf_core.contracts.run_folder import RunFolder

    run = RunFolder.open(reading(trained))
    with pytest.raises(RefusalError, match=f"artifact_location is s3://{bucket}/mlflow, but the experiment rlhf-flow"):
        kept_experiment(run, Elsewhere())
    Elsewhere.artifact_location = f"s3://{bucket}/mlflow/"
    assert kept_experiment(run, Elsewhere()) == "1"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("train", "--config", "C", "--run-dir", "RUN"), "already holds a run; continue it with `rlhf resume RUN`"),
        (
            ("train", "--config", "C", "--run-dir", "s3://BUCKET/experiments"),
            "is neither empty nor a run: it holds run",
        ),
        (("train", "--config", "C", "--run-dir", "s3://nobody-made-it/run"), "make that bucket, or correct its name"),
        (("train", "--config", "C", "--run-dir", "gs://bucket/run"), "of the object stores, s3:// is known"),
        (("resume", "s3://BUCKET/nothing"), "s3://BUCKET/nothing is not a run: it has no run.json"),
        (("inspect", "s3://BUCKET"), "is a whole bucket, and a run needs a prefix of its own"),
        (("sweep", "--config", "C", "--grid", "kl.coef=1,2", "--out", "RUN"), "only the folder of a run can be in an"),
        (("view", "RUN", "--out", "s3://BUCKET/page.html"), "--out is s3:/BUCKET/page.html, but only the folder of a"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_nothing_is_written(
    command: tuple[str, ...], says: str, trained: str, bucket: str, machine: Path, s3: S3Server,
    rlhf: Callable[..., Answer],
) -> None:  # fmt: skip
    def named(text: str) -> str:
        return text.replace("BUCKET", bucket).replace("RUN", trained)

    before = s3.names(f"s3://{bucket}/experiments")
    words = [str(machine / "tiny.json") if word == "C" else named(word) for word in command]
    code, out, err = rlhf(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named(says) in err
    assert s3.names(f"s3://{bucket}/experiments") == before
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.slow
def test_a_damaged_object_is_found_as_a_damaged_file_is(
    trained: str, rlhf: Callable[..., Answer], elsewhere: Path, s3: S3Server, tmp_path: Path, bucket: str
) -> None:
    name = "experiments/run/iterations/000000/03_scores.arrow"
    whole = s3.client().get_object(Bucket=bucket, Key=name)["Body"].read()
    (tmp_path / "damaged").write_bytes(whole)
    flip(tmp_path / "damaged")
    s3.client().put_object(Bucket=bucket, Key=name, Body=(tmp_path / "damaged").read_bytes())
    (tmp_path / "damaged").unlink()
    try:
        code, out, _ = rlhf("verify", trained)
        assert code == 2
        assert "iterations/000000/03_scores.arrow" in out
        code, _, err = rlhf("resume", trained)
        assert code == 2
        assert f"{trained} is damaged, and was not resumed" in err
        code, out, err = rlhf("resume", trained, "--repair")
        assert code == 0, err
        assert s3.client().get_object(Bucket=bucket, Key=name)["Body"].read() == whole
    finally:
        s3.client().put_object(Bucket=bucket, Key=name, Body=whole)


def test_a_store_that_fails_stops_the_run_with_one_sentence_and_a_resume_goes_on(
    trained: str, bucket: str, machine: Path, rlhf: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ReadTimeoutError

    url = f"s3://{bucket}/failing/run"
    put = Objects._if_it_holds

    def fail(objects: Objects, request: Any, name: str, **rest: Any) -> Any:
        if name == "iterations/000001/02_rollouts.json":
            raise ReadTimeoutError(endpoint_url="http://store")
        return put(objects, request, name, **rest)

    quiet = ("--set", "tracking.enabled=false")
    with monkeypatch.context() as faulty:
        faulty.setattr(Objects, "_if_it_holds", fail)
        code, _, err = rlhf("train", "--config", str(machine / "tiny.json"), *quiet, "--run-dir", url)
    assert code == 2
    assert f"error: {url}/iterations/000001/02_rollouts.json was not written: Read timeout on endpoint URL" in err
    assert not (reading(url) / "iterations" / "000001" / "02_rollouts.json").exists()
    code, _, err = rlhf("resume", url)
    assert code == 0, err
    assert fingerprint(reading(url)) == fingerprint(reading(trained))


def test_no_secret_of_the_store_is_written_anywhere(trained: str, machine: Path, s3: S3Server) -> None:
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert len(secret) > 12
    for path in machine.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
