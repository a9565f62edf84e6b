"""Best-of-n of the reference: draw n responses, keep the one of the highest score. The baseline without training.

Q prompts, N samples of the reference a prompt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n_score(score_QN: Tensor, n: int) -> Tensor:
    """Expected highest score of n samples, from N >= n of them.

        Σ_i C(i - 1, n - 1) / C(N, n) · r_(i),  r_(1) <= … <= r_(N)

    Args:
        score_QN: [Q, N], scores of the reference's samples.
        n: from 1 (the mean) to N (the maximum).
    Returns: [Q] float64, the mean over all subsets of n: unbiased.
    Raises: ValueError if n is not in 1 .. N.
    Source: the U-statistic of the maximum, as for pass@k in Chen et al. 2021 (arXiv 2107.03374).
    """
    total = score_QN.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"n must be between 1 and the {total} samples a prompt, got {n}")
    rank_N = torch.arange(1, total + 1, dtype=torch.float64)
    log_share_N = _log_choose(rank_N - 1, n - 1) - _log_choose(torch.tensor(float(total), dtype=torch.float64), n)
    share_N = torch.where(rank_N >= n, log_share_N.exp(), 0.0)
    return score_QN.double().sort(dim=1).values @ share_N


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the reference: an upper bound, reached where no two responses are alike.

        log n - (n - 1) / n

    Args:
        n: at least 1.
    Returns: nats.
    Raises: ValueError if n < 1.
    Source: Stiennon et al. 2020 (arXiv 2009.01325); a bound for discrete responses, Beirami et al. 2024 (arXiv
        2401.01879).

    >>> round(best_of_n_kl(16), 4)
    1.8351
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def _log_choose(of: Tensor, n: int) -> Tensor:
    return torch.lgamma(of + 1) - math.lgamma(n + 1) - torch.lgamma((of - n + 1).clamp(min=1.0))
