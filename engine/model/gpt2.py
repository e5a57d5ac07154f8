"""GPT-2 with rotary positions. The same code trains and serves.

The network knows nothing of positions, caches or batches: it is given an `Attention`, a callable
that turns a layer's queries, keys and values into what the layer attends to. Training passes a
causal one over [batch, time]; the engine passes a paged one over the rows of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation, ModelConfig
from engine.model.attention.base import Attention


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of the stream [..., hidden_size]: LayerNorm, or RMSNorm (arXiv 1910.07467)."""
    width, eps, weight = config.hidden_size, config.norm_eps, config.norm_weight
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps, elementwise_affine=weight)
    return nn.LayerNorm(width, eps, elementwise_affine=weight, bias=config.has_norm_bias)


class QKNorm(nn.Module):
    """RMS norm of each head's query and key; weights, if any, are shared by the heads.

    It stands before the rotation. One without weights may as well have been trained after it: a
    rotation changes no length.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (3, config.num_heads, config.head_dim)
        weight = config.qk_norm_weight
        self.query = nn.RMSNorm(config.head_dim, config.norm_eps, elementwise_affine=weight)
        self.key = nn.RMSNorm(config.head_dim, config.norm_eps, elementwise_affine=weight)

    def forward(self, qkv: Tensor) -> Tensor:
        """[..., 3 * hidden_size] -> the same"""
        query, key, value = qkv.view(*qkv.shape[:-1], *self.shape).unbind(-3)
        return torch.stack((self.query(query), self.key(key), value), dim=-3).flatten(-3)


class ActivationFunction(nn.Module):
    """Elementwise, between the two products of an MLP."""

    def __init__(self, kind: Activation) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]"""
        if self.kind == "relu":
            return F.relu(x)
        if self.kind == "relu2":
            return F.relu(x).square()
        return F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Two products around an activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.has_mlp_bias
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.activation: nn.Module = ActivationFunction(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]"""
        down: Tensor = self.down(self.activation(self.up(x)))
        return down


class Block(nn.Module):
    """One layer: attention and MLP, each on a normalised copy and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.parallel = config.parallel_residual
        bias = config.has_attention_bias
        self.norm1 = make_norm(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.qk_norm = nn.Identity() if config.qk_norm == "none" else QKNorm(config)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]"""
        attended = x + self.out(attention(self.layer, self.qk_norm(self.qkv(self.norm1(x)))))
        done: Tensor = attended + self.mlp(self.norm2(x if self.parallel else attended))
        return done


class GPT2(nn.Module):
    """The decoder. Tensor names are those of model.safetensors in a model directory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.inv_freq: nn.Parameter | None = None  # for whoever rotates
        if config.learned_frequencies != "none":
            layers = [config.num_layers] if config.learned_frequencies == "per_layer" else []
            self.inv_freq = nn.Parameter(torch.empty(*layers, config.rotary_dim // 2))

    def forward(self, token_ids: Tensor, attention: Attention) -> Tensor:
        """Token ids [...] (int64) -> final hidden states [..., hidden_size]."""
        x = self.embedding(token_ids)
        for block in self.blocks:
            x = block(x, attention)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden_size] -> logits [..., padded_vocab_size]."""
        logits: Tensor = self.head(hidden)
        return logits
