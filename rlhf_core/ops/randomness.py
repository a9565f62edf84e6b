"""Every draw of a run, each seeded by what it is for: no generator state is ever kept or saved."""

from __future__ import annotations

import hashlib

import numpy as np


def seeded_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A counter-based generator keyed by SHA-256 of the run's seed and a purpose.

    Args:
        seed: the run's seed.
        purpose: what the draw is for, e.g. ``("generate", iteration, prompt_id, sample_index)``.
    Returns: a Philox generator; equal arguments give equal draws on every platform.
    Raises: nothing.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
    """
    name = "\x1f".join([str(seed), *map(str, purpose)])
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
