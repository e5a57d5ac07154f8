from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from weights.baselines import NGram, added_bits_per_byte, gzip_size, xz_size


def naive(training: list[int], history: list[int], token: int, vocab: int) -> float:
    """Witten-Bell by its definition, with dictionaries."""
    p = 1 / vocab
    for length in range(len(history) + 1):
        context = history[len(history) - length :]
        after: Counter[int] = Counter()
        for at in range(length, len(training)):
            if training[at - length : at] == context:
                after[training[at]] += 1
        total, kinds = sum(after.values()), len(after)
        if total:
            p = (after[token] + kinds * p) / (total + kinds)
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_an_n_gram_is_witten_bells(order: int) -> None:
    random = np.random.default_rng(order)
    training = random.integers(0, 6, 300).astype(np.uint16)
    text = random.integers(0, 7, 40).astype(np.uint16)  # 6 is never seen
    found = NGram(training, 8, order).probabilities(text)
    ids = text.tolist()
    for at in range(1, len(ids)):
        history = ids[max(0, at - order + 1) : at]
        expected = naive(training.tolist(), history, ids[at], 8)
        assert found[at - 1] == pytest.approx(expected, rel=1e-12)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    training = np.random.default_rng(0).integers(0, 5, 200).astype(np.uint16)
    gram = NGram(training, 6, 3)
    total = sum(gram.probabilities(np.array([1, 4, 2, token], np.uint16))[-1] for token in range(6))
    assert total == pytest.approx(1)


def test_a_text_seen_before_adds_little() -> None:
    text = np.random.default_rng(0).integers(0, 256, 40_000).astype(np.uint8).tobytes()
    assert added_bits_per_byte(xz_size, text, text) < 0.2
    assert added_bits_per_byte(gzip_size, text, text) > 7.9  # its window is 32 kB
    assert math.isclose(added_bits_per_byte(gzip_size, b"", text), 8, abs_tol=0.1)
