"""A model trained a little further at stretched positions, on whole windows of the new length.

The papers' protocol (Chen et al. 2023, arXiv 2306.15595; Peng et al. 2023, arXiv 2309.00071).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from engine.model.attention.causal import CausalAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model, read_config
from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies
from engine.scaling import RopeScaling
from weights.export import export_weights
from weights.loss import head_loss
from weights.optimizer import Optimizer
from weights.tokens import Mixture, Tokens


@dataclass(frozen=True)
class Tuning:
    """steps: of one window each. learning_rate: at the start, falling to 0 on a straight line."""

    steps: int
    learning_rate: float = 3e-4
    seed: int = 1


def _loss(
    model: GPT2, attention: CausalAttention, token_ids: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(token_ids, attention)
    return head_loss(hidden, model.head.weight, targets, torch.bfloat16)


def fine_tune(
    model_dir: Path,
    tuned_dir: Path,
    sources: Mapping[str, Tokens],
    scaling: RopeScaling,
    length: int,
    tuning: Tuning,
) -> float:
    """Write the fine-tuned model, declared for windows of `length`; processor seconds per step.

    Unless scaling is `default` its context is to be `length` and the model keeps its own: it is
    served under the scaling. AdamW without weight decay; sources are read by their size.
    """
    config = read_config(model_dir)
    model = load_model(model_dir, torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_()
    inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
    profile = RopeProfile.build(scaling, inv_freq, config.max_position, config.rope_base)
    table = RotaryTable.build(profile.inv_freq, length, factor=profile.attention_factor)
    attention = CausalAttention(table, config.num_heads)
    optimizer = Optimizer(model, tuning.learning_rate, weight_decay=0.0, kind="adamw")
    mixture = Mixture(sources, {name: float(len(t)) for name, t in sources.items()}, tuning.seed)
    seconds = []
    for step in tqdm(range(tuning.steps), desc=f"fine-tune {scaling.type}", unit=" steps"):
        began = time.process_time()
        loss = _loss(model, attention, *mixture.batch(step, 1, length))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1 - step / tuning.steps)
        seconds.append(time.process_time() - began)
    if scaling.type == "default":
        config = replace(config, max_position=length)
    export_weights({"config": config.to_dict(), "model": model.state_dict()}, tuned_dir)
    for path in model_dir.glob("tokenizer*"):
        (tuned_dir / path.name).write_bytes(path.read_bytes())
    return statistics.median(seconds)
