"""First values of a training by the size of its policy, and where each comes from. `rlhf config --for-model` uses them.

| parameters | all weights | critic | LoRA | where from |
|---|---|---|---|---|
| up to 20 M | 2e-4 | 1e-4 | 6e-4 | [1]; LoRA: three times as much, not measured |
| up to 500 M | 3e-5 | 1.5e-5 | 3e-4 | LoRA: [2]; all weights: a tenth of it, critic half of that, not measured |
| up to 3 B | 5e-6 | 5e-6 | 5e-5 | [3], critic [4]; LoRA: ten times, not measured |
| up to 20 B | 1e-6 | 9e-6 | 1e-5 | between [3] and [5], critic [5]; LoRA: ten times, not measured |
| more | 5e-7 | 9e-6 | 5e-6 | [5] at 8 B; LoRA: ten times, not measured |

[1] Measured here at 4 M: DECISIONS, "Learning on movie reviews" and what confirmed it.
[2] Measured here at 135 M: DECISIONS, "A real chat model"; its value head took 1e-3.
[3] InstructGPT (arXiv 2203.02155, appendix E.9): PPO at 1.3 B and 6 B diverged at all rates above 8.05e-6 where no
    pretraining data was mixed in. Its 9.65e-6 are those of supervised fine-tuning.
[4] DeepSpeed-Chat's script for OPT-1.3B: 5e-6 (its actor took 9.65e-6).
[5] OpenRLHF's script for Llama-3-8B: actor 5e-7, critic 9e-6.

An adapter takes about ten times the rate of all weights ("LoRA Without Regret", Thinking Machines 2025).

λ: TRL's PPO has 0.95 and VC-PPO (arXiv 2503.01491) 1.0 for the critic of long answers; here 0.9 was the better one on
short answers (DECISIONS, "Learning on movie reviews"), and it is the default.

β: OpenRLHF begins at 0.01, InstructGPT at 0.02, TRL at 0.05 to 0.2; here a controller moves it to hold the KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LORA_RANK: Final = 16
"""Ranks beyond it gain little in reinforcement learning ("LoRA Without Regret")."""
SHARE_OF_MEMORY: Final = 0.8
"""The plan's estimate may take this share of the free memory; decoding's cache and the libraries come on top."""
CACHE_SHARE: Final = 0.25
"""Keys and values of a decoding batch may take this share of the free memory."""
CONTEXT_OF_PROMPTS: Final = 512
"""Tokens of the longest prompt, where the model could read more than twice as many."""
MINIBATCHES: Final = 4
ITERATIONS: Final = 40
SMALL: Final = 20e6
"""Parameters of a policy whose weights are all trained even on a CPU: an adapter saves nothing there."""
ADAPTER_SAVES: Final = "an iteration took 14 s with an adapter and 33 s without, at 135 M on two cores"
"""Measured: DECISIONS, "A real chat model"."""
MEASURED_AT: Final = "held within 10 % at 135 M: 4.59 nats (quickstart --model real)"


@dataclass(frozen=True)
class SizeDefaults:
    """Learning rates of policies up to a size.

    Example: ``SizeDefaults(500e6, 3e-5, "a guess", 1e-5, "a guess", 3e-4, "measured")``
    """

    up_to: float
    """Parameters."""
    all_weights: float
    all_weights_from: str
    critic: float
    """Learning rate of a separate critic."""
    critic_from: str
    adapter: float
    adapter_from: str


_TEN: Final = "ten times that of all weights, not measured"
_OPENRLHF: Final = "OpenRLHF at 8 B"
BY_SIZE: Final = (
    SizeDefaults(20e6, 2e-4, "measured at 4 M", 1e-4, "measured at 4 M", 6e-4, "three times as much, not measured"),
    SizeDefaults(
        500e6, 3e-5, "a tenth of an adapter's, not measured", 1.5e-5, "half the policy's, not measured", 3e-4,
        "measured at 135 M",
    ),
    SizeDefaults(
        3e9, 5e-6, "InstructGPT's PPO diverged above 8.05e-6 at 1.3 B", 5e-6, "DeepSpeed-Chat at 1.3 B", 5e-5, _TEN
    ),
    SizeDefaults(20e9, 1e-6, "OpenRLHF at 8 B: 5e-7; InstructGPT at 6 B: below 8.05e-6", 9e-6, _OPENRLHF, 1e-5, _TEN),
    SizeDefaults(float("inf"), 5e-7, _OPENRLHF, 9e-6, _OPENRLHF, 5e-6, _TEN),
)  # fmt: skip
"""The table above."""
HEAD_RATE: Final = 1e-3
"""Learning rate of a value head on the policy's trunk, measured at 135 M with an adapter."""


def defaults_of(parameters: int) -> SizeDefaults:
    """The line of the table for a policy of so many parameters."""
    return next(line for line in BY_SIZE if parameters <= line.up_to)


def wanted_responses(parameters: int, device: str) -> int:
    """Responses of an iteration where neither data nor memory limit them: 256 as in TRL and here, fewer on a CPU."""
    if device == "cuda":
        return 256
    return 64 if parameters <= SMALL else 32


def response_length(context: int | None, device: str) -> int:
    """Tokens of a response to begin with: a quarter of the context at most."""
    return min(256 if device == "cuda" else 48, max(8, (context or 1024) // 4))
