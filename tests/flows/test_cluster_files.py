"""Files of deployments/ for several machines, read by the schemas of what would run them.

Nothing here has a Docker daemon, a Kubernetes or a second machine: no container was started. What the compose file
would start is started without containers, by its own commands and environment, in the last test.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import kubernetes_validate
import pytest
from jsonschema import ValidationError
from jsonschema.validators import validator_for
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML
from torture.prefect_server import free_port

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "deployments"
COMPOSE = ROOM / "compose.yaml"
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::\?[^}]*)?\}")
KUBERNETES = "1.31"
OURS = {"buckets", "prefect-server", "mlflow-server", "deploy", "worker"}
WAIT_S = 180.0
POSTGRES = "RLHF_TEST_POSTGRES"
"""user:password@host:port of a Postgres with empty databases prefect and mlflow; without it sqlite stands in."""


def tree(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((ROOM / name).read_text())


def compose() -> dict[str, Any]:
    """With its anchors merged, as every reader of YAML sees it."""
    return json.loads(json.dumps(tree("compose.yaml")))


class TestCompose:
    def test_it_is_one_of_the_compose_specification(self) -> None:
        vendored = importlib.resources.files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json"
        schema = json.loads(vendored.read_text())
        check = validator_for(schema)(schema)
        assert [error.message for error in check.iter_errors(compose())] == []
        wrong = compose()
        wrong["services"]["worker"]["depends_on"]["deploy"]["condition"] = "service_finished"
        assert list(check.iter_errors(wrong)), "the schema would see a mistake"

    def test_every_image_is_ours_or_pinned(self) -> None:
        for name, service in compose()["services"].items():
            if name in OURS:
                assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
                assert service["cap_drop"] == ["ALL"]
            else:
                tag = service["image"].partition(":")[2]
                assert re.search(r"\d", tag), f"{name}: a tag that moves"

    def test_nothing_listens_beyond_this_machine(self) -> None:
        published = {name: s["ports"] for name, s in compose()["services"].items() if "ports" in s}
        assert set(published) == {"prefect-server", "mlflow-server"}
        assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)

    def test_secrets_come_from_the_environment_and_are_asked_for(self) -> None:
        """Each variable has a line in .env.example, without a value where it is a password, and git ignores .env."""
        told = dict(line.split("=") for line in (ROOM / ".env.example").read_text().splitlines() if "=" in line)
        text = COMPOSE.read_text()
        assert {match[1] for match in VARIABLE.finditer(text)} == set(told)
        assert [name for name, value in told.items() if name.endswith("PASSWORD") and value] == []
        assert all(f"${{{name}:?" in text for name in told), "compose refuses to start without it"
        assert "/deployments/.env" in (ROOT / ".gitignore").read_text().splitlines()
        given = re.compile(r"(PASSWORD|SECRET\w*|ACCESS_KEY\w*): (\S+)")
        assert [line for line in text.splitlines() if (m := given.search(line)) and not m[2].startswith("${")] == []

    def test_what_waits_for_another_can_see_it_come(self) -> None:
        services = compose()["services"]
        for name, service in services.items():
            for other, how in service.get("depends_on", {}).items():
                if how["condition"] == "service_healthy":
                    assert services[other]["healthcheck"]["test"][0] == "CMD", (name, other)
                else:
                    assert how["condition"] == "service_completed_successfully"
                    assert "restart" not in services[other], f"{other} would never end"

    def test_data_outlive_containers(self) -> None:
        found = compose()
        kept = {
            name: [v for v in s.get("volumes", []) if not v.startswith(".")] for name, s in found["services"].items()
        }
        named = {volume.partition(":")[0] for volumes in kept.values() for volume in volumes}
        assert named == set(found["volumes"])
        assert all(kept[name] for name in ("postgres", "object-store", "worker"))

    def test_mlflow_has_the_settings_of_a_small_server(self) -> None:
        server = compose()["services"]["mlflow-server"]
        assert server["command"][-2:] == ["--workers", "1"]
        told = server["environment"]
        assert told["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        assert told["MLFLOW_ARTIFACTS_DESTINATION"].startswith("s3://")
        assert "mlflow-server:5000" in told["MLFLOW_SERVER_ALLOWED_HOSTS"], "else the worker gets 403"


class TestRay:
    def test_the_cluster_file_is_one_of_rays(self) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        prepared = prepare_config(tree("ray/cluster.yaml"))
        validate_config(prepared)
        assert prepared["max_workers"] == 2
        wrong = tree("ray/cluster.yaml") | {"setup_command": []}
        with pytest.raises(ValidationError, match="setup_command"):
            validate_config(prepare_config(wrong))

    def test_nodes_get_our_extras_and_no_address_of_a_server(self) -> None:
        found = tree("ray/cluster.yaml")
        assert any("rlhf-flow[ray,s3]" in command for command in found["setup_commands"])
        assert "PREFECT" not in json.dumps(found)
        assert {"ray", "s3"} <= set(_extras())

    def test_the_kuberay_manifest_has_pods_of_kubernetes(self) -> None:
        found = tree("ray/kuberay.yaml")
        assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayCluster")
        assert found["spec"]["rayVersion"] == _pinned("ray")
        groups = [found["spec"]["headGroupSpec"], *found["spec"]["workerGroupSpecs"]]
        for group in groups:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, **group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        claims = {v["persistentVolumeClaim"]["claimName"] for v in groups[0]["template"]["spec"]["volumes"][:1]}
        assert claims == {tree("kubernetes/storage.yaml")["metadata"]["name"]}


class TestKubernetes:
    def test_the_storage_claim(self) -> None:
        kubernetes_validate.validate(tree("kubernetes/storage.yaml"), KUBERNETES, strict=True)

    @pytest.mark.parametrize("gpus", [0, 8])
    def test_a_job_of_the_template_is_one_of_kubernetes(self, gpus: int) -> None:
        """Filled in as a worker does it: variables of a deployment over the template's defaults."""
        job = _job(gpus=gpus)
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert container["envFrom"] == [{"secretRef": {"name": "rlhf-secrets", "optional": True}}]
        wrong = json.loads(json.dumps(job).replace('"restartPolicy"', '"restartPolicies"'))
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def _job(**variables: Any) -> dict[str, Any]:
    template = json.loads((ROOM / "kubernetes" / "job-template.json").read_text())
    defaults = {k: v["default"] for k, v in template["variables"]["properties"].items() if "default" in v}
    given = tree("prefect.kubernetes.yaml")["deployments"][0]["work_pool"]["job_variables"]
    worker = {"name": "run", "labels": {"prefect.io/flow-run-id": "0"}, "command": ["prefect", "flow-run", "execute"]}
    env = [{"name": name, "value": value} for name, value in given["env"].items()]  # the worker lists what is a mapping
    filled = defaults | given | worker | {"env": env, "image": "reg/rlhf-flow:latest", **variables}
    return cast("dict[str, Any]", apply_values(template["job_configuration"]["job_manifest"], filled))


