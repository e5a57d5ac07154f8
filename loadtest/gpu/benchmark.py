"""Figures of a GPU: kernels beside a copy and PyTorch's own, the engine beside the roofline."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config import SchedulerConfig
from engine.execution.sampling_tensors import SamplingTensors
from engine.model.attention.base import AttentionMetadata, KVCache
from engine.model.attention.triton import WIDE_TILES, Tile, TritonBackend, find_wide_tile
from engine.model.cuda_layers import WIDE_TILES as PRODUCT_TILES
from engine.model.cuda_layers import TritonProduct, narrow_tile, use_triton
from engine.model.profiles import ProfileTables
from engine.params import SamplingParams
from engine.request import Request
from engine.scaling import UNSCALED
from loadtest.gpu.engine import GREEDY, BareEngine, random_model
from loadtest.gpu.peers import hugging_face, theirs_continuous, theirs_generate
from loadtest.gpu.report import Report
from loadtest.gpu.stand import Shape, Stand

SAMPLED = {
    "greedy": GREEDY,
    "drawn": SamplingParams(),
    "top_k_and_top_p": SamplingParams(top_k=50, top_p=0.9),
    "penalties": SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.1),
    "biases": SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(20), 1.0)),
    "logprobs_5": SamplingParams(temperature=0.0, logprobs=5),
}
"""What is asked of the sampler."""


def copy_gb_s(stand: Stand) -> float:
    """Bytes read and written by a copy on the device, GB/s."""
    source = torch.empty(stand.copy_bytes, dtype=torch.uint8, device=stand.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / stand.milliseconds(lambda: target.copy_(source)) / 1e6


class PagedCase:
    """A step of attention over full contexts, of one layer of the model."""

    def __init__(self, stand: Stand, num_seqs: int, context: int, rows_each: int) -> None:
        """rows_each: 1 decodes, context computes the whole prompt."""
        self.stand = stand
        device, size = stand.device, stand.block_size
        self.config = replace(stand.config, num_layers=1)
        pages = -(-context // size)
        self.cache = KVCache.allocate(
            self.config, num_seqs * pages, size, stand.dtype, device, dimensions_last=True
        )
        for each in (*self.cache.keys, *self.cache.values):
            each.normal_()
        self.profiles = ProfileTables(self.config, size, device=device)
        width = 3 * self.config.hidden_size
        self.qkv = torch.randn(num_seqs * rows_each, width, device=device).to(stand.dtype)
        int32 = stand.int32()
        positions = torch.arange(context - rows_each, context, **int32)
        tables = torch.randperm(num_seqs * pages, device=device).to(torch.int32).view(num_seqs, -1)
        slots = tables[:, (positions // size).long()].long() * size
        self.metadata = AttentionMetadata(
            query_start=torch.arange(num_seqs + 1, **int32) * rows_each,
            positions=positions.repeat(num_seqs),
            slot_mapping=(slots + positions % size).flatten(),
            block_tables=tables,
            bases=(torch.arange(pages, **int32) * size).repeat(num_seqs, 1),
            num_blocks=torch.full((num_seqs,), pages, **int32),
            profiles=torch.zeros(num_seqs, **int32),
        )

    def time(self, narrow: Tile | None = None, wide: Tile | None = None) -> float:
        """Milliseconds of rotating, storing and attending. Tiles: None: the backend's own."""
        backend = TritonBackend(
            self.config,
            self.profiles,
            self.cache,
            wide=wide,
            num_processors=self.stand.num_processors,
        )
        backend.put_profile(0, UNSCALED, self.config.max_position)
        backend.narrow = narrow or backend.narrow
        attention = backend.bind(self.metadata)

        def work() -> None:
            attention(0, self.qkv)

        work()  # a graph is recorded of what has run before
        return self.stand.milliseconds(self.stand.make_recorder()(work))


def decode_attention(stand: Stand, copy: float, case: Shape, tile: Tile | None) -> dict[str, Any]:
    """Decode attention's bytes of keys and values a second, beside a copy's."""
    num_seqs, context = case
    time_ms = PagedCase(stand, num_seqs, context, 1).time(narrow=tile)
    size = 2 * stand.config.hidden_size * stand.dtype.itemsize
    rate = num_seqs * context * size / time_ms / 1e6
    return {"ms": round(time_ms, 4), "gb_s": round(rate), "of_copy": round(rate / copy, 3)}


def prefill_attention(stand: Stand, tile: Tile | None) -> dict[str, Any]:
    """Whole prompts, beside PyTorch's flash attention on contiguous tensors."""
    num_seqs, context = stand.prefill
    ours = PagedCase(stand, num_seqs, context, context).time(wide=tile)
    shape = (3, num_seqs, stand.config.num_heads, context, stand.config.head_dim)
    query, key, value = torch.randn(shape, device=stand.device).to(stand.dtype)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    theirs = stand.milliseconds(flash)
    return {"ms": round(ours, 4), "flash_ms": round(theirs, 4), "of_flash": round(theirs / ours, 3)}


