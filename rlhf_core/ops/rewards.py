"""From raw scores and KL to the reward of each token.

B responses, R response tokens, C reward components. The pipeline, each step optional:
raw components -> sum, min or mean - λ·std -> normalisation -> clip -> missing-EOS penalty -> length penalty -> rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.contracts.loop_state import ScoreMoments
from rlhf_core.ops.masking import MIN_STD, last_real


def update_moments(moments: ScoreMoments, score_B: Tensor) -> ScoreMoments:
    """The moments after one more batch of scores.

    Args:
        moments: of all scores so far.
        score_B: [B] float32.
    Returns: count, mean and sum of squared deviations of both together, computed in float64.
    Raises: nothing.
    Source: Chan, Golub, LeVeque 1979, pairwise update.
    """
    batch = score_B.double()
    n, mean = len(batch), float(batch.mean())
    m2 = float(((batch - mean) ** 2).sum())
    total, delta = moments.count + n, mean - moments.mean
    return ScoreMoments(
        count=total,
        mean=moments.mean + delta * n / total,
        m2=moments.m2 + m2 + delta**2 * moments.count * n / total,
    )


def combined_score(
    components_BC: Tensor, mask_BC: Tensor, weights: Sequence[float], *, combine: str, std_coef: float
) -> Tensor:
    """The score of each response from its components, each of them weighted first: x_c = weight_c · raw_c.

        weighted_sum:    Σ x_c
        min:             min x_c
        mean_minus_std:  mean x_c - std_coef · std x_c

    All run over the components that a response has left. A dropped one adds nothing to the sum: there it counts as a
    raw score of 0, and the other weights stay as they are. The mean and the std are of those left; the std of
    one is 0.

    Args:
        components_BC: [B, C] float32, raw.
        mask_BC: [B, C] bool, False where a component was dropped; its value is not read.
        weights: C factors.
        combine: one of the three names.
        std_coef: λ.
    Returns: [B] float32, computed in float64.
    Raises: ValueError if shapes or the number of weights differ, the name is unknown, or a response has no component.
    Source: sum: definition. Ensembles: Coste et al. 2023 (arXiv 2310.02743), section 4: worst case is min. Differs:
        their uncertainty-weighted mean subtracts λ times the variance, ours the std (both population, 1/C), which
        keeps the unit of the score.
    """
    if components_BC.shape != mask_BC.shape or components_BC.shape[1] != len(weights):
        shapes = f"components {tuple(components_BC.shape)}, mask {tuple(mask_BC.shape)}"
        raise ValueError(f"{shapes}, {len(weights)} weights")
    if not bool(mask_BC.any(dim=1).all()):
        raise ValueError("a response has no component left")
    raw_BC = torch.where(mask_BC, components_BC, 0.0).double()
    weights_C = torch.tensor(weights, dtype=torch.float64)
    if combine == "weighted_sum":
        return (raw_BC @ weights_C).float()
    weighted_BC = raw_BC * weights_C
    if combine == "min":
        return torch.where(mask_BC, weighted_BC, torch.inf).amin(dim=1).float()
    if combine == "mean_minus_std":
        count_B = mask_BC.sum(dim=1)
        mean_B = weighted_BC.sum(dim=1) / count_B
        deviations_BC = torch.where(mask_BC, weighted_BC - mean_B[:, None], 0.0)
        return (mean_B - std_coef * (deviations_BC.square().sum(dim=1) / count_B).sqrt()).float()
    raise ValueError(f"unknown combination {combine!r}; known: weighted_sum, min, mean_minus_std")


def normalize_scores(score_B: Tensor, moments: ScoreMoments) -> Tensor:
    """Scores in units of the given moments: (score - mean) / std.

    Args:
        score_B: [B] float32.
        moments: running ones, or those of reference samples.
    Returns: [B] float32. With fewer than two scores, or a std below MIN_STD, scores are centred only.
    Raises: nothing.
    Source: Ziegler et al. 2019, section 2.1 (reward normalised to mean 0, std 1 under the reference).
    """
    std = (moments.m2 / moments.count) ** 0.5 if moments.count > 1 else 0.0
    return ((score_B.double() - moments.mean) / (std if std >= MIN_STD else 1.0)).float()


def penalize_missing_eos(score_B: Tensor, ended_B: Tensor, *, penalty: float, mode: str) -> Tensor:
    """Penalise a response that did not end by itself.

    Args:
        score_B: [B] float32.
        ended_B: [B] bool, True where the response ended with EOS or a stop sequence.
        penalty: non-negative.
        mode: ``subtract`` it from the score, or ``set`` the score to minus the penalty.
    Returns: [B] float32.
    Raises: ValueError if the mode is unknown.
    Source: TRL ``missing_eos_penalty`` (subtract); Stiennon et al. 2020 / N+ details (set to -1). Differs:
        a user's stop sequence counts as an end (TRL 1.12, ppo_trainer.py:757, looks for EOS even then).
    """
    if mode not in ("subtract", "set"):
        raise ValueError(f"unknown missing-EOS mode {mode!r}; known: subtract, set")
    penalised = score_B - penalty if mode == "subtract" else torch.full_like(score_B, -penalty)
    return torch.where(ended_B, score_B, penalised)


def shaped_rewards(score_B: Tensor, penalty_BR: Tensor, mask_BR: Tensor, *, kl_coef: float, level: str) -> Tensor:
    """The reward of each token.

        token:     R_t = -β · kl_t, and the score is added on the last real token
        sequence:  R_last = score - β · Σ_t kl_t, 0 elsewhere

    Args:
        score_B: [B] float32.
        penalty_BR: [B, R] float32, a KL estimate, zero where masked.
        mask_BR: [B, R] bool.
        kl_coef: β.
        level: token or sequence.
    Returns: [B, R] float32, zero where masked.
    Raises: ValueError if shapes differ or the level is unknown.
    Source: Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2. Differs: TRL 1.12 (ppo_trainer.py:778) and N+
        (ppo.py:684) add the score one position past the EOS.
    """
    if penalty_BR.shape != mask_BR.shape or score_B.shape != mask_BR.shape[:1]:
        raise ValueError(f"shapes differ: {tuple(score_B.shape)}, {tuple(penalty_BR.shape)}, {tuple(mask_BR.shape)}")
    last_BR = last_real(mask_BR)
    if level == "token":
        per_token = -kl_coef * torch.where(mask_BR, penalty_BR, 0.0)
        return per_token + torch.where(last_BR, score_B[:, None], 0.0)
    if level == "sequence":
        total_B = score_B - kl_coef * torch.where(mask_BR, penalty_BR, 0.0).sum(dim=1)
        return torch.where(last_BR, total_B[:, None], 0.0)
    raise ValueError(f"unknown reward level {level!r}; known: token, sequence")
