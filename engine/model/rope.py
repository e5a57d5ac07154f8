"""Rotation frequencies and their tables; apart from pairing and from storage.

RoPE (Su et al. 2021, arXiv 2104.09864) rotates the i-th pair of a query or key at position p by
the angle p * inv_freq_i. Rotations compose, R(a) R(b) = R(a + b), and a score depends on the
distance only: (R(t) q)^T (R(p) k) = q^T R(p - t) k. The paged cache rests on that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.scaling import UNSCALED, RopeScaling

XPOS_GAMMA = 0.4  # Sun et al. 2022, arXiv 2212.10554


def inverse_frequencies(rotary_dim: int, base: float) -> Tensor:
    """inv_freq_i = base^(-2i / rotary_dim), float64 [rotary_dim / 2], radians per token."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return base**-exponents


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of every integer distance; float32 [..., num_positions, rotary_dim / 2].

    The leading dimensions are those of the frequencies: none, or layers, or profiles and layers.
    An angle is (integer distance) x (float64 frequency), rounded to float32 once, after the cosine:
    float32 angles would drift by 5e-3 at a distance of a million.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(
        cls,
        inv_freq: Tensor,
        num_positions: int,
        first: int = 0,
        factor: float = 1.0,
        log_growth: Tensor | None = None,
    ) -> RotaryTable:
        """Table for num_positions distances from `first`; inv_freq float64 [..., rotary_dim / 2].

        Cosines and sines are multiplied by factor * exp(distance * log_growth), log_growth float64
        [rotary_dim / 2], before they are rounded: xPos and attention factors cost nothing later.
        """
        distances = torch.arange(first, first + num_positions, dtype=torch.float64)[:, None]
        angles = distances * inv_freq[..., None, :]
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if log_growth is not None:
            magnitude = (distances * log_growth).exp()
            cos, sin = cos * magnitude, sin * magnitude
        return cls(cos=cos.float().contiguous(), sin=sin.float().contiguous())

    @classmethod
    def for_model(cls, config: ModelConfig, num_positions: int | None = None) -> RotaryTable:
        """The table of a model, over its context unless num_positions says otherwise.

        ConfigError: the model is served by a scaling, or its frequencies are learned.
        """
        if config.rope != UNSCALED or config.learned_frequencies != "none":
            raise ConfigError(
                "this needs frequencies that are powers of rope_base, unscaled; config.json says "
                f"rope.type {config.rope.type}, learned_frequencies {config.learned_frequencies}"
            )
        inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
        return cls.build(inv_freq, num_positions or config.max_position)

    def to(self, device: torch.device | str) -> RotaryTable:
        """The same table on another device."""
        return RotaryTable(cos=self.cos.to(device), sin=self.sin.to(device))

    def layer(self, layer: int) -> RotaryTable:
        """A layer's part [num_positions, rotary_dim / 2]; the whole where layers share it."""
        shared = self.cos.ndim == 2
        return self if shared else RotaryTable(cos=self.cos[layer], sin=self.sin[layer])

    @classmethod
    def joined(cls, parts: Sequence[RotaryTable]) -> RotaryTable:
        """Of the positions of all parts, one after the other."""
        return cls(
            cos=torch.cat([part.cos for part in parts], -2),
            sin=torch.cat([part.sin for part in parts], -2),
        )


