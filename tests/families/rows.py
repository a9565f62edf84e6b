"""One row of the table: a family through check, two iterations and a checkpoint, each number against transformers."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from iteration import CPU, Bench

from families.models import save_tiny, tiny_config
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.config_io import build_config
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor, LoopState
from rlhf_core.models.checkpoints import load_checkpoint, save_checkpoint
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight
from rlhf_core.preflight.probe import probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SECONDS = 120
"""For one family; a longer one counts as died."""
TOLERANCE = 2e-3
"""Largest difference that a cell may show, of log-probs in nats, values, and scores relative to the largest (or 1)."""


@dataclass
class Row:
    """What was found of one family.

    Example: ``Row("llama", cells={"log-probs": 2e-6, "KL": 0.0})``, ``Row("rwkv", refusal="…")``
    """

    kind: str
    cells: dict[str, float] = field(default_factory=dict[str, float])
    refusal: str | None = None
    """The sentence of check."""
    not_made: str | None = None
    """Why transformers itself makes no tiny model of it."""
    died: str | None = None
    """An exception after a passed check: a fault of this project."""

    @property
    def is_right(self) -> bool:
        """Whether every cell is a small number, or check has refused the family in one sentence."""
        return self.died is None and all(abs(value) <= TOLERANCE for value in self.cells.values())

    def name_folder(self, folder: str, name: str) -> None:
        """Write a name in place of a temporary folder, in what was said."""
        self.refusal, self.died = (text and text.replace(folder, name) for text in (self.refusal, self.died))


def measured(kind: str, measure: Callable[[str, Path, PreTrainedTokenizerBase], Row], root: Path) -> Row:
    """Return a row, or that it took too long. Called in a process of its own."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {MAX_SECONDS} seconds")

    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        return measure(kind, root, load_tokenizer(str(root / "policy"), field="policy.model"))
    except TimeoutError as error:
        return Row(kind, died=str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def policy_row(kind: str, world: Path, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A family as the policy, with a critic of its own that starts from it.

    Args:
        kind: the ``model_type``.
        world: folder with ``prompts.jsonl``.
        tokenizer: of the model.
    """
    row = Row(kind)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "policy"
        try:
            save_tiny(tiny_config(kind, tokenizer), "AutoModelForCausalLM", folder, tokenizer)
        except Exception as error:
            row.not_made = _first_line(error)
            return row
        reward = {"kind": "function", "function": "length"}
        _fill(row, _config(folder, world, reward), lambda bench: _policy_cells(row, bench, folder, Path(place)))
        row.name_folder(place, "MODELS")
    return row


def reward_row(kind: str, world: Path, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A family as the reward model of the tiny policy in ``world / "policy"``."""
    row = Row(kind)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "reward"
        try:
            config = tiny_config(kind, tokenizer, num_labels=1)
            save_tiny(config, "AutoModelForSequenceClassification", folder, tokenizer)
        except Exception as error:
            row.not_made = _first_line(error)
            return row
        reward = {"kind": "model", "model": str(folder), "batch_size": 8}
        _fill(row, _config(world / "policy", world, reward), lambda bench: _reward_cells(row, bench, folder))
        row.name_folder(place, "MODELS")
    return row


def _fill(row: Row, config: RunConfig, measure: Any) -> None:
    """Check as ``train`` does, then measure."""
    try:
        probe(config, preflight(config))
    except UserError as error:
        row.refusal = " ".join(error.problems)
        return
    except Exception as error:
        row.died = f"check: {_first_line(error)}"
        return
    try:
        measure(Bench.of(config))
    except Exception as error:
        row.died = _first_line(error)


def _policy_cells(row: Row, bench: Bench, folder: Path, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    critic = bench.trainer.actor_critic.critic
    assert critic is not None
    with torch.no_grad():
        critic.head.weight.copy_(torch.linspace(-1, 1, critic.head.weight.numel())[None])
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    mask_BR = rollouts.response_mask_BR
    expected_BR, values_BR = torch.zeros_like(rollouts.logprobs_BR), torch.zeros_like(rollouts.logprobs_BR)
    for i, row_of_prompt in enumerate(rollouts.prompt_rows.tolist()):
        asked = prompts.tokens_QP[row_of_prompt][prompts.mask_QP[row_of_prompt]].tolist()
        reply = rollouts.tokens_BR[i][mask_BR[i]].tolist()
        logprobs, hidden_RD = _plain_pass(plain, asked, reply)
        expected_BR[i, : len(reply)] = logprobs
        values_BR[i, : len(reply)] = hidden_RD @ critic.head.weight[0]
    row.cells["log-probs"] = _largest(rollouts.logprobs_BR - expected_BR, mask_BR)
    assert rollouts.values_BR is not None
    row.cells["values"] = _relative(rollouts.values_BR - values_BR, values_BR, mask_BR)
    ref = bench.ref_logprobs(prompts, rollouts).batch
    shaped = bench.experience(rollouts, bench.scores(prompts, rollouts).batch, ref).batch
    row.cells["KL"] = float(shaped.token_kl_BR.abs().max())
    before = [p.detach().clone() for _, p in bench.trainer.actor_critic.policy_parameters()]
    update = bench.update(prompts, rollouts, shaped)
    row.cells["log ratio"] = update.metrics["guard/first_max_abs_log_ratio"]
    row.cells["skipped steps"] = update.metrics["guard/skipped_steps"]
    moved = any(
        not torch.equal(old, p)
        for old, (_, p) in zip(before, bench.trainer.actor_critic.policy_parameters(), strict=True)
    )
    row.cells["did not move"] = float(not moved)
    again = bench.prompts(Cursor(0, 8)).batch
    second = bench.rollouts(again, iteration=1).batch
    shaped = bench.experience(second, bench.scores(again, second).batch, bench.ref_logprobs(again, second).batch).batch
    row.cells["2nd log ratio"] = bench.update(again, second, shaped, iteration=1).metrics[
        "guard/first_max_abs_log_ratio"
    ]
    checkpoint = place / "checkpoint"
    save_checkpoint(checkpoint, bench.trainer, bench.plan.tokenizer.tokenizer, LoopState(2, 0.1))
    loaded, _ = load_checkpoint(checkpoint, bench.config, CPU)
    row.cells["loaded"] = float(loaded.digest() != bench.trainer.digest())
    elsewhere = AutoModelForCausalLM.from_pretrained(checkpoint / "policy", dtype=torch.float32).eval()
    asked = prompts.tokens_QP[0][prompts.mask_QP[0]].tolist()
    with torch.no_grad():
        ours = bench.trainer.actor_critic.policy.model(input_ids=torch.tensor([asked])).logits
        theirs = elsewhere(input_ids=torch.tensor([asked])).logits
    row.cells["opened elsewhere"] = float((ours - theirs).abs().max())


def _reward_cells(row: Row, bench: Bench, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    found_B = bench.scores(prompts, rollouts).batch.score_B
    expected: list[float] = []
    for i, row_of_prompt in enumerate(rollouts.prompt_rows.tolist()):
        asked = prompts.tokens_QP[row_of_prompt][prompts.mask_QP[row_of_prompt]].tolist()
        reply = rollouts.tokens_BR[i][rollouts.response_mask_BR[i]].tolist()
        with torch.no_grad():
            expected.append(float(plain(input_ids=torch.tensor([asked + reply])).logits[0, 0]))
    expected_B = torch.tensor(expected)
    row.cells["scores"] = _relative(found_B - expected_B, expected_B, torch.ones_like(expected_B, dtype=torch.bool))


def _plain_pass(model: Any, asked: Sequence[int], reply: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [R], hidden states [R, D]) of one unpadded row, by transformers alone."""
    tokens = torch.tensor([[*asked, *reply]])
    before = slice(len(asked) - 1, len(asked) + len(reply) - 1)
    with torch.no_grad():
        logprobs_LV = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
        trunk = model.base_model if model.base_model is not model else model.model  # Llama 4's prefix names no module
        hidden_LD = trunk(input_ids=tokens, use_cache=False).last_hidden_state[0].float()
    return logprobs_LV[before].gather(1, torch.tensor(reply)[:, None])[:, 0], hidden_LD[before]


def _config(policy: Path, world: Path, reward: dict[str, Any]) -> RunConfig:
    tree = {
        "seed": 7,
        "num_iterations": 3,
        "device": "cpu",
        "num_threads": 1,
        "prompts": {"source": str(world / "prompts.jsonl"), "batch_size": 8, "max_len": 32},
        "policy": {"model": str(policy), "critic": {"init": "policy"}},
        "reward": {"components": [reward]},
        "generation": {"max_new_tokens": 20},
        "ppo": {"num_ppo_epochs": 1, "num_minibatches": 2, "learning_rate": 1e-3},
        "tracking": {"enabled": False},
    }
    return build_config(tree)


def _largest(difference_BR: torch.Tensor, mask_BR: torch.Tensor) -> float:
    return float(difference_BR[mask_BR].abs().max())


def _relative(difference: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor) -> float:
    return float(difference[mask].detach().abs().max()) / max(1.0, float(scale[mask].abs().max()))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
