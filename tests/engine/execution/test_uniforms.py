"""Random numbers against published answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from engine.execution.uniforms import philox, uniforms
from engine.params import SamplingParams
from tests.engine.execution.test_sampler import request


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox(np.array([counter], np.uint64).T, np.array([key], np.uint64).T)
    assert tuple(words[:, 0].tolist()) == expected


def test_uniforms_are_uniform_and_keyed() -> None:
    params = SamplingParams()
    many = uniforms([request(params, seed=seed) for seed in range(20_000)])
    assert stats.kstest(many, "uniform").pvalue > 1e-4
    along = uniforms([request(params, seed=1, index=index) for index in range(300)])
    assert stats.kstest(along, "uniform").pvalue > 1e-4
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (2**63, 0, 0)]
    numbers = uniforms([request(params, seed=s, index=i, choice=c) for s, i, c in keys])
    assert len(set(numbers)) == len(keys)
