"""The meaning of every metric that a run logs: the reference page of the documentation prints this table.

``tests/test_house.py`` compares the names with those that the code logs, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

METRIC_MEANINGS: Final[Mapping[str, str]] = {
    "objective/scores": "mean raw score",
    "objective/scores_std": "standard deviation of the raw scores",
    "objective/kl": "KL to the reference by k1: summed over a response's tokens, mean over responses; nats",
    "kl/k3": "the same KL by k3, which is never negative; a k1 below 0 beside a k3 well above it means that the "
    "supports of policy and reference differ",
    "kl/beta": "KL coefficient β of the iteration",
    "kl/target": "KL target of the controller; nats per response",
    "objective/rlhf_reward": "mean of R(x, y) = shaped score − β · KL penalty",
    "objective/non_score_reward": "KL part of `objective/rlhf_reward`",
    "objective/entropy": "entropy of the behaviour policy, summed over a response; nats",
    "policy/entropy_avg": "entropy of the behaviour policy per token; nats",
    "reward/<component>": "mean raw score of each component, over the responses that it scored",
    "reward/<component>_failed": "responses that the component could not score; its `on_error` decides what happens to "
    "them",
    "spread/<component>": "standard deviation of each component's raw scores, over the responses that it scored",
    "policy/approxkl_avg": "KL(π_old ‖ π) per token (ρ − 1 − log ρ) at either `ppo.level`: mean over optimiser steps; "
    "nats",
    "policy/last_approxkl": "the same KL at the last optimiser step",
    "policy/clipfrac_avg": "share of tokens whose ratio is clipped (of responses at `ppo.level: sequence`): mean over "
    "optimiser steps",
    "val/clipfrac_avg": "share of tokens whose value is clipped: mean over optimiser steps",
    "policy/grad_norm": "gradient norm before clipping",
    "loss/policy_avg": "policy loss: mean over optimiser steps",
    "loss/value_avg": "value loss: mean over optimiser steps",
    "val/ratio": "mean ratio ρ: mean over optimiser steps",
    "loss/k3_avg": "k3 per token from the policy that is being updated to the reference: mean over optimiser steps",
    "val/explained_variance": "share of the returns' variance that the critic's values explain",
    "advantages/mean": "mean advantage before whitening, over tokens, or over responses where the estimator gives one "
    "advantage per response",
    "advantages/std": "standard deviation of the same advantages",
    "rollout/response_len": "mean response length; tokens",
    "rollout/num_tokens": "response tokens of the iteration",
    "rollout/eos_rate": "share of responses that ended with an EOS token",
    "rollout/stop_rate": "share of responses that ended with a stop sequence",
    "rollout/truncated_rate": "share of responses cut at the length limit",
    "rollout/repetition": "share of a response's bigrams that occurred in it before",
    "rollout/distinct_2": "distinct bigrams of all responses together, as a share of all their bigrams",
    "rollout/score_length_corr": "Pearson correlation of score and response length",
    "prompts/epoch": "epoch of the prompt set that the iteration ends in",
    "prompts/mean_len": "mean prompt length; tokens",
    "prompts/truncated": "prompts cut on the left",
    "prompts/dropped": "prompts left out because they are too long",
    "sampler/logprob_gap_avg": "mean of |log-prob by the sampler − log-prob by the policy that learns|; logged with "
    "`execution.overlap` or another `generation.engine`",
    "sampler/logprob_gap_max": "largest such gap",
    "sampler/weight_avg": "mean importance weight of those tokens; about 1",
    "sampler/capped_fraction": "share of importance weights that reach `ppo.importance_cap`",
    "update/num_steps": "optimiser steps taken",
    "update/early_stopped": "1 if `ppo.target_kl` ended the epochs early",
    "guard/<name>": "1 if the guard has tripped",
    "guard/first_max_abs_log_ratio": "largest |log ρ| of the first minibatch; checked in every iteration: it must be "
    "about 0",
    "guard/skipped_steps": "optimiser steps skipped because they were not finite",
    "guard/flat_batch": "1 if the batch had no variance and was centred only",
    "guard/dropped_metrics": "metrics not sent because they were not finite",
    "eval/score": "mean score on held-out prompts",
    "eval/gain": "mean score on held-out prompts minus the reference's",
    "eval/kl": "KL to the reference by k1, summed over a response; nats",
    "eval/k3": "the same KL by k3; nats",
    "eval/win_rate": "probability that a response scores higher than the reference's to the same prompt; a tie counts "
    "half",
    "eval/attainable_score": "best mean score at this KL",
    "eval/share_of_attainable": "share of the attainable gain that the policy has",
    "eval/response_len": "mean response length; tokens",
    "eval/eos_rate": "share of responses that ended with an EOS token",
    "eval/entropy": "entropy summed over a response; nats",
    "eval/distinct_1": "distinct tokens of all responses, as a share of all their tokens",
    "eval/distinct_2": "distinct bigrams of all responses, as a share of all their bigrams",
    "eval/repetition": "share of a response's bigrams that occurred in it before",
    "achieved/score": "mean score of the last five iterations",
    "achieved/kl": "mean KL of the last five iterations; nats",
    "achieved/beta": "mean β of the last five iterations",
    "achieved/entropy": "mean entropy of the last five iterations",
    "achieved/response_len": "mean response length of the last five iterations; tokens",
    "achieved/gain_per_nat": "score gained over the first batch (which the reference sampled) per nat of KL",
    "achieved/best_score": "best mean score of five consecutive iterations",
    "achieved/best_score_kl": "KL of those five iterations; nats",
    "achieved/iteration_s": "mean seconds per iteration",
    "system/process_cpu_percentage": "CPU use of the process during the iteration; 100 is one core",
    "system/process_memory_megabytes": "largest memory of the process at the end of a stage",
    "system/process_peak_memory_megabytes": "peak memory of the process so far",
    "system/gpu_peak_memory_megabytes": "peak memory on a CUDA device",
    "lr": "learning rate",
    "episode": "responses sampled so far",
    "checkpoint/value": "mean of score − kl.coef · KL since the previous checkpoint; it decides `@best`",
    "time/<stage>_s": "seconds of each stage",
    "time/iteration_s": "seconds of the iteration",
    "rate/<stage>_tokens_per_s": "response tokens per second of each stage with a model; the update counts every epoch",
}
"""Name, with placeholders in angle brackets -> meaning."""
