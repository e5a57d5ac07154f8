"""Small random models, written to disk as a user's would be."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.config import ModelConfig
from engine.model.gpt2 import GPT2

WORDS = [b"he", b"the", b" the", b"in", b"er", b" a", b"ou", b"ab", b"abc"]
WORDS += ["é".encode(), " €".encode()[:3]]
EOS = 256 + len(WORDS)
VOCAB_SIZE = EOS + 1


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, 64 wide, a context of 192 tokens: three pages of 64."""
    settings: dict[str, object] = {
        "vocab_size": VOCAB_SIZE,
        "padded_vocab_size": 288,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 160,
        "max_position": 192,
        "rotary_dim": 16,
        "eos_token_id": EOS,
    }
    return ModelConfig.from_dict(settings | changes)


def random_model(config: ModelConfig, seed: int = 0) -> GPT2:
    """Weights large enough that what is attended to decides the next token."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(config)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of the 256 bytes and a few words."""
    tokens = [bytes([byte]) for byte in range(256)] + WORDS
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (directory / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    config = {"pattern": r"\s?\w+|\s+|[^\s\w]+", "special_tokens": {"<|endoftext|>": EOS}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(directory: Path, config: ModelConfig, seed: int = 0) -> GPT2:
    """A whole model directory; returns the model, in float32."""
    model = random_model(config, seed)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = dict(model.state_dict())
    if config.tie_embeddings:
        del tensors["head.weight"]
    save_file(tensors, directory / "model.safetensors")
    write_tokenizer(directory)
    return model
