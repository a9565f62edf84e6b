"""Golden numbers of TRL: its functions are called, and the formulas inside PPOTrainer.train are executed as they stand.

    python tests/golden/make_trl.py OLD_TRL

OLD_TRL is a folder with trl 0.11.4, the last release line with an adaptive KL controller. README.md says how
to make the environment.
"""
# pyright: reportMissingImports=false
# (trl is installed in the golden environment alone)

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from golden_file import write
from trl.experimental.ppo import ppo_trainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

LENGTHS = [5, 3, 1]
R = max(LENGTHS)


def execute(first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of TRL's ppo_trainer.py from the one starting with ``first`` to the next starting with ``last``."""
    lines = inspect.getsource(ppo_trainer).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(last))
    names = {**vars(ppo_trainer), **names}
    exec(textwrap.dedent("\n".join(lines[start : stop + 1])), names)
    return names


def adaptive_controller(old_trl: Path) -> type:
    """The class AdaptiveKLController of trl 0.11.4, without importing that release."""
    source = (old_trl / "trl" / "trainer" / "utils.py").read_text()
    node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "AdaptiveKLController")
    names: dict[str, Any] = {"np": np}
    exec(ast.unparse(node), names)
    return names["AdaptiveKLController"]


def main() -> None:
    rng = np.random.default_rng(20240517)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.tensor(np.round(rng.normal(0, scale, shape), 3), dtype=torch.float64)

    mask = torch.arange(R)[None, :] < torch.tensor(LENGTHS)[:, None]
    values = draw(3, R) * mask
    cases: dict[str, Any] = {"mask": mask.tolist()}

    cases["masking"] = {
        "values": values.tolist(),
        "masked_mean": ppo_trainer.masked_mean(values, mask).item(),
        "masked_var_population": ppo_trainer.masked_var(values, mask, unbiased=False).item(),
        "masked_var_bessel": ppo_trainer.masked_var(values, mask).item(),
        "masked_whiten": ppo_trainer.masked_whiten(values, mask).tolist(),
        "masked_whiten_keep_mean": ppo_trainer.masked_whiten(values, mask, shift_mean=False).tolist(),
    }

    rewards = draw(3, R) * mask
    for gamma, lam in [(1.0, 0.95), (0.9, 0.5)]:
        args = SimpleNamespace(gamma=gamma, lam=lam)
        names = {"args": args, "values": values, "rewards": rewards, "responses": values}
        out = execute("lastgaelam = 0", "returns = advantages + values", names)
        cases[f"gae_{gamma}_{lam}"] = {
            "gamma": gamma,
            "gae_lambda": lam,
            "rewards": rewards.tolist(),
            "values": values.tolist(),
            "advantages": out["advantages"].tolist(),
            "returns": out["returns"].tolist(),
        }

    logprobs, ref_logprobs = -draw(3, R).abs(), -draw(3, R).abs()
    kl: dict[str, Any] = {"logprobs": logprobs.tolist(), "ref_logprobs": ref_logprobs.tolist()}
    for estimator in ("k1", "k3"):
        args = SimpleNamespace(kl_estimator=estimator, kl_coef=0.05)
        out = execute(
            "logr = ref_logprobs", "kl = -logr", {"args": args, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
        )
        kl[estimator] = out["kl"].tolist()
    cases["kl"] = kl

    # TRL adds the score one past the EOS. Responses that fill the length have no place past it, and there TRL
    # uses the last token, as this project always does: all rows here are of full length.
    scores, full = draw(3), torch.tensor([R - 1] * 3)
    names = {
        "args": SimpleNamespace(kl_estimator="k1", kl_coef=0.05),
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "scores": scores,
        "sequence_lengths": full,
        "sequence_lengths_p1": full + 1,
    }
    out = execute("logr = ref_logprobs", "rewards[actual_start", names)
    cases["shaped_rewards_full_length"] = {
        "kl_coef": 0.05,
        "scores": scores.tolist(),
        "kl": out["kl"].tolist(),
        "rewards": out["rewards"].tolist(),
    }

    penalised = scores.clone()
    ended = torch.tensor([True, False, True])
    trainer = SimpleNamespace(args=SimpleNamespace(missing_eos_penalty=1.5))
    execute(
        "if self.args.missing_eos_penalty is not None",
        "scores[~contain_eos_token]",
        {"self": trainer, "scores": penalised, "contain_eos_token": ended},
    )
    cases["missing_eos"] = {
        "penalty": 1.5,
        "scores": scores.tolist(),
        "ended": ended.tolist(),
        "penalised": penalised.tolist(),
    }

    args = SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
    names = {
        "args": args,
        "micro_batch_inds": torch.arange(3),
        "padding_mask": ~mask,
        "padding_mask_p1": ~mask,  # TRL's value mask has one token more; equal here, so that both mean the same
        "mb_values": values,
        "vpred": (values + draw(3, R, scale=0.3)) * mask,
        "mb_return": draw(3, R) * mask,
        "mb_advantage": draw(3, R) * mask,
        "mb_logprobs": logprobs * mask,
        "new_logprobs": (logprobs + draw(3, R, scale=0.3)) * mask,
    }
    inputs = {key: value.tolist() for key, value in names.items() if key.startswith(("mb_", "vpred", "new_"))}
    names = execute("vpredclipped = torch.clamp(", ")", names)
    names = execute("vf_losses1 = ", "pg_loss = ", names)
    names = execute("approxkl = 0.5", "approxkl = 0.5", names)
    pg_clipped, vf_clipped = names["pg_losses2"] > names["pg_losses"], names["vf_losses2"] > names["vf_losses1"]
    cases["ppo_losses"] = {
        **inputs,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "pg_loss": names["pg_loss"].item(),
        "pg_clipped": pg_clipped.tolist(),
        "vf_loss": names["vf_loss"].item(),
        "vf_clipped": vf_clipped.tolist(),
        "vf_clipfrac": names["vf_clipfrac"].item(),
    }
    assert 0 < pg_clipped.sum() < mask.sum()
    assert 0 < vf_clipped.sum() < mask.sum()

    logits, tokens = draw(6, 11, scale=2.0), torch.tensor([0, 3, 10, 5, 5, 7])
    cases["token_logprobs"] = {
        "logits": logits.tolist(),
        "tokens": tokens.tolist(),
        "logprobs": selective_log_softmax(logits, tokens).tolist(),
        "entropies": entropy_from_logits(logits).tolist(),
    }

    controller = adaptive_controller(Path(sys.argv[1]))(0.15, 6.0, 10_000)
    kls, coefs = [0.0, 3.0, 5.9, 6.0, 6.3, 7.5, 20.0, -1.0], []
    for measured in kls:
        controller.update(measured, 512)
        coefs.append(float(controller.value))
    cases["adaptive_kl"] = {
        "kl_coef": 0.15,
        "target": 6.0,
        "horizon": 10_000,
        "num_samples": 512,
        "kl": kls,
        "kl_coefs": coefs,
    }
    write("trl", ["trl", "torch", "numpy"], cases, notes={"trl (adaptive_kl)": "0.11.4"})


if __name__ == "__main__":
    main()
