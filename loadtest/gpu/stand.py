"""Where and how much is measured: a whole model on a GPU, or a toy under the interpreter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import ModelConfig
from engine.execution.cuda_graphs import CudaRecorder, Recorder
from engine.model.attention.triton import Tile
from loadtest.gpu.engine import Again

Shape = tuple[int, int]


@dataclass(frozen=True)
class Stand:
    """decode: sequences and context of decode attention, of which the middle one is tried with each
    of `tiles`; prefill: of whole prompts; product_rows: by which each of products (in, out) is
    measured. The engine generates `output` tokens behind
    prompts of each length, for so many sequences at once, repeats times. milliseconds: of work on
    the device."""

    device: str
    dtype: torch.dtype
    config: ModelConfig
    std: float
    block_size: int
    make_recorder: Callable[[], Recorder]
    milliseconds: Callable[[Callable[[], object]], float]
    num_processors: int | None
    copy_bytes: int
    decode: Sequence[Shape]
    tiles: Sequence[Tile]
    prefill: Shape
    products: Sequence[Shape]
    product_rows: Sequence[int]
    warm_up_rows: Sequence[int]
    prompts: Sequence[int]
    output: int
    batches: Sequence[int]
    budget: int
    repeats: int
    peers: bool

    def int32(self) -> dict[str, Any]:
        """Arguments of torch for integers on the device."""
        return {"dtype": torch.int32, "device": self.device}


def device_milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """The median time of one run on the device, after three that do not count."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types here
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def host_milliseconds(work: Callable[[], object]) -> float:
    """The time of one run on the CPU."""
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def gpt2_124m(max_position: int = 1280) -> ModelConfig:
    """GPT-2's smallest shape, half of each head rotated."""
    return ModelConfig(
        vocab_size=50257,
        padded_vocab_size=50304,
        num_layers=12,
        num_heads=12,
        hidden_size=768,
        intermediate_size=3072,
        max_position=max_position,
        rotary_dim=32,
    )


def on_gpu(repeats: int, batches: Sequence[int]) -> Stand:
    """The 124 M model with random weights, in bfloat16."""
    return Stand(
        device="cuda",
        dtype=torch.bfloat16,
        config=gpt2_124m(),
        std=0.02,
        block_size=64,
        make_recorder=CudaRecorder,
        milliseconds=device_milliseconds,
        num_processors=None,
        copy_bytes=2**30,
        decode=((1, 1024), (8, 1024), (64, 1024), (256, 256), (256, 1024)),
        tiles=[Tile(16, warps, stages) for warps in (1, 2, 4) for stages in (1, 2, 3)],
        prefill=(8, 1024),
        products=((768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50304)),
        product_rows=(1, 8, 64, 256, 2048),
        warm_up_rows=(1, 2, 8, 64),
        prompts=(128, 1024),
        output=128,
        batches=batches,
        budget=8192,
        repeats=repeats,
        peers=True,
    )


TOY = Stand(
    device="cpu",
    dtype=torch.bfloat16,
    config=ModelConfig(
        vocab_size=30,
        padded_vocab_size=32,
        num_layers=1,
        num_heads=1,
        hidden_size=32,
        intermediate_size=32,
        max_position=48,
        rotary_dim=16,
    ),
    std=0.3,
    block_size=16,
    make_recorder=Again,
    milliseconds=host_milliseconds,
    num_processors=0,
    copy_bytes=2**10,
    decode=((2, 17),),
    tiles=[Tile(16, 2, 1)],
    prefill=(1, 17),
    products=((32, 48),),
    product_rows=(2,),
    warm_up_rows=(1,),
    prompts=(4,),
    output=4,
    batches=(1, 2),
    budget=16,
    repeats=1,
    peers=False,
)
"""For the interpreter; its figures mean nothing."""
