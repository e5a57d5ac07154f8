"""Ways to tell a transformer where its tokens stand, behind one interface, with a plain cache.

An encoding may add to the embeddings, turn queries and keys, or add to the scores. What it does to
a key depends on the key's own position only, so keys are cached as they are turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.gpt2 import GPT2
from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies, rotate
from engine.scaling import RopeScaling

Turns = tuple[RotaryTable, RotaryTable]


def turn(query: Tensor, key: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
    """Queries and keys [..., heads, time, head_dim], each turned by its position."""
    if turns is None:
        return query, key
    of_query, of_key = turns
    return rotate(query, of_query.cos, of_query.sin), rotate(key, of_key.cos, of_key.sin)


class Encoding(nn.Module):
    """No positions at all (Kazemnejad et al. 2023, arXiv 2305.19466); the root of the others."""

    shifts = True
    """Whether a cache stays valid when its oldest tokens are dropped and the rest moves up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def initialise(self, seed: int) -> None:
        """Draw what is random at the start."""

    def embed(self, x: Tensor, start: int) -> Tensor:
        """Embeddings [..., time, hidden_size] of positions from start."""
        return x

    def turns(self, start: int, time: int) -> Turns | None:
        """Turns of queries and of keys, [time, rotary_dim / 2], from a position on."""
        return None

    def bias(self, queries: int, keys: int) -> Tensor | None:
        """Added to scores [heads, queries, keys], the last query being at the last key."""
        return None


class Learned(Encoding):
    """A vector per position, learned: GPT-2's own (Radford et al. 2019)."""

    shifts = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.empty(config.max_position, config.hidden_size))
        self.initialise(0)

    def initialise(self, seed: int) -> None:
        """As small as the embeddings."""
        nn.init.normal_(self.table, std=0.02, generator=torch.Generator().manual_seed(seed))

    def embed(self, x: Tensor, start: int) -> Tensor:
        """Embeddings plus the positions' vectors."""
        return x + self.table[start : start + x.shape[-2]]


class Sinusoidal(Encoding):
    """Fixed sines and cosines, added (Vaswani et al. 2017, arXiv 1706.03762, 3.5).

    As small as embeddings are at the start (standard deviation 0.02): unscaled, they drown them.
    """

    shifts = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        inv_freq = inverse_frequencies(config.hidden_size, 10_000.0)
        angles = torch.arange(config.max_position, dtype=torch.float64)[:, None] * inv_freq
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        self.table: Tensor
        self.register_buffer("table", (waves * 0.02 * math.sqrt(2)).float())

    def embed(self, x: Tensor, start: int) -> Tensor:
        """Embeddings plus the positions' waves."""
        return x + self.table[start : start + x.shape[-2]]


class Rotary(Encoding):
    """RoPE: queries and keys turned (Su et al. 2021, arXiv 2104.09864), as config.rope says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
        profile = RopeProfile.build(config.rope, inv_freq, config.max_position, config.rope_base)
        for name, table in (
            ("query", profile.query_table(config.max_position)),
            ("key", profile.key_table(config.max_position)),
        ):
            self.register_buffer(f"{name}_cos", table.cos)
            self.register_buffer(f"{name}_sin", table.sin)

    def turns(self, start: int, time: int) -> Turns | None:
        """Rows of the tables."""
        named, part = dict(self.named_buffers()), slice(start, start + time)
        query = RotaryTable(named["query_cos"][part], named["query_sin"][part])
        return query, RotaryTable(named["key_cos"][part], named["key_sin"][part])


class LearnedRotary(Encoding):
    """RoPE whose frequencies are learned, from the usual ones on; shared by the layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
        self.inv_freq = nn.Parameter(inv_freq.float())

    def turns(self, start: int, time: int) -> Turns | None:
        """With gradients to the frequencies."""
        positions = torch.arange(start, start + time, device=self.inv_freq.device)
        angles = positions[:, None] * self.inv_freq
        table = RotaryTable(angles.cos(), angles.sin())
        return table, table