def one_product(stand: Stand, shape: Shape, num_rows: int) -> dict[str, Any]:
    """A product by every tile, beside PyTorch's; ms."""
    inputs, outputs = shape
    linear = nn.Linear(inputs, outputs, device=stand.device, dtype=stand.dtype)
    linear.requires_grad_(False)
    rows = torch.randn(num_rows, inputs, device=stand.device).to(stand.dtype)
    served = TritonProduct(linear, None)
    figures = {"torch": stand.milliseconds(lambda: linear(rows))}
    for tile in (narrow_tile(outputs), *PRODUCT_TILES):
        name = f"{tile.rows}x{tile.out}, {tile.num_warps} warps"
        figures[name] = stand.milliseconds(partial(served.compute, rows, tile))
    return {name: round(value, 4) for name, value in figures.items()}


class Served:
    """The engine with random weights, ready to generate."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        times = [time.perf_counter()]
        model = random_model(stand.config, stand.dtype, stand.device, stand.std)
        self.num_parameters = sum(each.numel() for each in model.parameters())
        times.append(time.perf_counter())
        interpreted = stand.device == "cpu"
        use_triton(model, wide=() if interpreted else PRODUCT_TILES)
        wide = None
        if not interpreted:
            pages = KVCache.allocate(stand.config, 1, stand.block_size, stand.dtype, stand.device)
            wide = find_wide_tile(stand.config, pages)
        times.append(time.perf_counter())
        self.pages = -(-(max(stand.prompts) + stand.output) // stand.block_size)
        self.engine = BareEngine(
            model,
            scheduler=SchedulerConfig(
                max_num_seqs=max(stand.batches), max_num_batched_tokens=stand.budget
            ),
            num_blocks=max(stand.batches) * self.pages,
            block_size=stand.block_size,
            recorder=stand.make_recorder(),
            wide=wide,
            num_processors=stand.num_processors,
        )
        self.engine.runner.warm_up(stand.warm_up_rows)
        times.append(time.perf_counter())
        self.engine.generate(self.prompts(1, 2), 2)
        times.append(time.perf_counter())
        names = ("weights_made_s", "tiles_tried_s", "warm_up_s", "first_request_s")
        spans = np.diff(times)
        self.ready = {
            **{name: round(float(span), 2) for name, span in zip(names, spans, strict=True)},
            "ready_s": round(float(spans[1:].sum()), 2),
            "wide_tile": str(wide),
            "graphs": self.engine.runner.name,
        }

    def prompts(self, num_seqs: int, length: int) -> list[list[int]]:
        """Random tokens, always the same."""
        generator = torch.Generator().manual_seed(0)
        shape = (num_seqs, length)
        prompts = torch.randint(0, self.stand.config.vocab_size, shape, generator=generator)
        return [[int(token) for token in prompt] for prompt in prompts.tolist()]

    def device_step_ms(self, num_seqs: int, context: int, params: SamplingParams = GREEDY) -> float:
        """A decode step's graph alone, over rows that stand at `context` and the tokens behind."""
        state, rows = self.engine.state, list(range(num_seqs))
        at = state.put(rows, {"positions": np.full(num_seqs, context, np.int32)})
        tables = [list(range(row * self.pages, (row + 1) * self.pages)) for row in rows]
        state.put_tables(rows, tables)
        requests = [
            Request(str(row), prompt, params, seed=row, max_tokens=1, stop_token_ids=frozenset())
            for row, prompt in enumerate(self.prompts(num_seqs, context))
        ]
        wanted = SamplingTensors.of(requests, self.stand.config.vocab_size, at.device)
        with torch.inference_mode():
            state.sampling.take_over(at, wanted, torch.arange(num_seqs, device=at.device), 0 * at)
            time_ms = self.stand.milliseconds(lambda: self.engine.graphs.launch(num_seqs))
        state.put(rows, {"num_blocks": np.zeros(num_seqs, np.int32)})
        return time_ms

    def sampling_us(self, num_seqs: int) -> dict[str, Any]:
        """A decode step's graph alone by what all of its rows ask of the sampler."""
        return {
            name: round(1000 * self.device_step_ms(num_seqs, self.stand.prompts[0], params), 1)
            for name, params in SAMPLED.items()
        }

    def tokens_per_s(self, copy: float, num_seqs: int, prompt: int) -> dict[str, Any]:
        """Generation; its decode steps beside the graph alone (the rest is the host's) and beside
        reading weights and cache once a step."""
        stand, prompts = self.stand, self.prompts(num_seqs, prompt)
        self.engine.generate(prompts, 3)  # records the graph
        runs = [self.engine.generate(prompts, stand.output) for _ in range(stand.repeats)]
        whole = [num_seqs * stand.output / run.whole_s for run in runs]
        step_s = statistics.median(each for run in runs for each in run.steps_s)
        context = prompt + stand.output // 2
        device_s = self.device_step_ms(num_seqs, context) / 1000
        config, itemsize = stand.config, stand.dtype.itemsize
        cached = num_seqs * context * 2 * config.num_layers * config.hidden_size
        least = itemsize * (self.num_parameters + cached) / (copy * 1e9)
        return {
            "tokens_per_s": round(statistics.median(whole)),
            "least": round(min(whole)),
            "most": round(max(whole)),
            "decode_tokens_per_s": round(num_seqs / step_s),
            "first_tokens_ms": round(1000 * min(run.first_s for run in runs), 2),
            "decode_step_us": round(1e6 * step_s, 1),
            "device_step_us": round(1e6 * device_s, 1),
            "host_adds": round(step_s / device_s - 1, 3),
            "roofline_step_us": round(1e6 * least, 1),
            "of_roofline": round(least / step_s, 3),
        }


