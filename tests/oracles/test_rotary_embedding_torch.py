"""Our rotation against the rotary-embedding-torch library."""

from __future__ import annotations

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding

from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies, rotate
from engine.scaling import RopeScaling

HEAD_DIM, TIME = 64, 300


def to_half(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """The library pairs (2i, 2i + 1); we pair (i, i + rotary_dim / 2)."""
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    return torch.cat((rotated[..., 0::2], rotated[..., 1::2], rest), dim=-1)


@pytest.mark.parametrize(("rotary_dim", "base"), [(32, 10_000.0), (64, 10_000.0), (16, 500.0)])
def test_rotated_queries_and_scores(rotary_dim: int, base: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 3, TIME, HEAD_DIM, generator=generator)
    library = RotaryEmbedding(dim=rotary_dim, theta=base)
    theirs_query = library.rotate_queries_or_keys(query)
    theirs_key = library.rotate_queries_or_keys(key)

    table = RotaryTable.build(inverse_frequencies(rotary_dim, base), TIME)
    ours_query = rotate(to_half(query, rotary_dim), table.cos, table.sin)
    ours_key = rotate(to_half(key, rotary_dim), table.cos, table.sin)

    # The library's angles are float32: they drift by up to 300 * 6e-8 radians here.
    assert torch.allclose(ours_query, to_half(theirs_query.detach(), rotary_dim), atol=1e-4)
    theirs = (theirs_query @ theirs_key.transpose(-1, -2)).detach()
    ours = ours_query @ ours_key.transpose(-1, -2)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_page_relative_xpos_is_the_uncached(factor: float) -> None:
    """Keys kept by their offset in a page of 64 give the scores of rotate_queries_and_keys."""
    dim, page = 32, 64
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, TIME, HEAD_DIM, generator=generator)
    library = RotaryEmbedding(dim=dim, use_xpos=True, interpolate_factor=factor)
    theirs_query, theirs_key = library.rotate_queries_and_keys(query, key)
    theirs = (theirs_query @ theirs_key.transpose(-1, -2))[0, 0].detach()

    scaling = RopeScaling(type="xpos", factor=factor)
    profile = RopeProfile.build(scaling, inverse_frequencies(dim, 1e4), TIME, 1e4)
    queries, keys = profile.query_table(TIME), profile.key_table(page)
    half_query, half_key = to_half(query[0, 0], dim), to_half(key[0, 0], dim)
    for base in range(0, TIME, page):
        offsets = torch.arange(min(page, TIME - base))
        stored = rotate(half_key[base + offsets], keys.cos[offsets], keys.sin[offsets])
        distances = torch.arange(TIME - base)
        turned = rotate(half_query[base:], queries.cos[distances], queries.sin[distances])
        error = (turned @ stored.T - theirs[base:, base : base + page]).abs()
        causal = distances[:, None] >= offsets
        assert float(error[causal].max()) <= 1e-4 * float(theirs.tril().abs().max())