def _extras() -> dict[str, Any]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


@contextmanager
def running(command: list[str], environment: Mapping[str, str], folder: Path, health: str = "") -> Iterator[None]:
    """A process of its own in ``folder``; until it answers, where it has an address for that."""
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + WAIT_S
        while health:
            try:
                urllib.request.urlopen(health, timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                told = (folder / "log").read_text()[-3000:]
                assert process.poll() is None, told
                assert time.monotonic() < until, told
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.slow
def test_the_services_run_by_their_own_commands(tmp_path: Path) -> None:
    """Prefect's and MLflow's servers, buckets, deployments; a metric and a file through MLflow into the object store.

    moto stands in for the object store, and sqlite for Postgres unless RLHF_TEST_POSTGRES names one.
    """
    services = compose()["services"]
    ports = {name: free_port() for name in ("object-store:9000", "prefect-server:4200", "mlflow-server:5000")}
    secrets = {"POSTGRES_PASSWORD": "unused", "OBJECT_STORE_USER": "rlhf", "OBJECT_STORE_PASSWORD": "longenough"}

    def adapted(text: str) -> str:
        text = VARIABLE.sub(lambda match: secrets[match[1]], text)
        for name, port in ports.items():
            text = text.replace(name, f"127.0.0.1:{port}")
            if text in (f"{name.partition(':')[2]}", f"127.0.0.1:{name.partition(':')[2]}"):
                text = text.replace(name.partition(":")[2], str(port))
        return text.replace("0.0.0.0", "127.0.0.1")

    def environment(service: str) -> dict[str, str]:
        asked = {name: adapted(value) for name, value in services[service]["environment"].items()}
        for name, database in (
            ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "prefect"),
            ("MLFLOW_BACKEND_STORE_URI", "mlflow"),
        ):
            if name in asked:
                driver = asked[name].partition("://")[0]
                place = os.environ.get(POSTGRES)
                local = f"sqlite{'+aiosqlite' if database == 'prefect' else ''}:///{tmp_path}/{database}.db"
                asked[name] = f"{driver}://{place}/{database}" if place else local
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        return kept | asked | {"PREFECT_HOME": str(tmp_path / "prefect"), "COLUMNS": "160"}

    def command(service: str) -> list[str]:
        return [adapted(part) for part in services[service]["command"]]

    (tmp_path / "deployments").symlink_to(ROOM)
    with ExitStack() as stack:
        store = ports["object-store:9000"]
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store)]
        stack.enter_context(running(moto, dict(os.environ), tmp_path, f"http://127.0.0.1:{store}/moto-api/"))
        subprocess.run(command("buckets"), env=environment("buckets"), check=True, timeout=WAIT_S)
        subprocess.run(command("buckets"), env=environment("buckets"), check=True, timeout=WAIT_S)  # up, once more
        for service, path in (("prefect-server", "/api/health"), ("mlflow-server", "/health")):
            port = next(port for name, port in ports.items() if name.startswith(service))
            address = f"http://127.0.0.1:{port}{path}"
            stack.enter_context(running(command(service), environment(service), tmp_path, address))
        subprocess.run(command("deploy"), env=environment("deploy"), cwd=tmp_path, check=True, timeout=WAIT_S)
        listed = _prefect(ports["prefect-server:4200"], "/deployments/filter")
        assert {each["name"] for each in listed} == {each["name"] for each in tree("prefect.yaml")["deployments"]}
        logged = (
            "import mlflow\n"
            "with mlflow.start_run():\n"
            "    mlflow.log_metric('objective/kl', 1.5)\n"
            "    mlflow.log_text('kept', 'note.txt')\n"
        )
        subprocess.run([sys.executable, "-c", logged], env=environment("worker"), check=True, timeout=WAIT_S)
        assert any(key.endswith("/note.txt") for key in _keys(store, secrets))


def _prefect(port: int, path: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api{path}", b'{"limit": 100}', {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def _keys(port: int, secrets: Mapping[str, str]) -> list[str]:
    import boto3

    client: Any = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=secrets["OBJECT_STORE_USER"],
        aws_secret_access_key=secrets["OBJECT_STORE_PASSWORD"],
        region_name="us-east-1",
    )
    return [found["Key"] for found in client.list_objects_v2(Bucket="mlflow")["Contents"]]
