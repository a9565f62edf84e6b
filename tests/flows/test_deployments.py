"""The files of deployments/, read with Prefect's own models: what `prefect deploy` and a worker would make of them.

On a real server: test_deployed.py. Nothing here has a Docker daemon or a cluster: images are not built, jobs not run.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "deployments"
FILES = ("prefect.yaml", "prefect.docker.yaml", "prefect.kubernetes.yaml")
BLOCK = "6f1d9a36-4b0e-4b5e-9f3f-0f5d3a1a1a1a"
STEPS = {
    "here": {"stdout": "/repo"},
    "image": {"image": "reg/rlhf-flow:latest", "image_name": "reg/rlhf-flow", "tag": "latest"},
}


def tree(name: str, **replaced: str) -> dict[str, Any]:
    text = (ROOM / name).read_text()
    for old, new in replaced.items():
        text = text.replace(old, new)
    return YAML(typ="safe", pure=True).load(text)


def deployments() -> list[Any]:
    return [
        pytest.param(name, each, id=f"{name}:{each['entrypoint']}:{each['name']}")
        for name in FILES
        for each in tree(name)["deployments"]
    ]


def default_template(pool: str) -> dict[str, Any]:
    """What a work pool of this type is made with."""
    path = importlib.resources.files("prefect.server.api.collections_data.views") / "aggregate-worker-metadata.json"
    known = json.loads(path.read_text())
    package = "prefect" if pool == "process" else f"prefect-{pool}"
    return known[package][pool]["default_base_job_configuration"]


@pytest.mark.parametrize("name", FILES)
def test_prefect_reads_it_and_its_first_lines_are_the_three_commands(name: str) -> None:
    model = PrefectYamlModel.model_validate(tree(name))
    assert model.deployments
    head = (ROOM / name).read_text().split("\nname:")[0]
    pool = model.deployments[0].work_pool
    assert pool is not None
    at = [head.index(f"prefect {command}") for command in
          (f"work-pool create {pool.name}", f"--no-prompt deploy --all --prefect-file deployments/{name}",
           f"worker start --pool {pool.name}")]  # fmt: skip
    assert at == sorted(at)


@pytest.mark.parametrize(("name", "given"), deployments())
def test_each_flow_takes_its_parameters(name: str, given: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(given["entrypoint"])
    assert flow.persist_result is False, "never pickle"
    assert given["description"]
    parameters = {key: value for key, value in given["parameters"].items() if value not in ("", {})}
    known = flow.parameters.properties
    assert set(given["parameters"]) <= set(known)
    schema = flow.parameters.model_dump_for_openapi()
    wanted = {key for key in schema.get("required", ()) if key not in given["parameters"]}
    assert wanted == set(), "a run without a form has all it needs, or is refused in a sentence"
    if len(parameters) == len(given["parameters"]):
        flow.validate_parameters(parameters)


def test_the_form_begins_with_prompts_policy_and_reward_in_any_database() -> None:
    """Prefect's pages sort by ``position``; its Postgres keeps objects in an order of its own."""
    definitions = load_flow_from_entrypoint("flows.ppo.train").parameters.model_dump_for_openapi()["definitions"]
    first = sorted(definitions["RunConfig"]["properties"].items(), key=lambda item: item[1]["position"])
    assert [name for name, _ in first][:4] == ["prompts", "policy", "reward", "num_iterations"]
    for name in ("PromptsConfig", "PolicyConfig", "ModelReward", "PPOConfig"):
        fields = definitions[name]["properties"].values()
        assert [field["position"] for field in fields] == list(range(len(fields)))


def test_names_are_unique_on_one_server() -> None:
    names = [(load_flow_from_entrypoint(p.values[1]["entrypoint"]).name, p.values[1]["name"]) for p in deployments()]
    assert len(set(names)) == len(names)


