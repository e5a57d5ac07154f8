"""The rotation profiles in force, a row of tables each, for attention to choose from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies
from engine.scaling import RopeScaling

CHUNK = 1024
"""Positions that are computed together. Always as many, so that a table's bits do not depend on how
long it is: the ends of a tensor may go another way through torch's cosine than its middle."""


@dataclass(frozen=True)
class _Row:
    """A scaling in force, and its turns."""

    scaling: RopeScaling
    profile: RopeProfile
    queries: RotaryTable
    keys: RotaryTable


class ProfileTables:
    """Rows of turns: a query's by its distance to a page, a key's by its offset in its page."""

    def __init__(
        self,
        config: ModelConfig,
        block_size: int,
        *,
        num_rows: int = 1,
        learned: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """All rows are empty. learned: float64 [rotary_dim / 2] or [num_layers, rotary_dim / 2],
        radians per token, where config says that there are such; ConfigError where they are not."""
        self.num_rows = num_rows
        self.block_size = block_size
        self._trained_context = config.max_position
        self._base: float | None = config.rope_base
        self._inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
        if config.learned_frequencies != "none":
            if learned is None:
                raise ConfigError("the learned frequencies are missing")
            self._base, self._inv_freq = None, learned.double().cpu()
        self._device = device
        self._rows: list[_Row | None] = [None] * num_rows

    def put(self, row: int, scaling: RopeScaling, num_positions: int) -> None:
        """Have a row hold a scaling in force (not `dynamic`), over so many positions or more."""
        known = self._rows[row]
        if known is None or known.scaling != scaling:
            profile = RopeProfile.build(scaling, self._inv_freq, self._trained_context, self._base)
            queries = profile.query_table(CHUNK).to(self._device)
            keys = profile.key_table(self.block_size).to(self._device)
            known = _Row(scaling, profile, queries, keys)
        chunks = [
            known.profile.query_table(CHUNK, first).to(self._device)
            for first in range(known.queries.cos.shape[-2], num_positions, CHUNK)
        ]
        if chunks:
            known = replace(known, queries=RotaryTable.joined([known.queries, *chunks]))
        self._rows[row] = known

    def queries(self, row: int, layer: int) -> RotaryTable:
        """Turns of queries, float32 [num_positions, rotary_dim / 2]."""
        return self._row(row).queries.layer(layer)

    def keys(self, row: int, layer: int) -> RotaryTable:
        """Turns of keys, float32 [block_size, rotary_dim / 2]."""
        return self._row(row).keys.layer(layer)

    def _row(self, row: int) -> _Row:
        held = self._rows[row]
        if held is None:
            raise ValueError(f"profile {row} was never put")
        return held