@dataclass(frozen=True)
class RopeProfile:
    """A rotation in force: a row of the engine's table of profiles.

    inv_freq: float64 [..., rotary_dim / 2]; leading dimensions as given, such as layers.
    attention_factor: multiplies what is rotated of queries and keys alike.
    log_zeta: xPos only: ln zeta_i / scale_base, float64 [rotary_dim / 2], below 0: a query at
    distance n is multiplied by exp(n log_zeta), a key at offset o by exp(-o log_zeta).
    """

    inv_freq: Tensor
    attention_factor: float = 1.0
    log_zeta: Tensor | None = None

    @classmethod
    def build(
        cls,
        scaling: RopeScaling,
        inv_freq: Tensor,
        trained_context: int,
        base: float | None = None,
    ) -> RopeProfile:
        """The profile of a scaling in force (see RopeScaling.in_force).

        inv_freq: the model's own, float64 [..., rotary_dim / 2]; base: what they are powers of,
        None: they were learned. Scaling multiplies every frequency by a number of its own, so
        profiles and layers stack to [profile, layer, rotary_dim / 2]. ConfigError: as
        RopeScaling.check_model, or the scaling is still dynamic.
        """
        inv_freq = inv_freq.double()
        half = inv_freq.shape[-1]
        factor, original = scaling.factor, scaling.original_context or trained_context
        scaling.check_model(2 * half, learned_frequencies=base is None)
        match scaling.type:
            case "default":
                return cls(inv_freq)
            case "linear":
                return cls(inv_freq / factor)
            case "ntk":
                return cls(inv_freq * ntk_multiplier(half, factor))
            case "yarn":
                assert base is not None
                kept = yarn_kept(scaling, inv_freq, original, base)
                attention = scaling.attention_factor or 0.1 * math.log(factor) + 1.0
                return cls(inv_freq * (kept + (1 - kept) / factor), attention)
            case "llama3":
                low, high = scaling.low_freq_factor, scaling.high_freq_factor
                kept = kept_by_rotations(inv_freq, original, low, high)
                return cls(inv_freq * (kept + (1 - kept) / factor))
            case "xpos":
                log_zeta = xpos_zeta(half).log() / (scaling.scale_base * factor)
                return cls(inv_freq / factor, log_zeta=log_zeta)
            case "dynamic":
                raise ConfigError(
                    "rope.type dynamic depends on a length: take RopeScaling.in_force first"
                )

    def query_table(self, num_distances: int, first: int = 0) -> RotaryTable:
        """Turns of a query by its distance to a page, [..., num_distances, rotary_dim / 2].

        The attention factor is folded in, squared: it belongs to the query and to the key.
        """
        squared = self.attention_factor**2
        return RotaryTable.build(self.inv_freq, num_distances, first, squared, self.log_zeta)

    def key_table(self, num_offsets: int) -> RotaryTable:
        """Turns of a key by its offset in its page, [..., num_offsets, rotary_dim / 2].

        With xPos they grow with the offset, by at most 1.17 in a page of 64 and a base of 512.
        """
        shrink = None if self.log_zeta is None else -self.log_zeta
        return RotaryTable.build(self.inv_freq, num_offsets, log_growth=shrink)


def ntk_multiplier(half: int, factor: float) -> Tensor:
    """factor^(-2i / (d - 2)), float64 [half]: the base times factor^(d / (d - 2)), d = 2 half > 2.

    The fastest pair is kept and the slowest divided by factor (bloc97, 2023; YaRN's paper, 3.1).
    """
    return factor ** -(torch.arange(half, dtype=torch.float64) / (half - 1))


def kept_by_rotations(inv_freq: Tensor, context: int, low: float, high: float) -> Tensor:
    """Share of a frequency that is kept: 0 below `low` turns in the context, 1 above `high`.

    Linear in the number of turns between (Peng et al. 2023, arXiv 2309.00071, 3.2; Llama 3.1).
    """
    turns = context * inv_freq.abs() / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_kept(scaling: RopeScaling, inv_freq: Tensor, context: int, base: float) -> Tensor:
    """Share of each frequency that YaRN keeps, float64 [..., half]."""
    if scaling.ramp == "rotations":
        return kept_by_rotations(inv_freq, context, scaling.beta_slow, scaling.beta_fast)
    half = inv_freq.shape[-1]

    def pair(turns: float) -> float:
        """The (fractional) pair that makes so many turns in the context."""
        return half * math.log(context / (2 * math.pi * turns)) / math.log(base)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first if last != first else 0.001  # the authors' way around a division by 0
    pairs = torch.arange(half, dtype=torch.float64)
    return 1 - ((pairs - first) / width).clamp(0, 1)


def xpos_zeta(half: int) -> Tensor:
    """zeta_i = (i / half + gamma) / (1 + gamma), gamma = 0.4; float64 [half], below 1."""
    return (torch.arange(half, dtype=torch.float64) / half + XPOS_GAMMA) / (1 + XPOS_GAMMA)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of x, paired as (i, i + rotary_dim / 2).

    x [..., head_dim]; cos and sin float32, broadcastable to [..., rotary_dim / 2]. The rotation is
    computed in float32 and returned in x's dtype.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