class RelativeBias(Encoding):
    """T5's: a number per head and bucket of distances (Raffel et al. 2020, arXiv 1910.10683).

    Half of the buckets are single distances, the others grow with the logarithm up to `farthest`.
    Shared by the layers, as there. gain: what the learned numbers are multiplied by. Under Adam it
    is a learning rate so many times as high for them alone: at one that suits weights, a few
    hundred steps cannot take a bias as far as scores reach.
    """

    buckets, farthest = 32, 128

    def __init__(self, config: ModelConfig, gain: float = 1.0) -> None:
        super().__init__(config)
        self.gain = gain
        self.weight = nn.Parameter(torch.zeros(config.num_heads, self.buckets))
        distance = torch.arange(config.max_position)
        exact = self.buckets // 2
        far = (distance.clamp_min(1) / exact).log() / math.log(self.farthest / exact)
        bucket = torch.where(distance < exact, distance, (exact + far * exact).long())
        self.bucket: Tensor
        self.register_buffer("bucket", bucket.clamp_max(self.buckets - 1))

    def bias(self, queries: int, keys: int) -> Tensor | None:
        """[heads, queries, keys]; what lies ahead of a query is masked elsewhere."""
        last = torch.arange(keys - queries, keys, device=self.weight.device)
        distance = last[:, None] - torch.arange(keys, device=self.weight.device)
        return self.gain * self.weight[:, self.bucket[distance.clamp_min(0)]]


class EncodedAttention:
    """Attention under an encoding: whole sequences, or one token at a time with a cache.

    What depends on positions only (turns, bias) is computed in the first layer, for all of them.
    keys, values: by layer, [batch, heads, time, head_dim], as turned; empty without a cache.
    """

    def __init__(self, encoding: Encoding, *, cached: bool = False) -> None:
        self.encoding = encoding
        self.num_heads = encoding.config.num_heads
        self.cached = cached
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._turns: Turns | None = None
        self._bias: Tensor | None = None

    @property
    def start(self) -> int:
        """Tokens that the cache holds of the last layer: the position of the next one."""
        last = self.keys.get(self.encoding.config.num_layers - 1)
        return 0 if last is None else last.shape[2]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[batch, time, 3 * hidden_size] -> [batch, time, hidden_size]"""
        batch, time, width = qkv.shape
        heads = qkv.view(batch, time, 3, self.num_heads, width // (3 * self.num_heads))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        before = self.keys[layer].shape[2] if layer in self.keys else 0
        if layer == 0:
            self._turns = self.encoding.turns(before, time)
            self._bias = self.encoding.bias(time, before + time)
        query, key = turn(query, key, self._turns)
        if self.cached:
            if before:
                key = torch.cat((self.keys[layer], key), dim=2)
                value = torch.cat((self.values[layer], value), dim=2)
            self.keys[layer], self.values[layer] = key, value
        bias = self._bias
        if time == 1 or bias is not None:
            ahead = torch.ones(time, key.shape[2], dtype=torch.bool, device=qkv.device)
            mask = torch.zeros_like(ahead, dtype=query.dtype).masked_fill_(
                ahead.triu(key.shape[2] - time + 1), -torch.inf
            )
            full = mask if bias is None else mask + bias.to(query.dtype)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=full)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).reshape(batch, time, width // 3)


class EncodedGPT2(nn.Module):
    """The network, and where its tokens stand."""

    def __init__(self, config: ModelConfig, encoding: Encoding) -> None:
        super().__init__()
        self.config = config
        self.network = GPT2(config)
        self.encoding = encoding

    def forward(self, token_ids: Tensor, attention: EncodedAttention) -> Tensor:
        """int64 [batch, time], which follow what the attention has cached -> hidden states."""
        network = self.network
        x = self.encoding.embed(network.embedding(token_ids), attention.start)
        for block in network.blocks:
            x = block(x, attention)
        hidden: Tensor = network.norm(x)
        return hidden


def half_rotated(config: ModelConfig) -> ModelConfig:
    """The first half of each head is rotated."""
    return replace(config, rotary_dim=config.head_dim // 2)


def with_xpos(config: ModelConfig) -> ModelConfig:
    """The paper's proportion: a scale base of half the window (512 for 1,024 tokens)."""
    return replace(config, rope=RopeScaling(type="xpos", scale_base=config.max_position / 2))


ENCODINGS: Mapping[str, Callable[[ModelConfig], Encoding]] = MappingProxyType(
    {
        "RoPE": Rotary,
        "RoPE, half the dims": lambda config: Rotary(half_rotated(config)),
        "RoPE, learned frequencies": LearnedRotary,
        "xPos": lambda config: Rotary(with_xpos(config)),
        "learned absolute": Learned,
        "sinusoidal": Sinusoidal,
        "T5 relative bias": RelativeBias,
        "T5 relative bias, 10 x its rate": lambda config: RelativeBias(config, 10.0),
        "none": Encoding,
    }
)
"""By name; each is given a configuration whose rotary_dim is head_dim."""

SAME_COST: Mapping[str, str] = MappingProxyType(
    {"T5 relative bias, 10 x its rate": "T5 relative bias"}
)
"""Encodings that compute what another one does: they are not timed themselves."""
