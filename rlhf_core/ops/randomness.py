"""Every draw of a run, each seeded by what it is for: no generator state is ever kept or saved."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


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


def uniforms(count: int, seed: int, *purpose: str | int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) with all 53 bits that a float64 has.

        u = u24 + 2^-24 · u29

    u24 is the float32 stream of the purpose, and u29 has the 29 bits after it, from a stream of its own: whatever asks
    for 24 bits gets the leading ones of these.

    Args:
        count: how many.
        seed: the run's seed.
        purpose: what they are for, as of :func:`seeded_generator`.
    Returns: [count] float64, multiples of 2^-53.
    Raises: nothing.
    Source: definition.
    """
    leading = seeded_generator(seed, *purpose).random(count, dtype=np.float32).astype(np.float64)
    further = np.floor(seeded_generator(seed, *purpose, "further bits").random(count) * 2.0**29)
    return leading + further * 2.0**-53
