"""The whole engine on the device: its tokens against a full recompute, and against itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.config import SchedulerConfig
from engine.execution.cuda_graphs import Recorder
from engine.messages import ScheduledRequest
from engine.model.attention.reference import NaiveAttention
from engine.model.attention.triton import find_wide_tile
from engine.model.cuda_layers import WIDE_TILES as PRODUCT_TILES
from engine.model.cuda_layers import use_triton
from engine.model.gpt2 import GPT2
from engine.model.rope import RotaryTable
from engine.params import SamplingParams
from engine.request import Request
from loadtest.gpu.engine import GREEDY, BareEngine, random_model
from loadtest.gpu.report import Report
from loadtest.gpu.scale import Scale, same, small_config

MakeRecorder = Callable[[], Recorder]
Wanted = tuple[list[int], int, SamplingParams]
"""A prompt, how many tokens, and how."""


def make_engine(
    model: GPT2, scale: Scale, recorder: Recorder | None, *, num_blocks: int, budget: int
) -> BareEngine:
    """For three sequences. budget: tokens of a step; recorder: None: without graphs."""
    return BareEngine(
        model,
        scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=budget),
        num_blocks=num_blocks,
        block_size=scale.block_sizes[0],
        recorder=recorder,
        num_processors=0 if scale.device == "cpu" else None,
    )


def placed(scale: Scale, dtype: torch.dtype) -> GPT2:
    """The small network, served by Triton."""
    model = random_model(small_config(scale), dtype, scale.device)
    use_triton(model, wide=() if scale.device == "cpu" else PRODUCT_TILES)
    return model


def random_prompts(scale: Scale, count: int) -> list[list[int]]:
    """Always the same."""
    generator, shape = torch.Generator().manual_seed(1), (count, scale.prompt)
    prompts: list[list[int]] = torch.randint(0, scale.vocab, shape, generator=generator).tolist()
    return prompts


def agrees_with_a_recompute(scale: Scale, make_recorder: MakeRecorder) -> str:
    """Greedy tokens, graphs and all, against a full recompute in float32 with attention in float64;
    together, alone and in chunks."""
    config = small_config(scale)
    naive = NaiveAttention(
        RotaryTable.for_model(config).to(scale.device), config.num_heads, torch.float64
    )
    model = random_model(config, torch.float32, scale.device)
    prompts, expected = random_prompts(scale, 2), []
    with torch.inference_mode():
        for prompt in prompts:
            known = list(prompt)
            for _ in range(scale.output):
                hidden = model(torch.tensor(known, device=scale.device), naive)
                logits = model.logits(hidden[-1])[: config.vocab_size]
                known.append(int(logits.argmax()))
            expected.append(known[scale.prompt :])
    served = placed(scale, torch.float32)
    for budget in scale.budgets:
        engine = make_engine(served, scale, make_recorder(), num_blocks=24, budget=budget)
        together = engine.generate(prompts, scale.output)
        assert together.tokens == expected, f"together, {budget} tokens a step: they differ"
    alone = engine.generate(prompts[1:], scale.output)
    assert alone.tokens == expected[1:], "alone: tokens differ from the full recompute"
    return f"{sum(map(len, expected))} tokens as in the full recompute"


def some_requests(scale: Scale) -> list[Wanted]:
    """Greedy, drawn, filtered; with penalties, with biases; told of their log-probabilities."""
    kinds = (
        GREEDY,
        SamplingParams(temperature=0.8, seed=1),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, seed=2**63 + 5),
        SamplingParams(temperature=1.0, frequency_penalty=0.3, seed=3),
        SamplingParams(
            temperature=0.0, repetition_penalty=1.3, logit_bias={3: 2.0, 5: -9.0}, logprobs=2
        ),
    )
    prompts = random_prompts(scale, len(kinds))
    return [
        (prompt, scale.output + at, params)
        for at, (prompt, params) in enumerate(zip(prompts, kinds, strict=True))
    ]


def lives(engine: BareEngine, requests: Sequence[Wanted]) -> dict[str, list[int]]:
    """Tokens of requests that come one after the other; the first is aborted once it has two."""
    tokens: dict[str, list[int]] = {}
    waiting = list(requests)
    while waiting or engine.scheduler.has_unfinished:
        if waiting:
            tokens[engine.add(*waiting.pop(0))] = []
        for output in engine.step()[1]:
            assert output.token_id is not None
            tokens[output.request_id].append(output.token_id)
        if len(tokens["1"]) == 2:
            engine.scheduler.abort("1")
    stats = engine.scheduler.stats
    assert stats.blocks_free == stats.blocks_total, "pages are not given back"
    return tokens


def graphs_change_nothing(scale: Scale, make_recorder: MakeRecorder) -> str:
    """One step ahead by graphs and sampled on the device, or each step waited for and sampled on
    the host, with arrivals, an abort and, in a small pool, preemption: the same tokens."""
    model, requests = placed(scale, torch.bfloat16), some_requests(scale)
    expected = lives(make_engine(model, scale, None, num_blocks=64, budget=512), requests)
    tight = 1 + 2 * -(-scale.prompt // scale.block_sizes[0])  # two prompts and one page
    engine = make_engine(model, scale, make_recorder(), num_blocks=tight, budget=512)
    assert lives(engine, requests) == expected, "tokens differ"
    preemptions = engine.scheduler.stats.preemptions
    assert preemptions > 0, "the pool was too large for this check"
    return f"{sum(map(len, expected.values()))} tokens, {preemptions} preemptions"


def nothing_waits(scale: Scale, make_recorder: MakeRecorder) -> str:
    """From its prompt to its end a request has the host wait for its tokens and for nothing else:
    a copy for which PyTorch itself waits is an error."""
    on_cpu = scale.device == "cpu"
    requests = some_requests(scale)[-1 if on_cpu else 0 :]
    engine = make_engine(
        placed(scale, torch.bfloat16), scale, make_recorder(), num_blocks=64, budget=512
    )

    def generate() -> int:
        done = [engine.generate([prompt], count, params) for prompt, count, params in requests]
        return sum(len(tokens) for each in done for tokens in each.tokens)

    generate()  # kernels are compiled, graphs recorded, tables of turns made
    if on_cpu:
        return "not tried: without a GPU there is nothing to wait for"
    torch.cuda.set_sync_debug_mode("error")
    try:
        return f"{generate()} tokens"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def logits_are_exact(scale: Scale) -> str:
    """The whole network in bfloat16: logits of a prompt in one step and token by token."""
    model = placed(scale, torch.bfloat16)
    prompts, length = random_prompts(scale, 2), scale.prompt

    def logits(cuts: Sequence[int], seqs: Sequence[int]) -> Tensor:
        """The last ones of these sequences, in chunks that end at the cuts."""
        engine = make_engine(model, scale, None, num_blocks=64, budget=512)
        if scale.device != "cpu":
            wide = find_wide_tile(model.config, engine.backend.cache)
            engine.backend.wide = wide or engine.backend.narrow
        pages = -(-length // engine.block_size)
        engine.backend.put_profile(0, model.config.rope, pages * engine.block_size)
        requests = []
        for seq in seqs:
            request = Request(
                str(seq), prompts[seq], GREEDY, seed=0, max_tokens=1, stop_token_ids=frozenset()
            )
            request.block_table = list(range(seq * pages, (seq + 1) * pages))
            request.bases = [at * engine.block_size for at in range(pages)]
            requests.append(request)
        start = 0
        for end in cuts:
            items = [ScheduledRequest(each, start, start, end - start, True) for each in requests]
            hidden, last = engine.eager.forward(items)
            start = end
        return model.logits(hidden[last]).cpu()

    with torch.inference_mode():
        half = length // 2
        same(logits(range(half, length + 1), [0]), logits([length], [0, 1])[:1], "logits")
    return f"{length - half} tokens alone after a chunk of {half}: the bits of one step of two"


def check_tokens(report: Report, scale: Scale, make_recorder: MakeRecorder) -> None:
    """Everything, one after the other."""
    report.check("engine's tokens", partial(agrees_with_a_recompute, scale, make_recorder))
    report.check("engine by graphs", partial(graphs_change_nothing, scale, make_recorder))
    report.check("host waits for tokens only", partial(nothing_waits, scale, make_recorder))
    report.check("network's bits", partial(logits_are_exact, scale))
