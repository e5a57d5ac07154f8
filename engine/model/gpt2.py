"""GPT-2 with rotary positions. The same code trains and serves.

The network knows nothing of positions, caches or batches: it is given an `Attention`, a callable
that turns a layer's queries, keys and values into what the layer attends to. Training passes a
causal one over [batch, time]; the engine passes a paged one over the rows of a step.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.model.attention.base import Attention


class MLP(nn.Module):
    """Two products around a GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.activation: nn.Module = nn.GELU(approximate)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]"""
        down: Tensor = self.down(self.activation(self.up(x)))
        return down


class Block(nn.Module):
    """One layer: attention, then MLP, each on a normalised copy and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm1 = nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]"""
        x = x + self.out(attention(self.layer, self.qkv(self.norm1(x))))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT2(nn.Module):
    """The decoder. Tensor names are those of model.safetensors in a model directory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)
        self.head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

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