def measure_kernels(report: Report, stand: Stand, copy: float) -> None:
    """Attention and products, by every tile."""
    for case in stand.decode:
        work = partial(decode_attention, stand, copy, case, None)
        report.measure(f"decode attention, {case[0]} x {case[1]}", work)
    middle = stand.decode[len(stand.decode) // 2]
    for tile in stand.tiles:
        work = partial(decode_attention, stand, copy, middle, tile)
        report.measure(f"decode attention, {middle[0]} x {middle[1]}, {tile}", work)
    for wide in (None, *WIDE_TILES):
        name = f"prefill attention, {stand.prefill[0]} x {stand.prefill[1]}, {wide or 'narrow'}"
        report.measure(name, partial(prefill_attention, stand, wide))
    for shape in stand.products:
        for num_rows in stand.product_rows:
            name = f"product {shape[0]} to {shape[1]}, {num_rows} rows, ms"
            report.measure(name, partial(one_product, stand, shape, num_rows))


def measure_engine(report: Report, stand: Stand, copy: float) -> Served | None:
    """Time to ready, then generation; None where it is not ready."""
    made: list[Served] = []

    def ready() -> dict[str, Any]:
        made.append(Served(stand))
        return made[0].ready

    report.measure("engine, time to ready", ready)
    if not made:
        return None
    for prompt in stand.prompts:
        for num_seqs in stand.batches:
            work = partial(made[0].tokens_per_s, copy, num_seqs, prompt)
            report.measure(f"engine, {num_seqs} x ({prompt} + {stand.output})", work)
    for num_seqs in stand.batches:
        work = partial(made[0].sampling_us, num_seqs)
        report.measure(f"engine, a step of {num_seqs} by its sampling, us", work)
    report.measure("engine, graphs in the end", lambda: {"graphs": made[0].engine.runner.name})
    return made[0]


def measure_peers(report: Report, stand: Stand, served: Served) -> None:
    """Hugging Face on the same prompts, where it is installed."""
    if not stand.peers or find_spec("transformers") is None:
        reason = "transformers is not installed" if stand.peers else "not at toy size"
        report.measure("Hugging Face", lambda: {"absent": reason})
        return
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        model = random_model(stand.config, stand.dtype, stand.device, stand.std)
        loaded.append(hugging_face(model))
        return {"parameters": sum(each.numel() for each in loaded[0].parameters())}

    report.measure("Hugging Face, the same weights", load)
    length, output = stand.prompts[0], stand.output
    for num_seqs in stand.batches if loaded else ():
        prompts = torch.tensor(served.prompts(num_seqs, length), device=stand.device)
        of = f"{num_seqs} x ({length} + {output})"
        work = partial(theirs_generate, loaded[0], prompts, output)
        report.measure(f"Hugging Face generate, {of}", work)
        work = partial(theirs_continuous, loaded[0], prompts, output)
        report.measure(f"Hugging Face continuous, {of}", work)


def measure_all(report: Report, stand: Stand) -> None:
    """Everything; what fails is said and passed over."""
    copies: list[float] = []

    def device_copy() -> dict[str, Any]:
        copies.append(copy_gb_s(stand))
        return {"gb_s": round(copies[0], 1)}

    report.measure("device copy", device_copy)
    copy = copies[0] if copies else float("nan")
    measure_kernels(report, stand, copy)
    served = measure_engine(report, stand, copy)
    if served is not None:
        measure_peers(report, stand, served)
