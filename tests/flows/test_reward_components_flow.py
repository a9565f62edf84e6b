"""A run whose score comes from a model, functions and a service: its artifacts, its form, its resume."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contracts.artifacts import read_artifact
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import DriftError, NumericalError
from rlhf_core.contracts.run_folder import RunFolder

MODULE = """
async def picky(responses, number):
    return [None if n % 3 == 0 else float(len(r)) for r, n in zip(responses, number)]
"""


@pytest.fixture
def judge() -> Iterator[str]:
    """A service that scores a response by its length."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"scores": [len(text) / 10 for text in request["responses"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tree(tiny: Any, tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    (tmp_path / "flow_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    texts = [json.loads(line)["prompt"] for line in tiny.prompts.read_text().splitlines()]
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps({"prompt": text, "number": i}) + "\n" for i, text in enumerate(texts)))
    yield {
        "seed": 7,
        "num_iterations": 2,
        "device": "cpu",
        "num_threads": 1,
        "prompts": {"source": str(source), "columns": ["number"], "batch_size": 8},
        "policy": {"model": str(tiny.policy)},
        "reward": {
            "components": [
                {"kind": "model", "name": "taste", "model": str(tiny.reward)},
                {"kind": "function", "name": "picky", "function": "flow_rewards:picky", "on_error": "drop"},
                {"kind": "http", "name": "judge", "url": judge},
            ],
            "allowed_hosts": ["127.0.0.1"],
            "combine": "mean_minus_std",
        },
        "generation": {"max_new_tokens": 6},
        "ppo": {"num_ppo_epochs": 1, "num_minibatches": 2, "learning_rate": 1e-3},
        "tracking": {"enabled": False},
    }
    sys.modules.pop("flow_rewards", None)


def test_a_run_with_components_of_all_kinds(tree: dict[str, Any], tmp_path: Path, prefect_server: None) -> None:
    from flows.ppo import resume, train

    train(build_config(tree), str(tmp_path / "run"))
    run = RunFolder.open(tmp_path / "run")
    for iteration in range(2):
        manifests = run.manifests(iteration)
        prompts, rollouts, scores = (
            read_artifact(run.path, manifests[stage].artifact).to_pylist()
            for stage in ("sample_prompts", "generate", "score_rewards")
        )
        number_of = {row["prompt_id"]: json.loads(row["columns"])["number"] for row in prompts}
        dropped = 0
        for rollout, row in zip(rollouts, scores, strict=True):
            raw = {component["name"]: component["score"] for component in row["components"]}
            assert raw["judge"] == pytest.approx(len(rollout["response_text"]) / 10)
            if number_of[rollout["prompt_id"]] % 3:
                assert raw["picky"] == len(rollout["response_text"])
            else:
                assert raw.keys() == {"taste", "judge"}
                dropped += 1
            mean = sum(raw.values()) / len(raw)
            std = (sum((x - mean) ** 2 for x in raw.values()) / len(raw)) ** 0.5
            assert row["score"] == pytest.approx(mean - std, rel=1e-5, abs=1e-6)
        metrics = manifests["score_rewards"].metrics
        assert {name: metrics[f"reward/{name}_failed"] for name in ("taste", "picky", "judge")} == {
            "taste": 0.0,
            "picky": dropped,
            "judge": 0.0,
        }
    (tmp_path / "flow_rewards.py").write_text(MODULE + "# another reward\n")
    with pytest.raises(DriftError, match=r"rewards\.picky "):
        resume(str(run.path))


def test_a_run_that_stops_at_a_failing_component_keeps_what_it_has(
    tree: dict[str, Any], tmp_path: Path, prefect_server: None
) -> None:
    from flows.ppo import train

    tree["reward"]["components"][1]["on_error"] = "fail"
    with pytest.raises(NumericalError, match=r"reward component picky gave None for \d of 8 samples \(i000000-p0000"):
        train(build_config(tree), str(tmp_path / "run"))
    committed = RunFolder.open(tmp_path / "run").manifests(0).keys()
    assert {"sample_prompts", "generate"} <= committed
    assert not {"score_rewards", "shape_rewards"} & committed


def test_the_form_of_the_flow_takes_components_of_every_kind(tree: dict[str, Any]) -> None:
    """What Prefect's server checks before it starts a run from the form."""
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.schema_tools.validation import validate

    from flows.ppo import train

    schema = parameter_schema(train.fn).model_dump_for_openapi()
    assert validate({"config": tree}, schema) == []
    tree["reward"]["components"].append({"name": "kind_left_out"})
    assert validate({"config": tree}, schema) == []
    tree["reward"]["components"].append({"kind": "http", "model": "m"})
    assert validate({"config": tree}, schema)
