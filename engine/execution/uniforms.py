"""One counter-based stream of random numbers for each request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.request import Request

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)

Words = NDArray[np.uint64]


def philox(counter: Words, key: Words) -> Words:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter [4, n] and key [2, n] hold 32-bit words in uint64; returns [4, n] of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high, low = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (low >> _WORD) ^ c1 ^ k0,
            low & _LOW,
            (high >> _WORD) ^ c3 ^ k1,
            high & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


def uniforms(requests: Sequence[Request]) -> NDArray[np.float64]:
    """One number in [0, 1) per request, a function of (seed, choice, stream index) alone."""
    counter = np.zeros((4, len(requests)), np.uint64)
    counter[0] = [request.num_output_tokens for request in requests]
    counter[1] = [request.choice for request in requests]
    seeds = np.array([request.seed for request in requests], np.uint64)
    words = philox(counter, np.stack((seeds & _LOW, seeds >> _WORD)))
    # 53 bits, as a double holds: 27 from one word and 26 from another.
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    numbers: NDArray[np.float64] = (high * np.float64(2**26) + low) / np.float64(2**53)
    return numbers
