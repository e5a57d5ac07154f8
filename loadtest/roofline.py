"""What the machine's limits would allow: every byte read once at full speed, every product too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.config import DType
from engine.model.attention.base import KVCache
from engine.model.gpt2 import GPT2
from engine.model.library import KernelUnavailableError, supported_variants
from engine.model.loader import read_config
from engine.resources import resolve_device, resolve_dtype
from loadtest.machine import Machine
from loadtest.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """What a step must read and multiply, as `auto` would serve it on this machine.

    kv_bytes: of one token; embedding: parameters in it; file_bytes: of the weights in this dtype;
    weight_bytes: as they are held, in 12 bits each where a CPU's kernel multiplies bfloat16 (all
    but those with too many patches, which no trained weights had).
    """

    parameters: int
    embedding: int
    layers: int
    hidden: int
    device: str
    dtype: str
    file_bytes: int
    weight_bytes: int
    kv_bytes: int
    vocab_size: int
    max_position: int

    @classmethod
    def of(cls, model: Path, dtype: DType) -> Sizes:
        """Of a model directory, served in this dtype, without its weights.

        Raises CheckpointError for what is no model directory.
        """
        config = read_config(model)
        with torch.device("meta"):
            network = GPT2(config)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        device = resolve_device("auto")
        served = resolve_dtype(dtype, device)
        return cls(
            parameters=parameters,
            embedding=config.padded_vocab_size * config.hidden_size,
            layers=config.num_layers,
            hidden=config.hidden_size,
            device=device.type,
            dtype=str(served).removeprefix("torch."),
            file_bytes=parameters * served.itemsize,
            weight_bytes=parameters * served.itemsize - _bytes_saved(network, device.type, served),
            kv_bytes=KVCache.bytes_per_block(config, 1, served),
            vocab_size=config.vocab_size,
            max_position=config.max_position,
        )


def _bytes_saved(network: nn.Module, device: str, dtype: torch.dtype) -> int:
    """By holding a network's products in 12 bits; a weight that two modules share counts once."""
    if device != "cpu" or dtype != torch.bfloat16 or not _has_products():
        return 0
    multiplied = {module.weight for module in network.modules() if isinstance(module, nn.Linear)}
    return sum(weight.numel() // 2 for weight in multiplied)


def _has_products() -> bool:
    """Whether products are the compiled kernel's."""
    try:
        return bool(supported_variants("linear"))
    except KernelUnavailableError:
        return False


def decode_limit(sizes: Sizes, machine: Machine, workload: Workload) -> float:
    """Tokens a second if a step read every weight and every cached byte once, at full bandwidth."""
    context = workload.prompt_tokens + workload.output_tokens / 2
    cached = workload.streams * context * sizes.kv_bytes
    return workload.streams * machine.read_gb_s * 1e9 / (sizes.weight_bytes + cached)


def of_read_limit(
    sizes: Sizes, machine: Machine, workload: Workload, tokens_per_s: float
) -> dict[str, float]:
    """What decode_limit makes of a rate, for a row of results; nothing where the bandwidth that was
    measured, the CPU's, is not what was read with."""
    if sizes.device != "cpu":
        return {}
    limit = decode_limit(sizes, machine, workload)
    return {
        "read_limit_tokens_per_s": round(limit, 1),
        "of_read_limit": round(tokens_per_s / limit, 3),
    }


def prefill_limit(sizes: Sizes, machine: Machine, tokens: int) -> float:
    """Prompt tokens a second if all products ran as fast as a large one.

    The products of a prompt: two operations for each parameter but the embedding's, for each token;
    those of the head once; four of attention for each feature of a token and one before it.
    """
    weights = 2 * (sizes.parameters - sizes.embedding) * tokens + 2 * sizes.embedding
    attention = 2 * sizes.layers * sizes.hidden * tokens * (tokens + 1)
    return tokens * machine.gemm_gflop_s(sizes.dtype) * 1e9 / (weights + attention)
