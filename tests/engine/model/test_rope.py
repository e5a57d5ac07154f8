"""Tables and rotations against closed forms."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.model.rope import RotaryTable, inverse_frequencies, rotate

DIM, ROTARY = 48, 32
INV_FREQ = inverse_frequencies(ROTARY, 10_000.0)


def angles(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    table = RotaryTable.build(INV_FREQ, 1, first=position)
    return table.cos[0], table.sin[0]


def test_frequencies() -> None:
    expected = [10_000 ** (-2 * i / ROTARY) for i in range(ROTARY // 2)]
    assert torch.allclose(INV_FREQ, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


def test_table_is_rounded_once() -> None:
    table = RotaryTable.build(INV_FREQ, 4, first=999_997)
    for row in range(4):
        for i in range(ROTARY // 2):
            exact = math.cos((999_997 + row) * float(INV_FREQ[i]))
            assert abs(float(table.cos[row, i]) - exact) <= 6e-8


@given(
    seed=st.integers(0, 2**31),
    a=st.integers(0, 500_000),
    b=st.integers(0, 500_000),
)
def test_rotations_compose_and_keep_norms(seed: int, a: int, b: int) -> None:
    x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x, *angles(a))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(rotate(turned, *angles(b)), rotate(x, *angles(a + b)), atol=4e-6)
    assert torch.equal(turned[:, ROTARY:], x[:, ROTARY:])


@given(
    seed=st.integers(0, 2**31),
    position=st.integers(0, 999_999),
    distance=st.integers(0, 1000),
    offset=st.integers(0, 63),
)
def test_page_relative_scores(seed: int, position: int, distance: int, offset: int) -> None:
    """(R(t - b) q) . (R(o) k) is (R(t) q) . (R(p) k), p = b + o, to 1e-6 |q| |k|."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    relative = (
        rotate(query.float(), *angles(distance + offset)).double()
        @ rotate(key.float(), *angles(offset)).double()
    )

    def exact(x: torch.Tensor, at: int) -> torch.Tensor:
        angle = at * INV_FREQ
        half = ROTARY // 2
        first, second = x[:half], x[half:ROTARY]
        return torch.cat(
            (
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
                x[ROTARY:],
            )
        )

    absolute = exact(query, position + distance) @ exact(key, position)
    assert abs(float(relative - absolute)) <= 1e-6 * float(query.norm() * key.norm())


def test_bfloat16_is_rotated_in_float32() -> None:
    x = torch.randn(5, DIM).bfloat16()
    assert torch.equal(rotate(x, *angles(77)), rotate(x.float(), *angles(77)).bfloat16())
