"""A model trained a little further at stretched positions, on whole windows of the new length.

The papers' protocol (Chen et al. 2023, arXiv 2306.15595; Peng et al. 2023, arXiv 2309.00071).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from engine.model.attention.causal import CausalAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model, read_config
from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies
from engine.scaling import RopeScaling
from weights.corpus.tokens import Mixture, Tokens
from weights.training.export import export_weights
from weights.training.loss import head_loss
from weights.training.optimizer import Optimizer


@dataclass(frozen=True)
class Tuning:
    """steps: of as many tokens as one stretched window has.

    learning_rate: at the start, falling to 0 on a straight line.
    """

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
    windows: tuple[int, int],
    tuning: Tuning,
) -> float:
    """Write the model, fine-tuned under a scaling; processor seconds per step.

    windows: of a step, how many and of how many tokens. The model's settings stay as they were: it
    is to be served under the scaling. AdamW without weight decay; sources are read by their size.
    """
    rows, length = windows
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
    label = f"fine-tune {tuned_dir.name}"
    for step in tqdm(range(tuning.steps), desc=label, unit=" steps", mininterval=5):
        began = time.process_time()
        loss = _loss(model, attention, *mixture.batch(step, rows, length))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1 - step / tuning.steps)
        seconds.append(time.process_time() - began)
    export_weights({"config": config.to_dict(), "model": model.state_dict()}, tuned_dir)
    for path in model_dir.glob("tokenizer*"):
        (tuned_dir / path.name).write_bytes(path.read_bytes())
    return statistics.median(seconds)
