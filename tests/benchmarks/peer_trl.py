"""The peer: TRL's PPOTrainer (trl==1.12.0, the last release that ships it) on a world on disk.

    python -m benchmarks.peer_trl ASSETS OUT.json [--updates 10] [--batch 64] [--until SCORE] ...

ASSETS holds policy/, reward/ (one tokenizer) and prompts.jsonl. OUT.json: a record for each update (seconds since
training began, episodes, score, kl summed over a response's tokens by k1, entropy) and ``peak_bytes``, the VmHWM of
this process. With --until it stops once the mean score of five updates is there. Needs ``pip install -e ".[bench]"``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.processes import peak_bytes

WINDOW = 5
"""Updates whose mean score counts."""


class ReachedError(Exception):
    """The score is there: the peer's loop has no other way out."""


def parsed() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in (("updates", 10), ("batch", 64), ("minibatches", 4), ("epochs", 4), ("response-length", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("kl-coef", 0.05), ("lr", 1e-4), ("vf-coef", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until", type=float, help="stop at this mean score of five updates")
    return parser.parse_args()


def recorder(records: list[dict[str, float]], until: float | None) -> Any:
    """A callback that writes down each update, and ends training once the score is there."""
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "objective/scores" not in logs:
                return
            record = {"seconds": time.time() - self.began, "episodes": int(logs["episode"])}
            names = ("scores", "kl", "entropy")
            records.append(record | {name: float(logs[f"objective/{name}"]) for name in names})
            print(records[-1], flush=True)
            newest = [r["scores"] for r in records[-WINDOW:]]
            if until is not None and len(newest) == WINDOW and statistics.fmean(newest) >= until:
                raise ReachedError

    return Record()


def trainer(given: Any, callback: Any) -> Callable[[], Any]:
    """The peer's training loop, ready to go."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    trl: Any = importlib.import_module("trl.experimental.ppo")  # an extra, which is not there when types are checked
    policy, reward = given.assets / "policy", given.assets / "reward"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (given.assets / "prompts.jsonl").open()]
    data = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    args = trl.PPOConfig(
        output_dir=tempfile.mkdtemp(dir=given.out.parent),
        per_device_train_batch_size=given.batch // given.minibatches,
        gradient_accumulation_steps=given.minibatches,
        num_mini_batches=given.minibatches,
        num_ppo_epochs=given.epochs,
        total_episodes=given.batch * given.updates,
        response_length=given.response_length,
        temperature=1.0,
        kl_coef=given.kl_coef,
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        vf_coef=given.vf_coef,
        stop_token="eos",
        num_sample_generations=0,
        local_rollout_forward_batch_size=given.batch,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=given.seed,
        disable_tqdm=True,
    )
    return trl.PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(policy),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        callbacks=[callback],
    ).train


def main() -> None:
    """Train; write what was recorded."""
    given = parsed()
    torch.set_num_threads(given.threads)
    random.seed(given.seed)
    torch.manual_seed(given.seed)
    records: list[dict[str, float]] = []
    reached = False
    try:
        trainer(given, recorder(records, given.until))()
    except ReachedError:
        reached = True
    found = {"updates": records, "reached": reached, "peak_bytes": peak_bytes()}
    given.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
