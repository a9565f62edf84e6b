"""The six stages in a bare loop: the same functions and Arrow files as `rlhf train`, no Prefect run, no MLflow.

    python -m benchmarks.bare_loop --config FILE [--set a.b=c ...] --run-dir DIR

As in the flow, score_rewards and reference_logprobs run side by side, in two plain threads.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flows.commands.options import prepare_environment
from rlhf_core.contracts.config_io import load_config
from tasks.generate import generate
from tasks.lifecycle.start import start_run
from tasks.ppo_update import ppo_update
from tasks.reference_logprobs import reference_logprobs
from tasks.sample_prompts import sample_prompts
from tasks.score_rewards import score_rewards
from tasks.shape_rewards import shape_rewards


def iteration(run_dir: str, index: int, threads: ThreadPoolExecutor) -> None:
    """Six functions, in the order of the algorithm."""
    prompts = sample_prompts.fn(run_dir, index)
    rollouts = generate.fn(run_dir, index, prompts)
    responses = (run_dir, index, prompts, rollouts)
    scores = threads.submit(score_rewards.fn, *responses)
    ref_logprobs = threads.submit(reference_logprobs.fn, *responses)
    experience = shape_rewards.fn(run_dir, index, prompts, rollouts, scores.result(), ref_logprobs.result())
    ppo_update.fn(run_dir, index, prompts, rollouts, experience)


def main() -> None:
    """Run all iterations of a config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--run-dir", type=Path, required=True)
    given = parser.parse_args()
    prepare_environment()
    config = load_config(given.config, given.overrides)
    start_run(config, str(given.run_dir))
    with ThreadPoolExecutor(2) as threads:
        for index in range(config.num_iterations):
            iteration(str(given.run_dir), index, threads)


if __name__ == "__main__":
    main()
