"""Our scalings against Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.rope import RopeProfile, inverse_frequencies
from engine.scaling import RopeScaling

CONTEXT = 1024
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [  # ours, and what theirs say beside it
    ({"type": "linear", "factor": 4.0}, {}),
    ({"type": "dynamic", "factor": 1.0}, {}),
    ({"type": "dynamic", "factor": 2.0}, {}),
    ({"type": "yarn", "factor": 4.0}, {}),
    ({"type": "yarn", "factor": 16.0, "truncate": False}, {}),
    ({"type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0}, {}),
    ({"type": "yarn", "factor": 8.0, "attention_factor": 1.3}, {}),
    ({"type": "llama3", "factor": 8.0}, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ({"type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}, {}),
]


def theirs(
    parameters: dict[str, Any], head_dim: int, share: float, base: float, length: int
) -> tuple[torch.Tensor, float]:
    kind = parameters["type"]
    settings = {name: value for name, value in parameters.items() if name != "type"}
    settings |= {"rope_type": kind, "rope_theta": base, "partial_rotary_factor": share}
    if kind in ("yarn", "llama3"):
        settings["original_max_position_embeddings"] = CONTEXT
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters=settings,
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize(
    ("head_dim", "share", "base"), [(64, 1.0, 10_000.0), (64, 0.5, 10_000.0), (128, 0.25, 5e5)]
)
@pytest.mark.parametrize("length", [700, 1024, 1500, 2048, 3000])
@pytest.mark.parametrize(("declared", "extra"), CASES)
def test_inverse_frequencies(
    declared: dict[str, Any],
    extra: dict[str, Any],
    length: int,
    head_dim: int,
    share: float,
    base: float,
) -> None:
    rotary_dim = int(head_dim * share)
    scaling = RopeScaling.from_dict(declared).in_force(length, CONTEXT)
    inv_freq = inverse_frequencies(rotary_dim, base)
    ours = RopeProfile.build(scaling, inv_freq, CONTEXT, base)
    rounded = CONTEXT << max(-(-length // CONTEXT) - 1, 0).bit_length()  # ours steps, theirs not
    expected, factor = theirs(declared | extra, head_dim, share, base, rounded)
    # theirs are float32
    torch.testing.assert_close(ours.inv_freq, expected.double(), rtol=2e-6, atol=0)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
