"""What the machine's limits would allow: every byte read once at full speed, every product too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import DType
from engine.core import resolve_device, resolve_dtype
from engine.model.gpt2 import GPT2
from engine.model.loader import read_config
from loadtest.machine import Machine
from loadtest.workload import Workload

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Sizes:
    """What a step must read and multiply, as `auto` would serve it on this machine.

    kv_bytes: of one token; embedding: parameters in it.
    """

    parameters: int
    embedding: int
    layers: int
    hidden: int
    device: str
    dtype: str
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
        name = str(resolve_dtype(dtype, device)).removeprefix("torch.")
        return cls(
            parameters=parameters,
            embedding=config.padded_vocab_size * config.hidden_size,
            layers=config.num_layers,
            hidden=config.hidden_size,
            device=device.type,
            dtype=name,
            weight_bytes=parameters * ITEM_BYTES[name],
            kv_bytes=2 * config.num_layers * config.hidden_size * ITEM_BYTES[name],
            vocab_size=config.vocab_size,
            max_position=config.max_position,
        )


def decode_limit(sizes: Sizes, machine: Machine, workload: Workload) -> float:
    """Tokens a second if a step read every weight and every cached byte once, at full bandwidth."""
    context = workload.prompt_tokens + workload.output_tokens / 2
    cached = workload.streams * context * sizes.kv_bytes
    return workload.streams * machine.read_gb_s * 1e9 / (sizes.weight_bytes + cached)


def prefill_limit(sizes: Sizes, machine: Machine, tokens: int) -> float:
    """Prompt tokens a second if all products ran as fast as a large one.

    The products of a prompt: two operations for each parameter but the embedding's, for each token;
    those of the head once; four of attention for each feature of a token and one before it.
    """
    weights = 2 * (sizes.parameters - sizes.embedding) * tokens + 2 * sizes.embedding
    attention = 2 * sizes.layers * sizes.hidden * tokens * (tokens + 1)
    return tokens * machine.gemm_gflop_s(sizes.dtype) * 1e9 / (weights + attention)
