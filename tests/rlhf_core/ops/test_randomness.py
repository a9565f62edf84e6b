"""Draws seeded by their purpose."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SIGMAS

from rlhf_core.ops.randomness import seeded_generator, uniforms

EXAMPLES = settings(max_examples=30)
PURPOSES = st.lists(st.one_of(st.integers(0, 10**9), st.text("abc/-:", max_size=5)), max_size=4)
WORD = 2**64 - 1
FIRST_DRAWS = [0.2216721501874782, 0.5476778667801803, 0.5987234820791193]
"""Recorded once; the two tests before it say why these are the right ones."""


def philox4x64(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Ten rounds of Philox4x64 in plain integers, from Salmon et al. 2011, section 3.3."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (right >> 64) ^ c1 ^ k0, right & WORD, (left >> 64) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # the known answers of the authors' library: Random123, file kat_vectors, "philox4x64 10"
        (0, [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
        (WORD, [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]),
    ],
)
def test_the_reference_gives_the_known_answers(word: int, expected: list[int]) -> None:
    assert philox4x64((word, word, word, word), (word, word)) == expected


@pytest.mark.parametrize("purpose", [(), ("generate", 3, "prompt-17", 0), ("permutation", 0, 2)])
def test_a_draw_is_philox_of_sha256(purpose: tuple[str | int, ...]) -> None:
    # "42", "generate", "3", … joined by the unit separator; 16 bytes of the digest, low word first; a draw is the
    # upper 53 bits of a word, and NumPy counts before its first block
    digest = hashlib.sha256("\x1f".join(["42", *(str(part) for part in purpose)]).encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    words = [word for block in (1, 2, 3) for word in philox4x64((block, 0, 0, 0), key)]
    draws = seeded_generator(42, *purpose).random(12)
    assert draws.tolist() == [(word >> 11) * 2.0**-53 for word in words]


def test_the_first_draws_of_a_response_never_change() -> None:
    draws = seeded_generator(0, "generate", 0, "p0", 0).random(3)
    assert draws.tolist() == FIRST_DRAWS


@EXAMPLES
@given(st.integers(0, 2**63), PURPOSES)
def test_equal_purposes_give_equal_draws(seed: int, purpose: list[str | int]) -> None:
    first, second = (seeded_generator(seed, *purpose) for _ in range(2))
    assert first.random(5).tolist() == second.random(5).tolist()
    assert first.permutation(9).tolist() == second.permutation(9).tolist()


@EXAMPLES
@given(st.integers(0, 1000), PURPOSES, st.integers(0, 1000), PURPOSES)
def test_different_purposes_give_different_draws(
    seed: int, purpose: list[str | int], other_seed: int, other_purpose: list[str | int]
) -> None:
    # 1 and "1" are the same purpose
    if (seed, *map(str, purpose)) == (other_seed, *map(str, other_purpose)):
        other_seed += 1
    draws = seeded_generator(seed, *purpose).random(2).tolist()
    assert draws != seeded_generator(other_seed, *other_purpose).random(2).tolist()


def test_parts_of_a_purpose_do_not_run_together() -> None:
    draws = [seeded_generator(*args).random() for args in [(1, 23), (12, 3), (123,), (1, 2, 3), (1, "2", "3", "")]]
    assert len(set(draws)) == len(draws)


def test_nothing_global_is_read_or_moved() -> None:
    np.random.seed(1)
    next_global = np.random.random()
    np.random.seed(1)
    first = seeded_generator(5, "x").random(100).tolist()
    assert np.random.random() == next_global
    assert seeded_generator(5, "x").random(100).tolist() == first


def test_first_draws_of_many_purposes_are_uniform() -> None:
    # one draw a purpose, as sampling uses them: mean 1/2, variance 1/12, and no trend between neighbours
    draws = np.array([seeded_generator(0, "generate", 0, prompt, 0).random() for prompt in range(2000)])
    n = len(draws)
    assert abs(draws.mean() - 0.5) < SIGMAS * (1 / 12 / n) ** 0.5
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert (abs(counts / n - 0.1) < SIGMAS * (0.1 * 0.9 / n) ** 0.5).all()
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < SIGMAS / n**0.5


def test_uniforms_have_53_bits_of_which_the_first_24_are_the_float32_stream() -> None:
    found = uniforms(1000, 3, "generate", 7, 11, 0)
    assert found.dtype == np.float64
    whole = found * 2.0**53
    assert (whole == np.floor(whole)).all()
    assert ((found >= 0) & (found < 1)).all()
    stream = seeded_generator(3, "generate", 7, 11, 0).random(1000, dtype=np.float32)
    assert (np.floor(found * 2.0**24) == stream.astype(np.float64) * 2.0**24).all()
    assert uniforms(9, 3, "generate", 7, 11, 0).tolist() == found[:9].tolist(), "a longer response begins alike"


@pytest.mark.parametrize("bits", [24, 30, 47])
def test_the_further_bits_are_uniform_and_their_own(bits: int) -> None:
    """χ² of the six bits after the first ``bits``, and no correlation with the leading ones."""
    found = np.concatenate([uniforms(64, 0, "generate", 0, prompt, 0) for prompt in range(200)])
    rest = found * 2.0**bits % 1.0
    counts = np.histogram(rest, bins=64, range=(0, 1))[0]
    expected = len(found) / 64
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - 63) < SIGMAS * (2 * 63) ** 0.5
    assert abs(np.corrcoef(found, rest)[0, 1]) < SIGMAS / len(found) ** 0.5
