"""Figures of a GPU: kernels beside a copy and PyTorch's own, whole steps beside the roofline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config import ModelConfig
from engine.execution.cuda_graphs import CudaRecorder
from engine.model.attention.base import AttentionMetadata, KVCache
from engine.model.attention.triton import WIDE_TILES, Tile, TritonBackend, find_wide_tile
from engine.model.cuda_layers import WIDE_TILES as PRODUCT_TILES
from engine.model.cuda_layers import TritonProduct, narrow_tile, use_triton
from engine.model.gpt2 import GPT2
from engine.model.profiles import ProfileTables
from engine.scaling import UNSCALED
from loadtest.gpu_offline import OfflineLoop, random_model
from loadtest.gpu_report import Report

BF16 = torch.bfloat16
CUDA = "cuda"


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


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
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


def copy_gb_s() -> float:
    """Bytes read and written by a copy on the device, GB/s."""
    source = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


class PagedCase:
    """A step of attention over full contexts, of one layer of the 124 M model."""

    def __init__(self, num_seqs: int, context: int, rows_each: int, block_size: int = 64) -> None:
        """rows_each: 1 decodes, context computes the whole prompt."""
        self.config = replace(gpt2_124m(), num_layers=1)
        pages = -(-context // block_size)
        self.cache = KVCache.allocate(self.config, num_seqs * pages, block_size, BF16, CUDA)
        for each in (*self.cache.keys, *self.cache.values):
            each.normal_()
        self.profiles = ProfileTables(self.config, block_size, device=CUDA)
        self.qkv = torch.randn(num_seqs * rows_each, 3 * 768, device=CUDA, dtype=BF16)
        int32: dict[str, Any] = {"dtype": torch.int32, "device": CUDA}
        positions = torch.arange(context - rows_each, context, **int32)
        tables = torch.randperm(num_seqs * pages, device=CUDA).to(torch.int32).view(num_seqs, -1)
        slots = tables[:, (positions // block_size).long()].long() * block_size
        self.metadata = AttentionMetadata(
            query_start=torch.arange(num_seqs + 1, **int32) * rows_each,
            positions=positions.repeat(num_seqs),
            slot_mapping=(slots + positions % block_size).flatten(),
            block_tables=tables,
            bases=(torch.arange(pages, **int32) * block_size).repeat(num_seqs, 1),
            num_blocks=torch.full((num_seqs,), pages, **int32),
            profiles=torch.zeros(num_seqs, **int32),
        )

    def time(self, narrow: Tile | None = None, wide: Tile | None = None) -> float:
        """Milliseconds of rotating, storing and attending. Tiles: None: the backend's own."""
        backend = TritonBackend(self.config, self.profiles, self.cache, wide=wide)
        backend.put_profile(0, UNSCALED, self.config.max_position)
        backend.narrow = narrow or backend.narrow
        attention = backend.bind(self.metadata)
        graph = torch.cuda.CUDAGraph()
        attention(0, self.qkv)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            attention(0, self.qkv)
        return milliseconds(graph.replay)


def decode_attention(copy: float, num_seqs: int, context: int, tile: Tile | None) -> dict[str, Any]:
    """Decode attention's bytes of keys and values a second, beside a copy's."""
    case = PagedCase(num_seqs, context, 1)
    time_ms = case.time(narrow=tile)
    rate = 2 * num_seqs * context * 768 * 2 / time_ms / 1e6
    return {"ms": round(time_ms, 4), "gb_s": round(rate), "of_copy": round(rate / copy, 3)}


def prefill_attention(num_seqs: int, context: int, tile: Tile | None) -> dict[str, Any]:
    """Whole prompts, beside PyTorch's flash attention on contiguous tensors."""
    case = PagedCase(num_seqs, context, context)
    ours = case.time(wide=tile)
    query, key, value = torch.randn(3, num_seqs, 12, context, 64, device=CUDA, dtype=BF16)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    theirs = milliseconds(flash)
    return {"ms": round(ours, 4), "flash_ms": round(theirs, 4), "of_flash": round(theirs / ours, 3)}


