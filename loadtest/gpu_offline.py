"""A loop around the engine's network, cache and graphs that needs no scheduler, tokenizer or HTTP.

For machines with a GPU and little else. All prompts have the same length, and every sequence has
its pages from the start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.execution.cuda_graphs import (
    DecodeGraphs,
    DecodeState,
    DecodeStep,
    Recorder,
    TokenReader,
)
from engine.execution.device_sampler import DeviceSampler, SamplingTensors
from engine.model.attention.base import AttentionMetadata, KVCache
from engine.model.attention.triton import Tile, TritonBackend
from engine.model.gpt2 import GPT2
from engine.model.profiles import ProfileTables
from engine.scaling import UNSCALED


def random_model(config: ModelConfig, dtype: torch.dtype, device: str, std: float = 0.3) -> GPT2:
    """Weights from a fixed seed, made on the CPU."""
    generator = torch.Generator().manual_seed(0)
    model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(device, dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class Generated:
    """Greedy tokens [num_seqs][num_tokens], and when: seconds for all the first ones, then for all
    the others, and how much of the latter the host spent before it waited."""

    tokens: list[list[int]]
    first_s: float
    rest_s: float
    host_s: float


class OfflineLoop:
    """Prompts in chunks, then decode steps by graphs, read one step behind."""

    def __init__(
        self,
        model: GPT2,
        *,
        max_seqs: int,
        max_tokens: int,
        recorder: Recorder,
        block_size: int = 64,
        wide: Tile | None = None,
        num_processors: int | None = None,
    ) -> None:
        """max_tokens: of a sequence, prompt and output; wide, num_processors: see TritonBackend."""
        config, weight = model.config, model.embedding.weight
        self.model, self.size, self.device = model, block_size, weight.device
        self.blocks_each = -(-max_tokens // block_size)
        cache = KVCache.allocate(
            config,
            max_seqs * self.blocks_each,
            block_size,
            weight.dtype,
            self.device,
            dimensions_last=True,
        )
        tables = ProfileTables(config, block_size, device=self.device)
        self.backend = TritonBackend(
            config, tables, cache, wide=wide, num_processors=num_processors
        )
        self.backend.put_profile(0, UNSCALED, max_tokens)
        self.state = DecodeState(max_seqs, self.blocks_each, self.device)
        self.sampler = DeviceSampler(config.vocab_size, device=self.device)
        step = DecodeStep(model, self.backend, self.sampler, self.state)
        self.graphs = DecodeGraphs(step, self.state, recorder)
        self.reader = TokenReader(self.state)

    def tables(self, seqs: Sequence[int]) -> Tensor:
        """Block ids int32 [len(seqs), blocks_each]; a sequence's pages lie side by side."""
        first = torch.tensor(seqs, dtype=torch.int32, device=self.device)[:, None]
        ahead = torch.arange(self.blocks_each, dtype=torch.int32, device=self.device)
        return first * self.blocks_each + ahead

    def chunk(self, seqs: Sequence[int], token_ids: Tensor, start: int) -> Tensor:
        """Logits [len(seqs), padded_vocab_size] of the last of token_ids int64 [len(seqs), count],
        whose first stands at `start`."""
        count, device = token_ids.shape[1], self.device
        end, tables = start + count, self.tables(seqs)
        blocks = -(-end // self.size)
        position = torch.arange(start, end, device=device)
        slots = tables[:, position // self.size].long() * self.size + position % self.size
        bases = torch.arange(blocks, dtype=torch.int32, device=device) * self.size
        int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
        metadata = AttentionMetadata(
            query_start=torch.arange(len(seqs) + 1, **int32) * count,
            positions=position.to(torch.int32).repeat(len(seqs)),
            slot_mapping=slots.flatten(),
            block_tables=tables[:, :blocks].contiguous(),
            bases=bases.repeat(len(seqs), 1),
            num_blocks=torch.full((len(seqs),), blocks, **int32),
            profiles=torch.zeros(len(seqs), **int32),
        )
        hidden = self.model(token_ids.flatten(), self.backend.bind(metadata))
        return self.model.logits(hidden[count - 1 :: count])

    @torch.inference_mode()
    def generate(
        self, prompts: Tensor, num_tokens: int, chunk_rows: int, step_rows: int = 8192
    ) -> Generated:
        """Greedy; prompts int64 [num_seqs, length] on the device, in chunks of chunk_rows tokens of
        a sequence, about step_rows rows in a step."""
        num_seqs, length = prompts.shape
        rows = list(range(num_seqs))
        begun = time.perf_counter()
        together = max(1, step_rows // min(chunk_rows, length))
        logits = []
        for first in range(0, num_seqs, together):
            seqs = rows[first : first + together]
            for start in range(0, length, chunk_rows):
                piece = prompts[seqs, start : start + chunk_rows]
                last = self.chunk(seqs, piece, start)
            logits.append(last)
        sampled = torch.zeros(num_seqs, dtype=torch.int32, device=self.device)
        greedy = SamplingTensors.greedy(num_seqs, self.device)
        self.sampler.sample(torch.cat(logits), greedy, sampled)
        tokens = [[token] for token in sampled.tolist()]
        begun_rest = time.perf_counter()

        self.state.put(
            rows,
            {
                "token_ids": sampled,
                "positions": torch.full((num_seqs,), length),
                "block_tables": self.tables(rows),
                "bases": (torch.arange(self.blocks_each) * self.size).repeat(num_seqs, 1),
                "num_blocks": torch.full((num_seqs,), self.blocks_each),
            },
        )
        pending, host = None, 0.0
        for _ in range(num_tokens - 1):
            at = time.perf_counter()
            self.graphs.launch(num_seqs)
            ahead = self.reader.start(num_seqs)
            host += time.perf_counter() - at
            if pending is not None:
                self._take(tokens, pending.read())
            pending = ahead
        if pending is not None:
            self._take(tokens, pending.read())
        done = time.perf_counter()
        self.state.put(rows, {"num_blocks": torch.zeros(num_seqs, dtype=torch.int32)})
        return Generated(tokens, begun_rest - begun, done - begun_rest, host)

    @staticmethod
    def _take(tokens: list[list[int]], sampled: list[int]) -> None:
        for mine, token in zip(tokens, sampled, strict=True):
            mine.append(token)
