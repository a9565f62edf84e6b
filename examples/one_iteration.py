"""One whole PPO iteration with `rlhf_core` alone: no Prefect, no MLflow, no file but the models.

    python examples/one_iteration.py FOLDER       # FOLDER: an empty folder for a tiny model; a few seconds

Suffixes of tensors name their shape: Q prompts, B responses, R response tokens. `m` marks real tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.loop_state import Cursor, LoopState, ScoreMoments
from rlhf_core.models.checkpoints import new_trainer
from rlhf_core.models.policy import load_reference
from rlhf_core.ops.controller import next_state
from rlhf_core.preflight import preflight
from rlhf_core.rewards.loading import load_component
from rlhf_core.stages.generate import generate
from rlhf_core.stages.ppo_update import ppo_update
from rlhf_core.stages.reference_logprobs import reference_logprobs
from rlhf_core.stages.sample_prompts import sample_prompts
from rlhf_core.stages.score_rewards import score_rewards
from rlhf_core.stages.shape_rewards import shape_rewards

CPU = torch.device("cpu")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


def tiny_model(folder: Path) -> RunConfig:
    """Write an untrained policy over bytes and its prompts; return a config for both, which rewards letters."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<end>", "<pad>", *bytes_])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(tokens), "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=1))
    wrapped.save_pretrained(folder / "policy")
    model.save_pretrained(folder / "policy")
    prompts = [f"{letter}{digit}" for letter in "ABCDEFGH" for digit in "12345678"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    reward = {"kind": "function", "function": "regex", "params": {"pattern": "[A-Za-z]", "mode": "count"}}
    tree: dict[str, Any] = {
        "reward": {"components": [reward]},
        "generation": {"max_new_tokens": 4},
        "ppo": {"learning_rate": 1e-3},
    }
    tree |= {"prompts": {"source": str(folder / "prompts.jsonl"), "batch_size": 64}}
    tree |= {"policy": {"model": str(folder / "policy"), "critic": {"init": "policy"}}}
    return RunConfig.model_validate(tree)


def one_iteration(config: RunConfig) -> None:
    """Sample, score, compare with the reference, shape, update, adapt β; assert each formula on its own numbers."""
    plan, trainer, state, seed = preflight(config), new_trainer(config, CPU), LoopState(0, config.kl.coef), config.seed
    policy_and_critic, reference = trainer.actor_critic, load_reference(config, CPU, None)
    section = config.reward.components[0]
    reward_model = load_component(section, field="reward", columns=[], policy_vocabulary="", device=CPU)

    # x ~ D: prompts without replacement
    prompts = sample_prompts(
        plan.prompt_set, plan.tokenizer, config.prompts, cursor=Cursor(), seed=seed, max_prompt_len=plan.max_prompt_len
    ).batch
    assert len(set(prompts.prompt_ids)) == 64

    # y ~ π_old(· | x), with log π_old(y_t) and V(x, y_<t)
    when: dict[str, Any] = {"seed": seed, "iteration": 0}
    rollouts = generate(
        policy_and_critic, plan.tokenizer, prompts, config.generation, samples_per_prompt=1, **when
    ).batch
    m, values_BR = rollouts.response_mask_BR, rollouts.values_BR
    assert values_BR is not None and (rollouts.logprobs_BR[m] < 0).all()  # noqa: PT018

    # r_θ(x, y), and log π_ref(y_t), which is log π_old(y_t) as long as nothing was trained
    scores = score_rewards([reward_model], prompts, rollouts, config.reward).batch
    ref = reference_logprobs(reference, prompts, rollouts, config.reference, temperature=1.0).batch
    torch.testing.assert_close(ref.ref_logprobs_BR[m], rollouts.logprobs_BR[m], **CLOSE)

    # r_t = −β · log(π_old/π_ref) + [t last] r_θ(x, y);   A_t = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ V_{t+1} − V_t
    now: dict[str, Any] = {"kl_coef": state.kl_coef, "moments": ScoreMoments(), "zero_kl_in": "float32"}
    experience = shape_rewards(rollouts, scores, ref, config.shaping, config.kl, **now).batch
    torch.testing.assert_close(experience.rewards_BR.sum(dim=1), scores.score_B - state.kl_coef * experience.kl_B)
    last = int(m[0].sum()) - 1
    deltas = experience.rewards_BR[0] - values_BR[0]
    deltas[:last] += values_BR[0, 1 : last + 1]  # γ = 1, and nothing follows the last token
    raw_A = sum(config.shaping.gae_lambda**t * float(deltas[t]) for t in range(last + 1))
    assert experience.returns_BR is not None
    torch.testing.assert_close(float(experience.returns_BR[0, 0]), raw_A + float(values_BR[0, 0]), **CLOSE)
    assert abs(float(experience.advantages_BR[m].mean())) < 1e-5, "advantages are whitened over the batch"

    # maximise E min(ρ A, clip(ρ, 1 ± ε) A) − c_v E (V − G)², ρ = π/π_old: four AdamW steps
    when |= {"temperature": 1.0, "max_response_len": 4, "num_iterations": 1}
    steps = ppo_update(trainer, prompts, rollouts, experience, config.ppo, **when).batch.steps
    assert abs(steps[0]["ratio_mean"] - 1) < 1e-5, "ρ ≡ 1 before the first step: the policy is π_old"
    assert steps[-1]["ratio_mean"] != 1, "and no longer after it"
    moved = reference_logprobs(policy_and_critic.policy, prompts, rollouts, config.reference, temperature=1.0).batch
    A, rho = experience.advantages_BR[m], (moved.ref_logprobs_BR - rollouts.logprobs_BR)[m].exp()
    gain = float(torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A).mean() - A.mean())
    assert gain > 0, "the surrogate has risen"

    # β ← β (1 + clip(KL/target − 1, ±0.2) n/K): the KL is 0, so β falls by 0.2 · 64/10000
    kl = float(experience.kl_B.mean())
    after = next_state(state, config.kl, kl=kl, num_samples=64, cursor=Cursor(), moments=ScoreMoments())
    assert abs(after.kl_coef / state.kl_coef - (1 - 0.2 * 64 / config.kl.horizon)) < 1e-6
    print(f"score {scores.score_B.mean():.3f}, surrogate +{gain:.4f}, β {state.kl_coef} → {after.kl_coef:.5f}")


if __name__ == "__main__":
    one_iteration(tiny_model(Path(sys.argv[1])))