def one_product(inputs: int, outputs: int, num_rows: int) -> dict[str, Any]:
    """A product by every tile, beside cuBLAS; ms."""
    linear = nn.Linear(inputs, outputs, device=CUDA, dtype=BF16).requires_grad_(False)
    rows = torch.randn(num_rows, inputs, device=CUDA, dtype=BF16)
    served = TritonProduct(linear, None)
    figures = {"cublas": milliseconds(lambda: linear(rows))}
    for tile in (narrow_tile(outputs), *PRODUCT_TILES):
        name = f"{tile.rows}x{tile.out}, {tile.num_warps} warps"
        figures[name] = milliseconds(partial(served.compute, rows, tile))
    return {name: round(value, 4) for name, value in figures.items()}


class Served:
    """The 124 M model with random weights, ready to generate."""

    def __init__(self) -> None:
        begun = time.perf_counter()
        self.model = random_model(gpt2_124m(), BF16, CUDA, std=0.02)
        self.num_parameters = sum(each.numel() for each in self.model.parameters())
        loaded = time.perf_counter()
        use_triton(self.model)
        pages = KVCache.allocate(self.model.config, 1, 64, BF16, CUDA)
        self.wide = find_wide_tile(self.model.config, pages)
        self.loop(1, 64).generate(self.prompts(1, 8), 2, chunk_rows=8)
        torch.cuda.synchronize()
        self.ready = {
            "weights_made_s": round(loaded - begun, 2),
            "kernels_and_first_graph_s": round(time.perf_counter() - loaded, 2),
            "wide_tile": str(self.wide),
        }

    def loop(self, num_seqs: int, max_tokens: int) -> OfflineLoop:
        """A loop with a cache for so many sequences."""
        return OfflineLoop(
            self.model,
            max_seqs=num_seqs,
            max_tokens=max_tokens,
            recorder=CudaRecorder(),
            wide=self.wide,
        )

    def prompts(self, num_seqs: int, length: int) -> Tensor:
        """Random tokens int64 [num_seqs, length], always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 50257, (num_seqs, length), generator=generator).to(CUDA)

    def tokens_per_s(
        self, copy: float, num_seqs: int, prompt: int, output: int, repeats: int
    ) -> dict[str, Any]:
        """Generation, and its decode steps beside reading weights and cache once a step."""
        loop, prompts = self.loop(num_seqs, prompt + output), self.prompts(num_seqs, prompt)
        loop.generate(prompts, 4, chunk_rows=prompt)
        runs = [loop.generate(prompts, output, chunk_rows=prompt) for _ in range(repeats)]
        whole = [num_seqs * output / (run.first_s + run.rest_s) for run in runs]
        best = min(runs, key=lambda run: run.rest_s)
        steps = output - 1
        cached = num_seqs * (prompt + output / 2) * 2 * 12 * 768 * 2
        least = (2 * self.num_parameters + cached) / (copy * 1e9)
        return {
            "tokens_per_s": round(statistics.median(whole)),
            "least": round(min(whole)),
            "most": round(max(whole)),
            "first_tokens_ms": round(1000 * min(run.first_s for run in runs), 2),
            "decode_step_us": round(1e6 * best.rest_s / steps, 1),
            "host_launch_us": round(1e6 * best.host_s / steps, 1),
            "roofline_step_us": round(1e6 * least, 1),
            "of_roofline": round(least / (best.rest_s / steps), 3),
        }


def hugging_face(model: GPT2) -> Any:
    """The same weights as a Hugging Face GPT-NeoX. model: as loaded, before use_triton."""
    transformers = import_module("transformers")
    config, heads = model.config, model.config.num_heads
    theirs = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position,
            rotary_pct=config.rotary_dim / config.head_dim,
            rotary_emb_base=config.rope_base,
            use_parallel_residual=config.parallel_residual,
            hidden_act="gelu",
            layer_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )

    def interleaved(tensor: Tensor) -> Tensor:
        """(q, k, v) x heads -> heads x (q, k, v)"""
        parts = tensor.view(3, heads, config.head_dim, *tensor.shape[1:])
        return parts.transpose(0, 1).flatten(0, 2)

    head = "lm_head.weight" if "lm_head.weight" in theirs.state_dict() else "embed_out.weight"
    tensors = {"gpt_neox.embed_in.weight": model.embedding.weight, head: model.head.weight}
    pairs: list[tuple[str, Any]] = [("gpt_neox.final_layer_norm", model.norm)]
    block: Any
    for at, block in enumerate(model.blocks):
        to = f"gpt_neox.layers.{at}"
        pairs += [
            (f"{to}.input_layernorm", block.norm1),
            (f"{to}.post_attention_layernorm", block.norm2),
            (f"{to}.attention.query_key_value", block.qkv),
            (f"{to}.attention.dense", block.out),
            (f"{to}.mlp.dense_h_to_4h", block.mlp.up),
            (f"{to}.mlp.dense_4h_to_h", block.mlp.down),
        ]
    for to, module in pairs:
        for name, tensor in module.named_parameters():
            fused = to.endswith("query_key_value")
            tensors[f"{to}.{name}"] = interleaved(tensor) if fused else tensor
    theirs.load_state_dict({name: each.detach().clone() for name, each in tensors.items()})
    weight = model.embedding.weight
    return theirs.to(weight.device, weight.dtype).eval()


def theirs_generate(theirs: Any, prompts: Tensor, output: int) -> dict[str, Any]:
    """Hugging Face generate, static cache, compiled; tokens a second, best of three."""
    settings = {
        "max_new_tokens": output,
        "min_new_tokens": output,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": 0,
    }
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return {"tokens_per_s": round(len(prompts) * output / min(times[1:]))}


def theirs_continuous(theirs: Any, prompts: Tensor, output: int) -> dict[str, Any]:
    """Hugging Face's continuous batching; tokens a second, best of two."""
    transformers = import_module("transformers")
    settings = transformers.GenerationConfig(
        max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        results = theirs.generate_batch(inputs=prompts.tolist(), generation_config=settings)
        times.append(time.perf_counter() - begun)
    count = sum(len(each.generated_tokens) for each in results.values())
    return {"tokens_per_s": round(count / min(times[1:])), "tokens": count}


def measure_all(report: Report, repeats: int, batches: Sequence[int]) -> None:
    """Everything; what fails is said and passed over."""
    copies: list[float] = []

    def device_copy() -> dict[str, Any]:
        copies.append(copy_gb_s())
        return {"gb_s": round(copies[0])}

    report.measure("device copy", device_copy)
    copy = copies[0] if copies else float("nan")
    for num_seqs, context in ((1, 1024), (8, 1024), (64, 1024), (256, 256), (256, 1024)):
        work = partial(decode_attention, copy, num_seqs, context, None)
        report.measure(f"decode attention, {num_seqs} x {context}", work)
    for warps in (1, 2, 4):
        for stages in (1, 2, 3):
            tile = Tile(16, warps, stages)
            work = partial(decode_attention, copy, 64, 1024, tile)
            report.measure(f"decode attention, 64 x 1024, {tile}", work)
    for wide in (None, *WIDE_TILES):
        work = partial(prefill_attention, 8, 1024, wide)
        report.measure(f"prefill attention, 8 x 1024, {wide or 'narrow'}", work)
    for shape in ((768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50304)):
        for num_rows in (1, 8, 64, 256, 2048):
            name = f"product {shape[0]} to {shape[1]}, {num_rows} rows, ms"
            report.measure(name, partial(one_product, *shape, num_rows))

    made: list[Served] = []

    def ready() -> dict[str, Any]:
        made.append(Served())
        return made[0].ready

    report.measure("time to ready", ready)
    for prompt in (128, 1024):
        for num_seqs in batches:
            if made:
                work = partial(made[0].tokens_per_s, copy, num_seqs, prompt, 128, repeats)
                report.measure(f"engine, {num_seqs} x ({prompt} + 128)", work)
    if find_spec("transformers") is None:
        report.measure("Hugging Face", lambda: {"absent": "transformers is not installed"})
        return
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        loaded.append(hugging_face(random_model(gpt2_124m(), BF16, CUDA, std=0.02)))
        return {"parameters": sum(each.numel() for each in loaded[0].parameters())}

    report.measure("Hugging Face, the same weights", load)
    for num_seqs in batches:
        if loaded and made:
            prompts = made[0].prompts(num_seqs, 128)
            work = partial(theirs_generate, loaded[0], prompts, 128)
            report.measure(f"Hugging Face generate, {num_seqs} x (128 + 128)", work)
            work = partial(theirs_continuous, loaded[0], prompts, 128)
            report.measure(f"Hugging Face continuous, {num_seqs} x (128 + 128)", work)
