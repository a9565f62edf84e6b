"""Golden numbers of scipy (log-softmax, entropy, KL, inverse CDF) and scikit-learn (moments, explained variance).

python tests/golden/make_scientific.py
"""
# pyright: reportMissingImports=false
# (scikit-learn is installed in the golden environment alone)

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from golden_file import write
from sklearn.metrics import explained_variance_score
from sklearn.preprocessing import StandardScaler


def main() -> None:
    rng = np.random.default_rng(11)
    cases: dict[str, Any] = {}

    logits = np.round(rng.normal(0, 2, (5, 9)), 3)
    tokens = [0, 8, 3, 3, 5]
    by_temperature = []
    for temperature in (0.5, 1.0, 1.7):
        logprobs = scipy.special.log_softmax(logits / temperature, axis=1)
        by_temperature.append(
            {
                "temperature": temperature,
                "logprobs": logprobs[np.arange(5), tokens].tolist(),
                "entropies": scipy.stats.entropy(np.exp(logprobs), axis=1).tolist(),
            }
        )
    cases["token_logprobs"] = {"logits": logits.tolist(), "tokens": tokens, "by_temperature": by_temperature}

    policy, reference = (scipy.special.softmax(rng.normal(size=12)) for _ in range(2))
    cases["exact_kl"] = {
        "policy": policy.tolist(),
        "reference": reference.tolist(),
        "kl": float(scipy.special.rel_entr(policy, reference).sum()),
    }

    probs = scipy.special.softmax(logits, axis=1)
    uniforms = np.round(rng.uniform(size=(40, 5)), 3)
    drawn = [
        [int(scipy.stats.rv_discrete(values=(np.arange(9), p)).ppf(u)) for p, u in zip(probs, row, strict=True)]
        for row in uniforms
    ]
    cases["inverse_cdf"] = {"logits": logits.tolist(), "uniforms": uniforms.tolist(), "tokens": drawn}

    batches = [np.round(rng.normal(2, 3, n), 3) for n in (4, 1, 7)]
    scaler, running = StandardScaler(), []
    for batch in batches:
        scaler.partial_fit(batch[:, None])
        mean, variance = (float(np.asarray(x).item()) for x in (scaler.mean_, scaler.var_))
        count = int(scaler.n_samples_seen_)
        running.append({"count": count, "mean": mean, "m2": variance * count})
    cases["moments"] = {
        "batches": [batch.tolist() for batch in batches],
        "running": running,
        "normalized_last": np.ravel(scaler.transform(batches[-1][:, None])).tolist(),
    }

    values, returns = np.round(rng.normal(size=20), 3), np.round(rng.normal(size=20), 3)
    cases["explained_variance"] = [
        {
            "values": v.tolist(),
            "returns": returns.tolist(),
            "explained_variance": float(explained_variance_score(returns, v)),
        }
        for v in (values, 0.5 * (values + returns), returns)
    ]
    write("scientific", ["scipy", "scikit-learn", "numpy"], cases)


if __name__ == "__main__":
    main()
