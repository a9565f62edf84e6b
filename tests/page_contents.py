"""Contents of pages that no run has: thousands of samples, and texts that want to be more than text."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_core.tables import PER_TOKEN

ATTACKS = (
    "</script><script>window.attacked = 1</script>",
    '<img src=x onerror="window.attacked = 2">',
    "<svg onload='window.attacked = 3'><style>body { display: none }</style></svg>",
    "--><!--<script>window.attacked = 4</script>",
    "javascript:window.attacked = 5",
    "{{constructor.constructor('window.attacked = 6')()}} ${window.attacked = 6} &lt;b&gt; &amp;",
    "\u202egnp.exe \u2066isolated\u2069 \u200f",
    "NUL \x00, bell \x07, escape \x1b[31m, delete \x7f, line \u2028 and paragraph \u2029",
    "a lone \ud800 surrogate \udfff",
    "<iframe srcdoc='<script>parent.attacked = 7</script>'></iframe><base href=http://127.0.0.1:9/><link rel=stylesheet href=http://127.0.0.1:9/x>",
    "Z̸̢̛͇a̷l̵g̶o " * 40,
    "x" * 100_000,
)
CHAT = 21
"""The prompt that is a chat."""
KEPT = frozenset({"type", "base64", "id"})
"""Keys of contents that are no text of a model: kinds of columns, numbers, and ids."""


def column(values: np.ndarray) -> dict[str, str]:
    kind = "u4" if np.issubdtype(values.dtype, np.integer) else "f4"
    return {"type": kind, "base64": base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()}


def decoded(given: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(given["base64"]), dtype=f"<{given['type']}")


def made_contents(num_samples: int, num_tokens: int, num_iterations: int = 10) -> dict[str, Any]:
    """A page of made-up samples, spread over iterations."""
    random = np.random.default_rng(7)
    count = num_samples * num_tokens

    def floats(size: int) -> dict[str, str]:
        return column(random.normal(size=size))

    iteration = np.sort(np.arange(num_samples) % num_iterations)
    words = [f" word{i}" for i in range(500)]
    curve = list(np.linspace(0.2, 3.0, num_iterations))
    return {
        "run": {
            "name": "made", "quoted_path": "runs/made", "policy": "made/policy", "num_finished": num_iterations,
            "num_iterations": num_iterations, "kl_target": 2.0, "shown": list(range(num_iterations)),
            "num_responses": num_samples, "note": None,
        },
        "curves": {"iteration": list(range(num_iterations))}
        | dict.fromkeys(("score", "kl", "beta", "entropy", "length"), curve),
        "prompts": [f"prompt number {i}" for i in range(50)],
        "asked": [f"question {i}" if i == CHAT else None for i in range(50)],
        "finish_reasons": ["eos", "length"],
        "vocabulary": words,
        "samples": {
            "id": [f"i{iteration[i]:06d}-p{i:06d}-s0" for i in range(num_samples)],
            "response": [" ".join(words[(i + j) % 500] for j in range(num_tokens)) for i in range(num_samples)],
            "numbers": {
                "iteration": column(iteration),
                "length": column(np.full(num_samples, num_tokens)),
                "prompt": column(np.arange(num_samples) % 50),
                "finish_reason": column(np.arange(num_samples) % 2),
                **{n: floats(num_samples) for n in ("score", "score_shaped", "kl", "k3", "rlhf_reward")},
                "max_abs_advantage": floats(num_samples),
            },
            "components": {"taste": floats(num_samples)},
        },
        "tokens": {"token": column(random.integers(0, 500, count))}
        | {name: floats(count) for name in PER_TOKEN if name != "token_id"},
        "before_after": [],
        "evaluation": None,
    }  # fmt: skip


def evaluation(name: str = "held-out") -> dict[str, Any]:
    """What a page says of an evaluation."""
    at = {"mean": 1.0, "low": 0.8, "high": 1.2}
    return {
        "name": name,
        "reference_score": 0.2,
        "frontier": {"kl": [0.0, 1.0, 2.0, 3.0], "score": [0.2, 1.8, 2.6, 3.0], "trusted": [True, True, True, False]},
        "best_of_n": [{"n": 2, "kl": 0.19, "score": 0.9}],
        "policies": [
            {"name": f"{name}@0.5", "base": name, "kl": {k: v / 2 for k, v in at.items()}, "score": at, "share": None},
            {"name": name, "base": name, "kl": at, "score": {k: 2 * v for k, v in at.items()}, "share": 0.7},
        ],
    }


def with_texts(value: Any, text: Callable[[], str]) -> Any:
    """The same contents with another text in the place of each that comes from outside."""
    if isinstance(value, dict):
        return {k: v if k in KEPT else with_texts(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [with_texts(item, text) for item in value]
    return text() if isinstance(value, str) else value
