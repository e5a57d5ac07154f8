"""Every scaling against its paper's formula, written out here number by number."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from engine.errors import ConfigError
from engine.model.rope import RopeProfile, inverse_frequencies
from engine.scaling import SCALING_OPTIONS, RopeScaling

CASES = [(64, 10_000.0, 1024), (32, 10_000.0, 2048), (128, 500_000.0, 8192), (16, 100.0, 192)]
FACTORS = [1.0, 1.5, 4.0, 32.0]


def build(scaling: RopeScaling, dim: int, base: float, context: int) -> RopeProfile:
    return RopeProfile.build(scaling, inverse_frequencies(dim, base), context, base)


def close(got: torch.Tensor, expected: list[float]) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def theta(i: int, dim: int, base: float) -> float:
    """RoPE's own (Su et al. 2021, 3.2.2)."""
    return math.pow(base, -2 * i / dim)


def share_kept(turns: float, low: float, high: float) -> float:
    """gamma of NTK-by-parts (Peng et al. 2023, 3.2)."""
    if turns < low:
        return 0.0
    if turns > high:
        return 1.0
    return (turns - low) / (high - low)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("dim", "base", "context"), CASES)
class TestFormulas:
    def test_default(self, dim: int, base: float, context: int, factor: float) -> None:
        profile = build(RopeScaling(), dim, base, context)
        close(profile.inv_freq, [theta(i, dim, base) for i in range(dim // 2)])
        assert profile.attention_factor == 1.0
        assert profile.log_zeta is None

    def test_linear(self, dim: int, base: float, context: int, factor: float) -> None:
        """Position interpolation (Chen et al. 2023): position m becomes m / factor."""
        profile = build(RopeScaling(type="linear", factor=factor), dim, base, context)
        close(profile.inv_freq, [theta(i, dim, base) / factor for i in range(dim // 2)])

    def test_ntk(self, dim: int, base: float, context: int, factor: float) -> None:
        """The base becomes base * factor^(d / (d - 2)) (bloc97; Peng et al. 2023, 3.1)."""
        profile = build(RopeScaling(type="ntk", factor=factor), dim, base, context)
        new_base = base * factor ** (dim / (dim - 2))
        close(profile.inv_freq, [theta(i, dim, new_base) for i in range(dim // 2)])
        assert profile.inv_freq[0] == 1.0  # the fastest is kept, the slowest interpolated
        slowest = theta(dim // 2 - 1, dim, base) / factor
        assert float(profile.inv_freq[-1]) == pytest.approx(slowest, rel=1e-13)

    def test_yarn_paper(self, dim: int, base: float, context: int, factor: float) -> None:
        """h(theta) = (1 - gamma) theta / s + gamma theta, gamma of context / wavelength."""
        scaling = RopeScaling(type="yarn", factor=factor, ramp="rotations")
        profile = build(scaling, dim, base, context)
        expected = []
        for i in range(dim // 2):
            wavelength = 2 * math.pi / theta(i, dim, base)
            gamma = share_kept(context / wavelength, 1.0, 32.0)
            expected.append(
                (1 - gamma) * theta(i, dim, base) / factor + gamma * theta(i, dim, base)
            )
        close(profile.inv_freq, expected)

    def test_yarn_code(self, dim: int, base: float, context: int, factor: float) -> None:
        """The authors' code: linear in the pair, from the one of 32 turns to the one of 1."""
        profile = build(RopeScaling(type="yarn", factor=factor), dim, base, context)
        turning = [
            dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (32.0, 1.0)
        ]
        low, high = max(math.floor(turning[0]), 0), min(math.ceil(turning[1]), dim - 1)
        expected = []
        for i in range(dim // 2):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            own = theta(i, dim, base)
            expected.append(own / factor * ramp + own * (1 - ramp))
        close(profile.inv_freq, expected)
        assert profile.attention_factor == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15)

    def test_yarn_ramps_agree_outside(
        self, dim: int, base: float, context: int, factor: float
    ) -> None:
        """The paper and the code differ between the bounds only."""
        code = build(RopeScaling(type="yarn", factor=factor, truncate=False), dim, base, context)
        paper = build(RopeScaling(type="yarn", factor=factor, ramp="rotations"), dim, base, context)
        for i in range(dim // 2):
            turns = context * theta(i, dim, base) / (2 * math.pi)
            if not 1.0 < turns < 32.0:
                assert float(code.inv_freq[i]) == pytest.approx(float(paper.inv_freq[i]), rel=1e-13)

    def test_llama3(self, dim: int, base: float, context: int, factor: float) -> None:
        """Meta's apply_scaling: by wavelength, smooth between context / 4 and context."""
        profile = build(RopeScaling(type="llama3", factor=factor), dim, base, context)
        expected = []
        for i in range(dim // 2):
            own = theta(i, dim, base)
            wavelength = 2 * math.pi / own
            if wavelength < context / 4:
                expected.append(own)
            elif wavelength > context / 1:
                expected.append(own / factor)
            else:
                smooth = (context / wavelength - 1) / (4 - 1)
                expected.append((1 - smooth) * own / factor + smooth * own)
        close(profile.inv_freq, expected)
        assert profile.attention_factor == 1.0

    def test_xpos(self, dim: int, base: float, context: int, factor: float) -> None:
        """zeta_i = (i / (d / 2) + gamma) / (1 + gamma) (Sun et al. 2022), per 512 tokens."""
        profile = build(RopeScaling(type="xpos", factor=factor), dim, base, context)
        zeta = [(i / (dim / 2) + 0.4) / 1.4 for i in range(dim // 2)]
        assert profile.log_zeta is not None
        close(profile.log_zeta, [math.log(each) / 512 / factor for each in zeta])
        close(profile.inv_freq, [theta(i, dim, base) / factor for i in range(dim // 2)])


def test_original_context_counts_before_the_trained_one() -> None:
    declared = build(RopeScaling(type="llama3", factor=8, original_context=512), 64, 1e4, 4096)
    trained = build(RopeScaling(type="llama3", factor=8), 64, 1e4, 512)
    assert torch.equal(declared.inv_freq, trained.inv_freq)


def test_attention_factor_may_be_declared() -> None:
    profile = build(RopeScaling(type="yarn", factor=4, attention_factor=1.25), 64, 1e4, 1024)
    assert profile.attention_factor == 1.25


def test_profiles_and_layers_stack() -> None:
    """A table [profile, layer, rotary_dim / 2], learned frequencies in its layers."""
    layers = torch.rand(3, 16, dtype=torch.float64) - 0.5
    scalings = [RopeScaling(), RopeScaling(type="linear", factor=2), RopeScaling(type="llama3")]
    profiles = [RopeProfile.build(each, layers, 1024) for each in scalings]
    table = torch.stack([each.inv_freq for each in profiles])
    assert table.shape == (3, 3, 16)
    turns = RopeProfile(table).query_table(5, first=7)
    assert turns.cos.shape == (3, 3, 5, 16)
    expected = math.cos(9 * float(table[1, 2, 4]))
    assert float(turns.cos[1, 2, 2, 4]) == pytest.approx(expected, abs=6e-8)


@pytest.mark.parametrize("kind", ["ntk", "dynamic", "yarn"])
def test_learned_frequencies_are_refused(kind: str) -> None:
    scaling = RopeScaling.from_dict({"type": kind, "factor": 2})
    with pytest.raises(ConfigError, match="were learned"):
        RopeProfile.build(scaling, torch.rand(16), 1024)


def test_dynamic_must_be_settled_first() -> None:
    with pytest.raises(ConfigError, match="in_force"):
        build(RopeScaling(type="dynamic", factor=2), 64, 1e4, 1024)


def test_page_growth_is_bounded() -> None:
    """A page's keys grow by zeta^-(63 / 512) at most; queries only shrink."""
    profile = build(RopeScaling(type="xpos"), 64, 1e4, 1024)
    keys, queries = profile.key_table(64), profile.query_table(3, first=10**6)
    magnitude = (keys.cos.double() ** 2 + keys.sin.double() ** 2).sqrt()
    assert float(magnitude.min()) >= 1.0 - 1e-6
    assert float(magnitude.max()) == pytest.approx((0.4 / 1.4) ** (-63 / 512), rel=1e-6)
    assert float(magnitude.max()) < 1.17
    assert float(queries.cos.abs().max()) < 1e-6


EXTREMES: dict[str, list[object]] = {
    "factor": [1, 4, 2**31],
    "original_context": [None, 2, 2**31 - 1],
    "beta_slow": [1.1e-6, 9e5],
    "beta_fast": [32, 1e6],
    "truncate": [True, False],
    "ramp": ["dimension", "rotations"],
    "attention_factor": [None, 1e-320, 1e3],
    "low_freq_factor": [1.1e-6, 1],
    "high_freq_factor": [4, 1e6],
    "scale_base": [16, 1e308],
}


@pytest.mark.parametrize("kind", SCALING_OPTIONS)
def test_whatever_a_request_may_ask_for_has_finite_tables(kind: str) -> None:
    """A request must not be able to stop the engine, nor to fill pages with NaN."""
    built = 0
    for values in product(*(EXTREMES[name] for name in SCALING_OPTIONS[kind])):
        try:
            scaling = RopeScaling.from_dict(
                {"type": kind, **dict(zip(SCALING_OPTIONS[kind], values, strict=True))}
            )
        except ConfigError:
            continue
        for length in (1, 65_536):
            profile = build(scaling.in_force(length, 1024), 16, 1e4, 1024)
            for table in (profile.query_table(8, first=60_000), profile.key_table(64)):
                assert table.cos.isfinite().all()
                assert table.sin.isfinite().all()
            built += 1
    assert built > 0