def test_schedules_have_a_time_zone_and_one_run_at_a_time() -> None:
    scheduled = {each["name"]: each for each in tree("prefect.yaml")["deployments"] if each.get("schedules")}
    assert set(scheduled) == {"nightly", "chain"}
    for each in scheduled.values():
        (schedule,) = [_schedule_config_to_deployment_schedule(given) for given in each["schedules"]]
        assert schedule["schedule"].timezone == "Europe/Berlin"
    assert scheduled["nightly"]["schedules"][0]["active"] is True
    assert scheduled["nightly"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


@pytest.mark.parametrize(("name", "pool"), list(zip(FILES, ("process", "docker", "kubernetes"), strict=True)))
def test_the_job_variables_are_ones_of_the_pool(name: str, pool: str) -> None:
    template = default_template(pool)
    if pool == "kubernetes":
        template = json.loads((ROOM / "kubernetes" / "job-template.json").read_text())
    variables: dict[str, Any] = {}
    for each in tree(name)["deployments"]:
        variables = apply_values(each["work_pool"]["job_variables"], STEPS)
        assert set(variables) <= set(template["variables"]["properties"])
        validate(variables, template["variables"], raise_on_error=True)
        assert all(isinstance(value, str) for value in variables["env"].values())
    if pool == "docker":
        assert variables["volumes"] == ["/repo/runs:/home/rlhf/runs"]
        assert variables["image"] == "reg/rlhf-flow:latest"


def test_the_kubernetes_job_keeps_runs_in_the_claim_and_is_never_root() -> None:
    template = json.loads((ROOM / "kubernetes" / "job-template.json").read_text())
    default = default_template("kubernetes")
    added = set(template["variables"]["properties"]) - set(default["variables"]["properties"])
    assert added == {"claim_name", "gpus", "secret_name", "shm_size"}
    manifest = template["job_configuration"]["job_manifest"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    assert (manifest["spec"]["backoffLimit"], manifest["spec"]["completions"], manifest["spec"]["parallelism"]) == (
        0, 1, 1,
    )  # fmt: skip
    pod = manifest["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    runs, shm = pod["volumes"]
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {runs["name"]: "/home/rlhf/runs", shm["name"]: "/dev/shm"}
    claim = tree("kubernetes/storage.yaml")
    assert template["variables"]["properties"]["claim_name"]["default"] == claim["metadata"]["name"]
    user = f"--uid {pod['securityContext']['runAsUser']} "
    assert user in (ROOM / "docker" / "Dockerfile").read_text()


def test_the_image_copies_what_is_there_and_ends_as_its_own_user() -> None:
    lines = (ROOM / "docker" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in sent, source
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER rlhf"]
    assert "constraints.txt" in " ".join(line for line in lines if line.startswith("RUN pip"))


@pytest.mark.parametrize("name", ["zombies.yaml", "kl-ceiling.yaml"])
def test_automations_are_ones_of_prefect(name: str) -> None:
    found = tree(name, NOTIFICATION_BLOCK=BLOCK)
    for each in found.get("automations", [found]):
        automation = AutomationCore.model_validate(each)
        assert automation.enabled
        assert automation.actions


def test_a_suspended_run_is_no_zombie() -> None:
    for each in tree("zombies.yaml")["automations"]:
        assert "prefect.flow-run.Suspended" in each["trigger"]["expect"]


def test_a_run_that_never_began_is_known_by_the_tag_of_every_deployment() -> None:
    (_, never_began) = tree("zombies.yaml")["automations"]
    tag = never_began["trigger"]["match_related"]["prefect.resource.id"].removeprefix("prefect.tag.")
    assert all(tag in parameters.values[1]["tags"] for parameters in deployments())


def test_the_kl_automations_listen_to_what_a_guard_sends() -> None:
    from flows.guarding import TRIPPED
    from rlhf_core.contracts.guard_config import GuardsConfig

    actions: list[str] = []
    for each in tree("kl-ceiling.yaml")["automations"]:
        assert each["trigger"]["expect"] == [TRIPPED]
        assert each["trigger"]["match"]["rlhf.guard"] in GuardsConfig.model_fields
        wanted = each["trigger"]["match"]["rlhf.guard.action"]
        actions += [wanted] if isinstance(wanted, str) else wanted
    assert sorted(actions) == ["pause", "stop", "warn"]
