"""What every rotation in force must hold, xPos and learned frequencies included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies, rotate
from engine.scaling import RopeScaling

DIM, ROTARY, CONTEXT, BASE, PAGE = 48, 32, 1024, 10_000.0, 64
SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling(type="linear", factor=4),
    "ntk": RopeScaling(type="ntk", factor=4),
    "dynamic": RopeScaling(type="dynamic", factor=2).in_force(5000, CONTEXT),
    "yarn": RopeScaling(type="yarn", factor=16),
    "yarn-paper": RopeScaling(type="yarn", factor=16, ramp="rotations"),
    "llama3": RopeScaling(type="llama3", factor=8),
    "xpos": RopeScaling(type="xpos"),
    "xpos-linear": RopeScaling(type="xpos", factor=3),
}
PROFILES = {
    name: RopeProfile.build(scaling, inverse_frequencies(ROTARY, BASE), CONTEXT, BASE)
    for name, scaling in SCALINGS.items()
}
LEARNED = 2 * torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1
PROFILES |= {
    f"learned-{name}": RopeProfile.build(SCALINGS[name], LEARNED, CONTEXT)
    for name in ("default", "linear", "llama3", "xpos")
}

profiles = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
seeds = st.integers(0, 2**31)
far = st.integers(0, 1_000_000)
offsets = st.integers(0, PAGE - 1)


def vectors(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def magnitude(profile: RopeProfile, distance: int) -> torch.Tensor:
    """What a query's pairs are multiplied by, float64 [ROTARY / 2]."""
    if profile.log_zeta is None:
        return torch.full((ROTARY // 2,), profile.attention_factor**2, dtype=torch.float64)
    return (distance * profile.log_zeta).exp()


def relative_score(
    profile: RopeProfile, query: torch.Tensor, key: torch.Tensor, distance: int, offset: int
) -> float:
    """As the cache has it: the query turned by its distance to the page, the key by its offset."""
    queries, keys = profile.query_table(1, first=distance + offset), profile.key_table(PAGE)
    turned = rotate(query, queries.cos[0], queries.sin[0])
    stored = rotate(key, keys.cos[offset], keys.sin[offset])
    return float(turned.double() @ stored.double())


def turned64(profile: RopeProfile, x: torch.Tensor, position: int) -> torch.Tensor:
    angles, half = position * profile.inv_freq, ROTARY // 2
    pairs = torch.complex(x[:half].double(), x[half:ROTARY].double())
    return pairs * torch.polar(torch.ones_like(angles), angles)


@profiles
@settings(max_examples=25)
@given(seed=seeds, distance=far)
def test_norms(profile: RopeProfile, seed: int, distance: int) -> None:
    """Every pair keeps its length, times what xPos or an attention factor asks for."""
    x = vectors(seed, 3)
    table = profile.query_table(1, first=distance)
    turned = rotate(x, table.cos[0], table.sin[0])
    half = ROTARY // 2

    def norms(y: torch.Tensor) -> torch.Tensor:
        return torch.hypot(y[:, :half].double(), y[:, half:ROTARY].double())

    expected = norms(x) * magnitude(profile, distance)
    torch.testing.assert_close(norms(turned), expected, rtol=1e-6, atol=1e-37)
    assert torch.equal(turned[:, ROTARY:], x[:, ROTARY:])


@profiles
@settings(max_examples=25)
@given(seed=seeds, a=st.integers(0, 500_000), b=st.integers(0, 500_000))
def test_turns_compose(profile: RopeProfile, seed: int, a: int, b: int) -> None:
    """R(a) R(b) = R(a + b), magnitudes included."""
    x = vectors(seed, 3)

    def turned(y: torch.Tensor, by: int) -> torch.Tensor:
        table = RotaryTable.build(profile.inv_freq, 1, first=by, log_growth=profile.log_zeta)
        return rotate(y, table.cos[0], table.sin[0])

    error = (turned(turned(x, a), b) - turned(x, a + b)).norm(dim=-1)
    assert float((error / x.norm(dim=-1)).max()) <= 1e-6


@profiles
@settings(max_examples=25)
@given(seed=seeds, distance=far, offset=offsets, other=offsets)
def test_scores_depend_on_the_distance_only(
    profile: RopeProfile, seed: int, distance: int, offset: int, other: int
) -> None:
    """The same two tokens, wherever their page begins."""
    query, key = vectors(seed, 2)
    scores = [relative_score(profile, query, key, distance, each) for each in (offset, other)]
    assert abs(scores[0] - scores[1]) <= 1e-6 * float(query.norm() * key.norm())


@profiles
@settings(max_examples=40)
@given(seed=seeds, position=far, distance=far, offset=offsets)
def test_page_relative_scores(
    profile: RopeProfile, seed: int, position: int, distance: int, offset: int
) -> None:
    """Equal to rotating query and key by their absolute positions, in float64."""
    query, key = vectors(seed, 2)
    ours = relative_score(profile, query, key, distance, offset)
    turned = turned64(profile, query, position + distance)
    products = (turned * turned64(profile, key, position).conj()).real
    rest = query[ROTARY:].double() @ key[ROTARY:].double()
    absolute = float((products * magnitude(profile, distance)).sum() + rest)
    assert abs(ours - absolute) <= 1e-6 * float(query.norm() * key.norm())
