"""Every kernel against float64 and against itself, over shapes and types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation, ModelConfig
from engine.execution.device_sampler import WIDTH, DeviceSampler, read_logprobs
from engine.execution.sampler import Sampler
from engine.execution.sampling_tensors import SamplingTensors
from engine.model.attention.base import AttentionBackend, AttentionMetadata, KVCache
from engine.model.attention.reference import ReferenceBackend
from engine.model.attention.triton import WIDE_TILES, TritonBackend
from engine.model.cuda_layers import WIDE_TILES as PRODUCT_TILES
from engine.model.cuda_layers import TritonNorm, TritonProduct
from engine.model.profiles import ProfileTables
from engine.params import MAX_BIASES, MAX_LOGPROBS, SamplingParams
from engine.request import Request
from engine.scaling import UNSCALED, RopeScaling
from loadtest.gpu.report import Report
from loadtest.gpu.scale import Scale, close, same

Chunk = tuple[int, int, int]
"""A sequence, and its positions first .. end - 1."""


class Case:
    """Random sequences over pages in random places, and steps that compute parts of them."""

    def __init__(
        self,
        scale: Scale,
        head_dim: int,
        rotary_dim: int,
        block_size: int,
        dtype: torch.dtype,
        scalings: Sequence[RopeScaling] = (UNSCALED,),
    ) -> None:
        width = scale.num_heads * head_dim
        self.config = ModelConfig(
            vocab_size=8,
            padded_vocab_size=8,
            num_layers=1,
            num_heads=scale.num_heads,
            hidden_size=width,
            intermediate_size=8,
            max_position=512,
            rotary_dim=rotary_dim,
        )
        self.device, self.size, self.scalings = scale.device, block_size, scalings
        generator = torch.Generator().manual_seed(0)
        self.qkv = [torch.randn(n, 3 * width, generator=generator).to(dtype) for n in scale.lengths]
        counts = [-(-n // block_size) for n in scale.lengths]
        self.num_blocks = sum(counts) + 1
        self.tables = torch.randperm(sum(counts), generator=generator).split(counts)  # type: ignore[no-untyped-call]  # torch has no types here

    @overload
    def backend(self, make: type[ReferenceBackend]) -> ReferenceBackend: ...

    @overload
    def backend(self, make: partial[TritonBackend]) -> TritonBackend: ...

    def backend(self, make: type[ReferenceBackend] | partial[TritonBackend]) -> AttentionBackend:
        """Over zeroed pages; the reference's are on the CPU."""
        device = "cpu" if make is ReferenceBackend else self.device
        cache = KVCache.allocate(
            self.config,
            self.num_blocks,
            self.size,
            self.qkv[0].dtype,
            device,
            dimensions_last=True,
        )
        rows = ProfileTables(self.config, self.size, num_rows=len(self.scalings), device=device)
        backend = make(self.config, rows, cache)
        for row, scaling in enumerate(self.scalings):
            backend.put_profile(row, scaling, self.config.max_position)
        return backend

    def whole(self) -> list[Chunk]:
        """All rows in one step."""
        return [(seq, 0, len(rows)) for seq, rows in enumerate(self.qkv)]

    def run(
        self,
        backend: AttentionBackend,
        steps: Sequence[Sequence[Chunk]],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Outputs of all rows in order, on the CPU, however they were cut. dtype: None: that of
        the rows."""
        width = self.config.hidden_size
        out = [torch.empty_like(rows[:, :width], dtype=dtype) for rows in self.qkv]
        for chunks in steps:
            rows = torch.cat([self.qkv[seq][first:end] for seq, first, end in chunks])
            device = backend.cache.keys[0].device
            done = backend.forward(0, rows.to(device), self.metadata(chunks, device)).cpu()
            sizes = [end - first for _, first, end in chunks]
            for (seq, first, end), part in zip(chunks, torch.split(done, sizes), strict=True):
                out[seq][first:end] = part
        return torch.cat(out)

    def metadata(self, chunks: Sequence[Chunk], device: torch.device) -> AttentionMetadata:
        """Where the rows of a step stand; sequences take the profiles in turn."""
        size = self.size
        counts = [-(-end // size) for _, _, end in chunks]
        tables = torch.zeros(len(chunks), max(counts), dtype=torch.int32)
        bases = torch.zeros_like(tables)
        starts: list[int] = [0]
        positions: list[int] = []
        slots: list[int] = []
        for row, ((seq, first, end), count) in enumerate(zip(chunks, counts, strict=True)):
            tables[row, :count] = self.tables[seq][:count]
            bases[row, :count] = torch.arange(count) * size
            starts.append(starts[-1] + end - first)
            positions += range(first, end)
            slots += [int(self.tables[seq][p // size]) * size + p % size for p in range(first, end)]

        def int32(values: Sequence[int] | Tensor) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int32).to(device)

        return AttentionMetadata(
            query_start=int32(starts),
            positions=int32(positions),
            slot_mapping=torch.tensor(slots, dtype=torch.int64).to(device),
            block_tables=int32(tables),
            bases=int32(bases),
            num_blocks=int32(counts),
            profiles=int32([seq % len(self.scalings) for seq, _, _ in chunks]),
        )


JOINED = partial(TritonBackend, num_processors=0)
SPLIT = partial(TritonBackend, num_processors=10**6)


def attention_agrees(case: Case) -> str:
    """One program a tile and one a page, against float64; the pages to the bit."""
    reference = case.backend(ReferenceBackend)
    expected = case.run(reference, [case.whole()])
    words = []
    for make in (JOINED, SPLIT):
        backend = case.backend(make)
        words.append(close(case.run(backend, [case.whole()]), expected))
        same(backend.cache.keys[0].cpu(), reference.cache.keys[0], "pages of keys")
        same(backend.cache.values[0].cpu(), reference.cache.values[0], "pages of values")
    return words[0]


def unrounded(case: Case, make: partial[TritonBackend], steps: Sequence[Sequence[Chunk]]) -> Tensor:
    """Outputs in float32: rounding would hide most differences."""
    backend = case.backend(make)
    backend.out_dtype = torch.float32
    return case.run(backend, steps, torch.float32)


def attention_is_exact(case: Case) -> str:
    """Whole, chunked, token by token, alone and together, joined and split: the same bits."""
    whole = [case.whole()]
    expected = unrounded(case, JOINED, whole)
    same(unrounded(case, SPLIT, whole), expected, "split by pages")
    longest = max(range(len(case.qkv)), key=lambda seq: len(case.qkv[seq]))
    others = [chunk for chunk in case.whole() if chunk[0] != longest]
    length = len(case.qkv[longest])
    third = max(1, length // 3)
    plans = {
        "chunks": [
            [(longest, 0, third), *others],
            [(longest, third, third + 1)],
            [(longest, third + 1, length)],
        ],
        "a token at a time": [
            others,
            [(longest, 0, third)],
            *([(longest, at, at + 1)] for at in range(third, length)),
        ],
    }
    for name, plan in plans.items():
        same(unrounded(case, JOINED, plan), expected, name)
    return f"{len(expected)} rows, no bit differs"


def wide_tiles(scale: Scale, dtype: torch.dtype) -> str:
    """Not a matter of right or wrong: which tiles for prompts give the narrow one's bits, in
    float32."""
    case = Case(scale, 64 if scale.device != "cpu" else 32, 32, scale.block_sizes[-1], dtype)
    expected, found = unrounded(case, JOINED, [case.whole()]), []
    for tile in WIDE_TILES:
        wide = unrounded(case, partial(JOINED, wide=tile), [case.whole()])
        close(wide.to(dtype), expected.to(dtype))
        found.append(f"{tile.rows} rows by {tile.num_warps} warps: {torch.equal(wide, expected)}")
    return "; ".join(found)


def product_agrees(
    scale: Scale, shape: tuple[int, int], dtype: torch.dtype, activation: Activation | None
) -> str:
    """Against float64; and every number of rows gives the bits of all rows."""
    inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs))
    linear.bias.copy_(torch.randn(outputs, generator=generator))
    linear = linear.to(dtype)
    rows = torch.randn(max(scale.num_rows), inputs, generator=generator).to(dtype)
    expected = F.linear(rows.double(), linear.weight.double(), linear.bias.double())
    if activation == "gelu":
        expected = F.gelu(expected)
    placed = linear.to(scale.device)
    tried = () if scale.device == "cpu" else PRODUCT_TILES
    served = TritonProduct(placed, activation, TritonProduct(placed, None).find_wide(tried))
    rows = rows.to(scale.device)
    word = close(served(rows), expected)
    in_float32 = TritonProduct(placed, activation, served.wide, torch.float32)
    whole = in_float32(rows)
    for count in scale.num_rows:
        same(in_float32(rows[-count:]), whole[-count:], f"{count} rows")
    tile = served.wide
    return f"{word}; many rows: {tile.rows} x {tile.out} by {tile.num_warps} warps"


def norm_agrees(scale: Scale, dtype: torch.dtype) -> str:
    """LayerNorm and RMSNorm against float64, and one row against many."""
    words = []
    for kind in (nn.LayerNorm, nn.RMSNorm):
        norm = kind(100, 1e-5, dtype=dtype).requires_grad_(False)
        rows = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
        shape, weight = (100,), norm.weight.double()
        if isinstance(norm, nn.LayerNorm):
            expected = F.layer_norm(rows.double(), shape, weight, norm.bias.double(), norm.eps)
        else:
            expected = F.rms_norm(rows.double(), shape, weight, norm.eps)
        served, rows = TritonNorm(norm.to(scale.device)), rows.to(scale.device)
        whole = served(rows)
        words.append(close(whole, expected))
        same(served(rows[3:4]), whole[3:4], "one row")
    return "; ".join(words)


def sampler_draws(scale: Scale) -> str:
    """Frequencies over many seeds against the softmax; filters keep what they must."""
    logits = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -9.0])
    count, size = scale.draws, len(logits)
    rows = logits.repeat(count, 1).to(scale.device)
    params = SamplingTensors.greedy(count, scale.device)
    params.seed.copy_(torch.arange(count))
    params.temperature.fill_(1.0)

    def frequencies() -> Tensor:
        sampled = torch.zeros((count, WIDTH), dtype=torch.int32, device=scale.device)
        DeviceSampler(size, device=scale.device).sample(rows, params, sampled)
        return torch.bincount(sampled[:, 0].cpu(), minlength=size).double()

    expected = logits.double().softmax(0) * count
    square = float(((frequencies() - expected) ** 2 / expected).sum())
    # 11 degrees of freedom: 50 is exceeded once in 1.6 million times.
    assert square < 50, f"chi-squared is {square:.1f}"
    params.top_k.fill_(2)  # the second and the third are tied: three are kept
    assert frequencies()[3:].sum() == 0, "top_k 2 let a fourth token through"
    params.top_k.fill_(0)
    params.top_p.fill_(0.3)
    assert frequencies()[1:].sum() == 0, "top_p 0.3 let a second token through"
    params.temperature.fill_(0.0)
    assert frequencies()[0] == count, "temperature 0 is not greedy"
    return f"chi-squared {square:.1f} over {count} draws"


def some_changes(vocab_size: int) -> list[Request]:
    """Requests with every kind of change to the logits, and log-probabilities wanted."""
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 0.6, "presence_penalty": -0.3},
        {"logit_bias": {at: at / 50 for at in range(min(vocab_size, MAX_BIASES))}},
        {"frequency_penalty": 0.9, "repetition_penalty": 0.6, "logit_bias": {3: 5.5, 7: -100.0}},
        {},
    ]
    generator = torch.Generator().manual_seed(2)
    return [
        Request(
            str(at),
            torch.randint(0, vocab_size, (50,), generator=generator).tolist(),
            SamplingParams(temperature=0.0, logprobs=min(at * 7, MAX_LOGPROBS), **changes),
            seed=0,
            max_tokens=999,
            stop_token_ids=frozenset(),
            output_token_ids=torch.randint(0, vocab_size, (90,), generator=generator).tolist(),
        )
        for at, changes in enumerate(kinds)
    ]


def sampler_changes(scale: Scale) -> str:
    """Penalties, biases and log-probabilities beside the host's sampler; a row alone and among
    others, to the bit."""
    vocab = scale.sampled_vocab
    requests = some_changes(vocab)
    logits = 3 * torch.randn(len(requests), vocab + 7, generator=torch.Generator().manual_seed(3))
    device = torch.device(scale.device)

    def sampled(first: int, end: int) -> Tensor:
        params = SamplingTensors.of(requests[first:end], vocab, device)
        out = torch.zeros((end - first, WIDTH), dtype=torch.int32, device=device)
        DeviceSampler(vocab, [1], device).sample(logits[first:end].to(device), params, out)
        return out.cpu()

    whole = sampled(0, len(requests))
    expected = Sampler(vocab, [1]).sample(logits.clone(), requests)
    furthest = 0.0
    for row, (request, token) in enumerate(zip(requests, expected, strict=True)):
        assert whole[row, 0] == token.token_id, f"row {row}: another token than the host's"
        told = read_logprobs(whole[row].numpy(), request.params.logprobs or 0)
        assert token.logprobs is not None
        assert [each for each, _ in told.top] == [each for each, _ in token.logprobs.top]
        ours = [told.logprob, *(value for _, value in told.top)]
        theirs = [token.logprobs.logprob, *(value for _, value in token.logprobs.top)]
        furthest = max(furthest, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        same(sampled(row, row + 1), whole[row : row + 1], f"row {row} alone")
    assert furthest < 1e-5, f"log-probabilities are {furthest:.1e} off the host's"
    return f"the host's {len(requests)} tokens; log-probabilities within {furthest:.1e}"


def check_kernels(report: Report, scale: Scale) -> None:
    """Everything, one after the other."""
    for dtype, (head_dim, rotary_dim), size in product(
        scale.dtypes, scale.heads, scale.block_sizes
    ):
        # Compiling takes most of the time: every page size in the type that is served only.
        if dtype != torch.bfloat16 and size != scale.block_sizes[-1]:
            continue
        case = Case(scale, head_dim, rotary_dim, size, dtype)
        name = f"{dtype}, head {head_dim}, rotary {rotary_dim}, page {size}".replace("torch.", "")
        report.check(f"attention: {name}", partial(attention_agrees, case))
        report.check(f"attention's bits: {name}", partial(attention_is_exact, case))
    xpos = (UNSCALED, RopeScaling(type="xpos"), RopeScaling(type="yarn", factor=4.0))
    head_dim, rotary_dim = scale.heads[0]
    for dtype in scale.dtypes:
        case = Case(scale, head_dim, rotary_dim, scale.block_sizes[0], dtype, xpos)
        report.check(f"attention by profiles: {dtype}", partial(attention_agrees, case))
        report.check(f"wide tiles: {dtype}", partial(wide_tiles, scale, dtype))
        report.check(f"norms: {dtype}", partial(norm_agrees, scale, dtype))
        for shape in scale.products:
            activation: Activation | None = "gelu" if shape[1] > shape[0] else None
            work = partial(product_agrees, scale, shape, dtype, activation)
            report.check(f"product {shape[0]} to {shape[1]}: {dtype}", work)
    report.check("sampler", partial(sampler_draws, scale))
    report.check("sampler: penalties, biases, log-probabilities", partial(sampler_changes, scale))
