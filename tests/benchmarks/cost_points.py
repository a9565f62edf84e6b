"""Points for the cost model: the real stages over a grid of models, batches and lengths, on this machine's CPU.

    OMP_NUM_THREADS=2 python -m benchmarks.cost_points [--only NAME ...] [--small] [--out FILE]

Each point is a process of its own: random GPT-2s, the six tasks in a bare loop as `benchmarks.bare_loop` runs them,
three iterations. A stage's seconds are the lesser of its second and third; the process's peak is VmHWM. It takes some
five minutes on two quiet cores, and replaces this machine's points in rlhf_core/costs/points.json; those of other
machines stay. Afterwards: python -m benchmarks.fit_costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.processes import measured, peak_bytes, python
from benchmarks.world import ROOT

from rlhf_core.costs.calibration import FOLDER
from rlhf_core.costs.seconds import TIMED_STAGES

ITERATIONS, WARM_UP = 3, 1


@dataclass(frozen=True)
class Spec:
    """One point of the grid; the defaults are its middle."""

    name: str
    hidden_size: int = 256
    layers: int = 4
    vocabulary: int = 4096
    batch_size: int = 32
    prompt_words: int = 6
    response_len: int = 24
    epochs: int = 1
    critic: str = "separate"
    held_out: bool = False
    """Not fitted to: decided here, before anything was measured."""


GRID = (
    Spec("tiny", hidden_size=64, layers=2, vocabulary=300),
    Spec("tiny, batch 128", hidden_size=64, layers=2, vocabulary=300, batch_size=128),
    Spec("small", hidden_size=128, vocabulary=1024),
    Spec("batch 16", batch_size=16),
    Spec("batch 64", batch_size=64),
    Spec("long responses", response_len=96),
    Spec("deep, shared critic", layers=8, critic="shared"),
    Spec("large vocabulary", vocabulary=32768),
    Spec("15 M", hidden_size=384, layers=6, vocabulary=8192, response_len=32),
    Spec("30 M", hidden_size=512, layers=8, vocabulary=8192, batch_size=16, response_len=32),
    Spec("30 M, long, shared critic", hidden_size=512, layers=8, vocabulary=8192, response_len=64, critic="shared"),
    Spec("60 M, shared critic", hidden_size=512, layers=16, vocabulary=16384, batch_size=16, critic="shared"),
    Spec("1 M", hidden_size=96, layers=3, vocabulary=300, batch_size=64, response_len=48, held_out=True),
    Spec("3 M", hidden_size=192, layers=6, vocabulary=2048, batch_size=48, response_len=32, held_out=True),
    Spec("8 M, two epochs", hidden_size=320, layers=5, response_len=48, epochs=2, held_out=True),
    Spec("28 M", hidden_size=448, layers=10, vocabulary=8192, batch_size=24, response_len=40, held_out=True),
    Spec("four epochs", batch_size=128, response_len=16, epochs=4, critic="shared", held_out=True),
    Spec("64 M", hidden_size=640, layers=12, vocabulary=8192, batch_size=16, held_out=True),
)  # fmt: skip


def small(spec: Spec) -> Spec:
    """The same point at a size that only shows that it runs."""
    return replace(spec, hidden_size=32, layers=2, vocabulary=300, batch_size=8, response_len=6)


def make_world(spec: Spec, root: Path) -> None:
    """Policy and reward model with random weights, and prompts of some words."""
    import torch
    import transformers
    from tiny_world import EOS, make_tokenizer
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    transformers.logging.disable_progress_bar()
    words = [
        "the",
        "film",
        "was",
        "slow",
        "and",
        "this",
        "story",
        "felt",
        "bright",
        "but",
        "her",
        "first",
        "novel",
        "seemed",
        "long",
    ]
    dice = random.Random(0)
    texts = [" ".join(dice.choices(words, k=spec.prompt_words)) + f" {i}" for i in range(2 * spec.batch_size)]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer = make_tokenizer(texts[:40])
    eos: Any = tokenizer.convert_tokens_to_ids(EOS)
    pad: Any = tokenizer.pad_token_id
    sizes = GPT2Config(
        vocab_size=max(spec.vocabulary, len(tokenizer)),
        n_positions=512,
        n_embd=spec.hidden_size,
        n_layer=spec.layers,
        n_head=max(2, spec.hidden_size // 64),
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    sizes.num_labels = 1
    torch.manual_seed(0)
    for name, kind in (("policy", GPT2LMHeadModel), ("reward", GPT2ForSequenceClassification)):
        kind(sizes).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def tree(spec: Spec, root: Path, threads: int) -> dict[str, Any]:
    """The config of a point."""
    return {
        "num_iterations": ITERATIONS,
        "device": "cpu",
        "num_threads": threads,
        "prompts": {"source": str(root / "prompts.jsonl"), "batch_size": spec.batch_size},
        "policy": {"model": str(root / "policy"), "critic": {"kind": spec.critic}},
        "reward": {"components": [{"kind": "model", "model": str(root / "reward")}]},
        "generation": {"max_new_tokens": spec.response_len},
        "ppo": {"num_ppo_epochs": spec.epochs, "num_minibatches": 4, "learning_rate": 1e-6},
        "tracking": {"enabled": False},
    }


def measure_one(spec: Spec, root: Path, threads: int, out: Path) -> None:
    """In this process: run, then write seconds, peak and the workload as it truly was."""
    from benchmarks.bare_loop import iteration

    from flows.commands.options import prepare_environment

    prepare_environment()
    from rlhf_core.contracts.config_io import build_config
    from rlhf_core.contracts.run_folder import RunFolder
    from rlhf_core.costs.reading import read_workload
    from rlhf_core.tables import open_run
    from tasks.lifecycle.start import start_run

    config, run_dir = build_config(tree(spec, root, threads), []), root / "run"
    start_run(config, str(run_dir))
    with ThreadPoolExecutor(2) as pool:
        for index in range(ITERATIONS):
            iteration(str(run_dir), index, pool)
    peak = peak_bytes()
    run = RunFolder.open(run_dir)
    manifests = [run.manifests(index) for index in range(WARM_UP, ITERATIONS)]
    seconds = {stage: min(m[stage].timing["total_s"] for m in manifests) for stage in TIMED_STAGES}
    samples = open_run(run_dir).samples(list(range(WARM_UP, ITERATIONS))).pandas()
    lens = [len(tokens) for tokens in samples["response_tokens"]]
    workload = replace(
        read_workload(config, threads)[0], response_len=round(statistics.mean(lens)), longest_response=max(lens)
    )
    found = {"workload": workload.to_json(), "seconds": seconds, "peak_bytes": peak}
    out.write_text(json.dumps(found))


def measure(spec: Spec, threads: int) -> dict[str, Any]:
    """A point, in a process of its own, as points.json holds it."""
    source = provenance()
    with tempfile.TemporaryDirectory(prefix="rlhf-cost-point-") as folder:
        root = Path(folder)
        (root / "spec.json").write_text(json.dumps(asdict(spec)))
        make_world(spec, root)
        measured(
            python("benchmarks.cost_points", "--one", root, "--threads", threads), threads=threads, folder=root / "log"
        )
        found = json.loads((root / "found.json").read_text())
    return {
        "name": spec.name,
        "hardware": "1xCPU2",
        "threads": threads,
        "workload": found["workload"],
        "rows": [
            {"stage": stage, "seconds": round(seconds, 5), "held_out": spec.held_out}
            for stage, seconds in found["seconds"].items()
        ],
        "peak_bytes": found["peak_bytes"],
        "memory_held_out": spec.held_out,
        "source": source,
    }


def provenance() -> str:
    """When, on what, beside what, with what."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    cpus = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    machine = f"{cpus} cores ({platform.machine()}), load {load:.1f}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine}, {libraries}, commit {commit}"


def replace_point(path: Path, new: Mapping[str, Any]) -> None:
    """One of the same hardware and name makes way; all others stay, in their order."""
    old = json.loads(path.read_text()) if path.exists() else []
    places = [(point["hardware"], point["name"]) for point in old]
    if (place := (new["hardware"], new["name"])) in places:
        old[places.index(place)] = new
    else:
        old.append(new)
    path.write_text(json.dumps(old, indent=1) + "\n")


def main() -> None:
    """Measure the grid, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[spec.name for spec in GRID])
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", type=Path, default=FOLDER / "points.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        spec = Spec(**json.loads((given.one / "spec.json").read_text()))
        measure_one(spec, given.one, given.threads, given.one / "found.json")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the process of a point ends with this one
    for spec in GRID:
        if given.only and spec.name not in given.only:
            continue
        point = measure(small(spec) if given.small else spec, given.threads)
        replace_point(given.out, point)
        shown = ", ".join(f"{row['stage']} {row['seconds']:.3f} s" for row in point["rows"])
        print(f"{spec.name}: {shown}; peak {point['peak_bytes'] / 1e6:,.0f} MB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
