"""Golden numbers of DeepMind's rlax (GAE, clipped surrogate with its gradient) and optax (schedules).

python tests/golden/make_jax.py
"""
# pyright: reportMissingImports=false
# (jax, rlax and optax are installed in the golden environment alone)

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rlax
from golden_file import write


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(7)
    cases: dict[str, Any] = {}

    # Responses of different lengths: rlax sees each alone, with a value of 0 after its last token.
    for gamma, lam in [(1.0, 0.95), (0.97, 0.8), (0.5, 0.0), (1.0, 1.0)]:
        rows = []
        for length in (6, 4, 1):
            rewards, values = (np.round(rng.normal(size=length), 3) for _ in range(2))
            advantages = rlax.truncated_generalized_advantage_estimation(
                jnp.asarray(rewards), jnp.full(length, gamma), lam, jnp.append(values, 0.0)
            )
            row = {"rewards": rewards.tolist(), "values": values.tolist(), "advantages": advantages.tolist()}
            rows.append(row)
        cases[f"gae_{gamma}_{lam}"] = {"gamma": gamma, "gae_lambda": lam, "rows": rows}

    log_ratios, advantages = np.round(rng.normal(0, 0.4, 24), 3), np.round(rng.normal(size=24), 3)
    for epsilon in (0.1, 0.2):

        def loss(log_ratios: Any, epsilon: float = epsilon) -> Any:
            return rlax.clipped_surrogate_pg_loss(jnp.exp(log_ratios), jnp.asarray(advantages), epsilon)

        cases[f"clipped_surrogate_{epsilon}"] = {
            "clip_range": epsilon,
            "log_ratios": log_ratios.tolist(),
            "advantages": advantages.tolist(),
            "loss": float(loss(jnp.asarray(log_ratios))),
            "gradient": jax.grad(loss)(jnp.asarray(log_ratios)).tolist(),
        }

    # This project's warm-up rises from peak / (w + 1) in w steps to the peak.
    peak, total = 3e-4, 10
    for warmup in (0, 3):
        decays = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, 0.0, total - warmup),
            "cosine": optax.cosine_decay_schedule(peak, total - warmup),
        }
        for name, decay in decays.items():
            rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
            schedule = optax.join_schedules([rise, decay], [warmup])
            cases[f"schedule_{name}_{warmup}"] = {
                "peak": peak,
                "num_iterations": total,
                "warmup_iterations": warmup,
                "schedule": name,
                "learning_rates": [float(schedule(i)) for i in range(total)],
            }
    write("jax", ["jax", "rlax", "optax", "numpy"], cases)


if __name__ == "__main__":
    main()
