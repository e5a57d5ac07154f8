"""Out again: a model of ours as Hugging Face's GPT-NeoX, with the same logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.loader import canonical
from engine.scaling import UNSCALED
from weights.formats.assembly import by_head
from weights.formats.known import GPT_NEOX

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
LEFT_OUT = ("vocab_size", "bias", "attention_bias", "mlp_bias", "norm_bias", "norm_weight")
"""What GPT-NeoX's config cannot say; kept under `ropeway` for the way back."""


def neox_config(config: ModelConfig) -> dict[str, Any]:
    """config.json for AutoModelForCausalLM. Raises CheckpointError for what a NeoX has not."""
    for present, what in {
        config.norm != "layernorm": "RMS norms",
        config.qk_norm != "none": "a QK-norm",
        config.head_bias: "a bias of the head",
        config.rope != UNSCALED: "a scaling of ours",
        config.learned_frequencies != "none": "learned frequencies",
    }.items():
        if present:
            raise CheckpointError(f"GPT-NeoX has no place for {what}; it cannot leave that way")
    fraction = config.rotary_dim / config.head_dim
    while int(config.head_dim * fraction) < config.rotary_dim:  # as Hugging Face computes it
        fraction = math.nextafter(fraction, 2.0)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_position,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.has_attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "rotary_pct": fraction,
        "rotary_emb_base": config.rope_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_base,
            "partial_rotary_factor": fraction,
        },
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id,
        "ropeway": {name: getattr(config, name) for name in LEFT_OUT},
    }


def neox_tensors(
    config: ModelConfig, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, as stored under `config`, by GPT-NeoX's names; absent biases as zeros."""
    for name, stored in tensors:
        module, _, kind = name.rpartition(".")
        layer = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
        tensor = canonical(name, stored, config)
        if module == "qkv":
            tensor = by_head(tensor, config)
        theirs = str(GPT_NEOX.modules[module]).format(layer)
        yield f"{theirs}.{kind}", tensor.contiguous()
        lacks_bias = module.startswith("mlp.") and not config.has_mlp_bias
        if lacks_bias or ("norm" in module and not config.has_norm_bias):
            yield f"{theirs}.bias", torch.zeros(len(tensor), dtype=tensor.dtype)
    if not config.norm_weight:
        yield from _plain_norms(config)


def _plain_norms(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Weights and biases of norms that have none."""
    modules = [str(GPT_NEOX.modules["norm"])]
    for layer in range(config.num_layers):
        modules += [str(GPT_NEOX.modules[name]).format(layer) for name in ("norm1", "norm2")]
    for module in modules:
        yield f"{module}.weight", torch.ones(config.hidden_size)
        yield f"{module}.bias", torch.zeros(config.hidden_size)
