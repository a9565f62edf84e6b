"""How cost grows: with batch, response length, vocabulary and model; and the memory of log-probs."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.figures import Figure, alternate, log_log_slope, ratio
from benchmarks.processes import measured, python
from benchmarks.random_models import Size
from benchmarks.suite import Effort, Grid, Result

NAME = "how cost grows"
GOAL = "time linear in tokens (exponent 1.1); log-probs at 152 k tokens in an eighth of the full logits' memory"
STAGES = ("generate", "ppo_update")
TOLERANCE = 1e-4
"""Largest difference of log-probs, entropies and gradients, relative to the largest entry."""
Series = dict[str, list[Size]]


def measure(effort: Effort) -> Result:
    """Every point in a process of its own, all points in turns."""
    series = _series(effort)
    points = {_key(size): size for sizes in series.values() for size in sizes}
    sides = {key: lambda turn, s=size: _throughput(effort, s, turn) for key, size in points.items()}
    rounds = alternate(sides, effort.rounds)
    found = {key: {s: statistics.median(t[s] for t in turns) for s in STAGES} for key, turns in rounds.items()}
    slopes = {
        f"{stage}, {name}": _slope(series[name], found, stage) for name in ("batch", "response") for stage in STAGES
    }
    memory = _logprobs(effort)
    return Result(
        [
            *[Figure(f"exponent of time: {name}", slope, 1.1, "at most") for name, slope in slopes.items()],
            Figure("log-probs' memory, over full logits'", memory["ratio"], 1 / 8, "at most", "x"),
            Figure("largest difference of their values", memory["difference"], TOLERANCE, "at most"),
        ],
        [
            *[
                Grid(f"response tokens a second by {name}", (name, *STAGES), _rows(name, sizes, found))
                for name, sizes in series.items()
            ],
            Grid(
                f"log-probs at {memory['positions']:,} positions, vocabulary {memory['vocabulary']:,}",
                ("", "MB"),
                [[kind, f"{memory[kind] / 1e6:,.0f}"] for kind in ("ours", "full")],
            ),
        ],
        ["GPT-2 with random weights, a shared critic, every response at full length, one epoch of four steps"],
        {"throughput": rounds, "slopes": slopes, "logprobs": memory},
    )


def _series(effort: Effort) -> Series:
    if effort.small:
        base = Size(batch=8, response_len=8, vocabulary=300, hidden_size=32, layers=1, heads=2)
        steps: dict[str, list[int]] = {"batch": [4, 8], "response": [4, 8], "vocabulary": [300, 600]}
        models = [(32, 1), (64, 2)]
    else:
        base = Size()
        steps = {"batch": [16, 32, 64, 128, 256], "response": [16, 32, 64, 128, 256]}
        steps["vocabulary"] = [4096, 16_384, 50_257, 152_064]
        models = [(128, 2), (256, 4), (512, 8), (768, 12)]
    return {
        "batch": [replace(base, batch=n) for n in steps["batch"]],
        "response": [replace(base, response_len=n) for n in steps["response"]],
        "vocabulary": [replace(base, vocabulary=n) for n in steps["vocabulary"]],
        "model": [replace(base, hidden_size=d, layers=n, heads=max(d // 64, 2)) for d, n in models],
    }


def _throughput(effort: Effort, size: Size, turn: int) -> dict[str, float]:
    folder = effort.folder / f"{_key(size)}-{turn}"
    options = [str(p) for name, value in asdict(size).items() for p in (f"--{name.replace('_', '-')}", value)]
    command = python("benchmarks.scaling", folder / "found.json", "--repeats", effort.size(1, 3), *options)
    measured(command, threads=effort.threads, folder=folder)
    effort.say(f"round {turn}: {_key(size)}")
    return json.loads((folder / "found.json").read_text())


def _logprobs(effort: Effort) -> dict[str, Any]:
    positions, vocabulary = effort.size(256, 2048), effort.size(20_000, 152_064)
    found: dict[str, Any] = {"positions": positions, "vocabulary": vocabulary}
    files: dict[str, Path] = {}
    for kind in ("ours", "full"):
        folder = effort.folder / f"logprobs-{kind}"
        files[kind] = folder / "found.json"
        options = ("--logprobs", kind, "--positions", positions, "--vocabulary", vocabulary)
        measured(python("benchmarks.scaling", files[kind], *options), threads=effort.threads, folder=folder)
        found[kind] = json.loads(files[kind].read_text())["bytes"]
    ours, full = (np.load(files[kind].with_suffix(".npz")) for kind in ("ours", "full"))
    differences = [float(np.abs(ours[name] - full[name]).max() / np.abs(full[name]).max()) for name in full.files]
    return found | {"ratio": ratio(found["ours"], found["full"]), "difference": max(differences)}


def _slope(sizes: list[Size], found: dict[str, dict[str, float]], stage: str) -> float:
    tokens = [size.batch * size.response_len for size in sizes]
    seconds = [count / found[_key(size)][stage] for count, size in zip(tokens, sizes, strict=True)]
    return log_log_slope(tokens, seconds)


def _key(size: Size) -> str:
    return f"b{size.batch}-r{size.response_len}-v{size.vocabulary}-d{size.hidden_size}-l{size.layers}"


def _rows(name: str, sizes: list[Size], found: dict[str, dict[str, float]]) -> list[list[str]]:
    def label(size: Size) -> str:
        told = {"batch": size.batch, "response": size.response_len, "vocabulary": size.vocabulary}
        return f"{size.layers} layers x {size.hidden_size}" if name == "model" else f"{told[name]:,}"

    return [[label(size), *(f"{found[_key(size)][stage]:,.0f}" for stage in STAGES)] for size in sizes]
