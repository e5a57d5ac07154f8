"""The optimizer and its schedule: Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalises each matrix's momentum. With updates scaled to AdamW's
usual size (Liu et al. 2025, arXiv 2502.16982, 2.2) one learning rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from weights.training.recipe import OptimizerKind, Recipe


@dataclass(frozen=True)
class Schedule:
    """Warm up, stay, decay. The stay has no end of its own: the end may be asked for at any step.

    warmup: steps from 0 to the peak.
    decay_start, decay_from: the first step of the decay and the share of the peak it starts from;
    decay_steps: steps from there to 0. No decay_start: nobody has asked for the end yet.
    cosine: the decay is half a cosine, not a straight line (Loshchilov & Hutter, arXiv 1608.03983).
    """

    warmup: int
    decay_start: int | None = None
    decay_from: float = 1.0
    decay_steps: int = 0
    cosine: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule that a recipe asks for."""
        if recipe.schedule == "stay" or recipe.steps is None:
            return cls(recipe.warmup)
        steps = max(1, recipe.steps - recipe.warmup)
        return cls(recipe.warmup, recipe.warmup, 1.0, steps, cosine=True)

    def ending(self, step: int, steps: int) -> Schedule:
        """The same schedule up to a step, and from there straight to 0 in some steps.

        May be asked for again, to end earlier or later.
        """
        return replace(
            self,
            decay_start=step,
            decay_from=self.scale(step),
            decay_steps=max(1, steps),
            cosine=False,
        )

    def scale(self, step: int) -> float:
        """Share of the peak learning rate at a step, in 0 .. 1."""
        if self.decay_start is None or step < self.decay_start:
            return min(1.0, (step + 1) / max(1, self.warmup))
        left = max(0, self.decay_start + self.decay_steps - step) / self.decay_steps
        return self.decay_from * ((1 - math.cos(math.pi * left)) / 2 if self.cosine else left)

    @property
    def end(self) -> int | None:
        """The step before which the decay is over; None where nobody has asked for the end."""
        return None if self.decay_start is None else self.decay_start + self.decay_steps

    def finished(self, step: int) -> bool:
        """Whether the decay is over before this step."""
        return self.end is not None and step >= self.end


class Optimizer:
    """Muon and AdamW as one, or AdamW alone. Only the matrices of the layers decay."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float = 0.05,
        kind: OptimizerKind = "muon",
    ) -> None:
        named = list(model.named_parameters())
        of_layers = {name for name, p in named if p.ndim == 2 and "blocks" in name.split(".")}
        matrices = [p for name, p in named if name in of_layers]
        others = [p for name, p in named if name not in of_layers]
        self.learning_rate = learning_rate
        if kind == "muon":
            muon = torch.optim.Muon(
                matrices,
                lr=learning_rate,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            rest = [{"params": others, "weight_decay": 0.0}]
        else:
            muon = None
            decaying = {"params": matrices, "weight_decay": weight_decay}
            rest = [decaying, {"params": others, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95))
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw) if muon else (adamw,)

    def step(self, scale: float) -> None:
        """One step at a share of the peak learning rate; forgets the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.learning_rate * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything that load_state_dict needs to go on exactly."""
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what state_dict gave."""
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])
