"""A hub that answers: what is fetched of it, and when its branch moves while a run is at rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_double import A, B, Hub, serving
from iteration import tiny_tree

from rlhf_core.contracts.run_folder import RunFolder

PROGRAM = """
import json, sys
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.preflight.pins import moved_branches
from pathlib import Path
from tasks.lifecycle.start import start_run
from tasks.session.session import Session

tree, folder = json.loads(sys.argv[1]), sys.argv[2]
start_run(build_config(tree), folder)
run = RunFolder.open(Path(folder))
session = Session(run)
first = session.plan.prompt_set.entries[0]
print(json.dumps([session.policy.trainer(0).digest(), first]))
sys.stdout.flush()
sys.stdin.readline()  # the branch moves now
print(json.dumps(moved_branches(run.config, run.unpinned)))
"""


def test_a_run_of_a_hub_that_answers(tiny: Any, tmp_path: Path) -> None:
    hub = Hub()
    model = Path(shutil.copytree(tiny.policy, tmp_path / "model"))
    for surplus in ("consolidated.safetensors", "pytorch_model.bin", "onnx/config.json", "modeling_tiny.py"):
        (model / surplus).parent.mkdir(exist_ok=True)
        (model / surplus).write_bytes(b"surplus")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    for commit in (B, A):
        data = tmp_path / commit
        data.mkdir()
        lines = [json.dumps({"prompt": f"{commit[0]} {i}"}) + "\n" for i in range(20)]
        (data / "train.jsonl").write_text("".join(lines))
        hub.put("models/someone/tiny", commit, model)
        hub.put("datasets/someone/prompts", commit, data)
    tree = tiny_tree(tiny) | {"reward": {"components": [{"kind": "function", "function": "length"}]}}
    tree["policy"] |= {"model": "someone/tiny"}
    tree["prompts"] |= {"source": "someone/prompts"}

    with serving(hub) as address:
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(tree), str(tmp_path / "run")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            _, first = json.loads(process.stdout.readline())
            asked = list(hub.asked)
            for repo in hub.branches.values():
                repo["main"] = B
            process.stdin.write("\n")
            process.stdin.flush()
            moved = json.loads(process.stdout.readline())

    config = RunFolder.open(tmp_path / "run").config
    assert (config.policy.model, config.prompts.source) == (f"someone/tiny@{A}", f"someone/prompts@{A}")
    assert first == "a 0"
    fetched = {path.rpartition(f"/resolve/{A}/")[2] for path in asked if path.startswith("/someone/tiny/resolve/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/rag.jinja"} <= fetched
    assert not fetched & {"consolidated.safetensors", "pytorch_model.bin", "onnx/config.json", "modeling_tiny.py"}
    assert moved == [
        f"policy.model 'someone/tiny' has moved: main is commit {B} now, and the run keeps {A}",
        f"prompts.source 'someone/prompts' has moved: main is commit {B} now, and the run keeps {A}",
    ]
