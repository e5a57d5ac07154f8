"""What plain torch does by itself; the contract is in test_contract.py."""

from __future__ import annotations

import torch

from engine.model.attention.plain import power_of_two


def test_powers_of_two() -> None:
    x = -torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 124
    error = (power_of_two(x).double() / torch.exp2(x.double()) - 1).abs().max()
    assert error < 2 * 2**-24 * 2
    special = torch.tensor([0.0, -1.0, -126.0, -1e30, float("-inf")])
    assert power_of_two(special).tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
