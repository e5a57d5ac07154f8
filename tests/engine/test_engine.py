"""The engine against a naive full recompute, and against itself under every way to cut the work."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import LLM, RequestOptions, SamplingParams
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SharedPrefix
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.messages import AddRequest, EngineOutput
from engine.model.attention.base import KVCache
from engine.model.attention.reference import NaiveAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from engine.scaling import RopeScaling
from tests.models import EOS, tiny_config, write_model

CONFIG = tiny_config()
PAGE = KVCache.bytes_per_block(CONFIG, 16, torch.float32)


def recompute(model: GPT2, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence again for every token, in float32."""
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    token_ids = list(prompt)
    for _ in range(max_tokens):
        logits = model.logits(model(torch.tensor(token_ids), attention)[-1])
        token_ids.append(int(logits[: model.config.vocab_size].argmax()))
        if token_ids[-1] == EOS:
            break
    return token_ids[len(prompt) :]


def ragged_prompts(count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts of 1 token to the whole context, each with a number of tokens that still fits."""
    rng = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, CONFIG.max_position]
    lengths += [rng.randrange(1, CONFIG.max_position) for _ in range(count - len(lengths))]
    return [
        (
            [rng.randrange(EOS) for _ in range(length)],
            min(24, CONFIG.max_position + 1 - length),
        )
        for length in lengths
    ]


def engine(directory: Path, *, pages: int, max_num_seqs: int, budget: int) -> EngineCore:
    return EngineCore(
        EngineConfig(
            model_dir=str(directory),
            device="cpu",
            dtype="float32",
            cache=CacheConfig(block_size=16, kv_memory=pages * PAGE),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        )
    )


def add(core: EngineCore, name: str, prompt: list[int], params: SamplingParams) -> None:
    assert params.max_tokens is not None
    core.add(
        AddRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=params,
            seed=params.seed or 0,
            max_tokens=params.max_tokens,
            stop_token_ids=[EOS],
        )
    )


def run(
    core: EngineCore, arrivals: dict[int, list[tuple[str, list[int], SamplingParams]]]
) -> dict[str, list[EngineOutput]]:
    """Step until done; `arrivals[n]` come before step n."""
    outputs: dict[str, list[EngineOutput]] = {}
    step = 0
    while core.has_unfinished or step <= max(arrivals):
        for name, prompt, params in arrivals.get(step, []):
            add(core, name, prompt, params)
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        step += 1
        assert step < 5000
    return outputs


@pytest.mark.parametrize(
    ("pages", "max_num_seqs", "budget"),
    [
        pytest.param(400, 64, 4096, id="all at once"),
        pytest.param(400, 8, 24, id="chunked prefill"),
        pytest.param(16, 16, 64, id="forced preemption"),
        pytest.param(12, 4, 7, id="one context of pages"),
    ],
)
def test_equals_naive_recompute(
    tiny_model_dir: Path, pages: int, max_num_seqs: int, budget: int
) -> None:
    model = load_model(tiny_model_dir, torch.float32)
    core = engine(tiny_model_dir, pages=pages, max_num_seqs=max_num_seqs, budget=budget)
    prompts = ragged_prompts(20)
    arrivals: dict[int, list[tuple[str, list[int], SamplingParams]]] = {}
    for at, (prompt, max_tokens) in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        arrivals.setdefault(3 * (at // 4), []).append((str(at), prompt, params))
    outputs = run(core, arrivals)
    for at, (prompt, max_tokens) in enumerate(prompts):
        got = outputs[str(at)]
        assert [output.token_id for output in got] == recompute(model, prompt, max_tokens)
        assert [output.index for output in got] == list(range(len(got)))
        assert [output.finish_reason for output in got[:-1]] == [None] * (len(got) - 1)
        assert got[-1].finish_reason is not None
    assert core.stats.blocks_free == core.stats.blocks_total
    if pages <= 16:
        assert core.stats.preemptions > 0 or pages == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_company(tiny_model_dir: Path, dtype: str) -> None:
    """Tokens and log-probabilities alone, among others, chunked, preempted: equal to the bit."""
    rng = random.Random(1)
    requests = [
        (
            str(at),
            [rng.randrange(EOS) for _ in range(rng.randrange(1, 120))],
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.3]),
                top_k=rng.choice([0, 5, 40]),
                top_p=rng.choice([1.0, 0.8]),
                min_p=rng.choice([0.0, 0.02]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                frequency_penalty=rng.choice([0.0, 0.3]),
                seed=rng.randrange(2**64),
                max_tokens=40,
                logprobs=5,
            ),
        )
        for at in range(16)
    ]

    def outcome(pages: int, max_num_seqs: int, budget: int) -> tuple[dict[str, object], int]:
        core = EngineCore(
            EngineConfig(
                model_dir=str(tiny_model_dir),
                device="cpu",
                dtype=dtype,
                cache=CacheConfig(block_size=16, kv_memory=pages * PAGE),
                scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
            )
        )
        outputs = run(core, {at: [request] for at, request in enumerate(requests)})
        tokens = {
            name: [(output.token_id, output.logprobs) for output in each]
            for name, each in outputs.items()
        }
        return dict(tokens), core.stats.preemptions

    alone, _ = outcome(400, 1, 512)
    together, _ = outcome(400, 16, 4096)
    chunked, _ = outcome(400, 5, 9)
    squeezed, preemptions = outcome(14 if dtype == "float32" else 7, 16, 64)
    assert together == alone
    assert chunked == alone
    assert squeezed == alone
    assert preemptions > 0


def test_resumes_from_given_output(tiny_model_dir: Path) -> None:
    """A request added again with what it had generated goes on as if nothing had happened."""
    params = SamplingParams(seed=7, max_tokens=20, frequency_penalty=0.5, logprobs=2)
    core = engine(tiny_model_dir, pages=64, max_num_seqs=4, budget=64)
    whole = run(core, {0: [("a", [1, 2, 3], params)]})["a"]
    head = [output.token_id for output in whole[:8]]
    core.add(
        AddRequest(
            request_id="b",
            prompt_token_ids=[1, 2, 3],
            params=params,
            seed=7,
            max_tokens=20,
            stop_token_ids=[EOS],
            output_token_ids=head,
        )
    )
    rest: list[EngineOutput] = []
    while core.has_unfinished:
        rest += core.step()
    assert [(o.index, o.token_id, o.logprobs, o.finish_reason) for o in rest] == [
        (o.index, o.token_id, o.logprobs, o.finish_reason) for o in whole[8:]
    ]


def test_abort_frees_pages_at_once(tiny_model_dir: Path) -> None:
    core = engine(tiny_model_dir, pages=64, max_num_seqs=4, budget=64)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    for name in "abcdef":
        add(core, name, [1] * 40, params)
    core.step()
    core.step()
    assert core.stats.running == 4
    assert core.stats.waiting == 2
    for name in "abcdef":
        core.abort(name)
        core.abort(name)
    assert core.stats.blocks_free == core.stats.blocks_total
    assert not core.has_unfinished
    add(core, "a", [1] * 40, params)  # rows are free again as well
    while core.has_unfinished:
        core.step()
    assert core.stats.blocks_free == core.stats.blocks_total


def test_padded_and_unused_ids_are_never_sampled(tiny_model_dir: Path) -> None:
    unused = tuple(range(10, 200))
    core = EngineCore(
        replace(
            EngineConfig(model_dir=str(tiny_model_dir), device="cpu", dtype="float32"),
            unused_token_ids=unused,
        )
    )
    params = SamplingParams(temperature=50.0, max_tokens=150, ignore_eos=True, seed=3, logprobs=20)
    outputs = run(core, {0: [("a", [1], params)]})["a"]
    seen = {output.token_id for output in outputs}
    for output in outputs:
        assert output.logprobs is not None
        seen |= {token_id for token_id, _ in output.logprobs.top}
    assert seen.isdisjoint(unused)
    assert max(seen) < CONFIG.vocab_size


def test_a_declared_prefix_is_shared_by_all_salts(tiny_model_dir: Path) -> None:
    declared = tuple(range(40))  # two pages of 16, and a half
    llm = LLM(
        tiny_model_dir,
        device="cpu",
        dtype="float32",
        block_size=16,
        shared_prefixes=[SharedPrefix(name="system", token_ids=declared)],
    )
    plain = LLM(tiny_model_dir, device="cpu", dtype="float32", block_size=16)
    prompt = [*declared, *range(60)]
    greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    stretched = SamplingParams(
        temperature=0, max_tokens=8, logprobs=3, rope=RopeScaling(type="ntk", factor=2)
    )
    for params, salt, cached_tokens in (
        (greedy, "one", 0),
        (greedy, "one", 96),
        (greedy, "two", 32),
        (stretched, "two", 0),
        (stretched, "one", 32),
    ):
        (said,) = llm.generate([prompt], params, RequestOptions(cache_salt=salt))
        assert said.usage.cached_tokens == cached_tokens
        (alone,) = plain.generate([prompt], params, RequestOptions(cache_salt=f"{salt} alone"))
        assert said.token_ids == alone.token_ids
        assert said.logprobs == alone.logprobs


@pytest.mark.parametrize(
    ("token_ids", "words"),
    [
        ((), "must have at least one page of 16 tokens"),
        ((1,) * 15, "got 15 tokens"),
        ((1,) * 193, "must fit the context of 192 tokens, got 193"),
        ((*[1] * 16, CONFIG.vocab_size), f"token ids from 0 to {CONFIG.vocab_size - 1}"),
    ],
)
def test_prefixes_that_could_never_be_of_use_are_refused(
    tiny_model_dir: Path, token_ids: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"shared prefix system .*{words}"):
        LLM(
            tiny_model_dir,
            device="cpu",
            dtype="float32",
            block_size=16,
            shared_prefixes=[SharedPrefix(name="system", token_ids=token_ids)],
        )


def test_llm_generates_in_order(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, device="cpu", dtype="float32", block_size=16)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    prompts: list[str | list[int]] = ["the", [5, 6, 7], "another one here"]
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert together == alone
    for completion in together:
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.usage.completion_tokens == len(completion.token_ids)
        assert completion.usage.total_tokens == (
            len(completion.prompt_token_ids) + len(completion.token_ids)
        )
    assert "".join(d.text for d in llm.stream("the", params)) == together[0].text


def test_llm_calls_may_overlap(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, device="cpu", dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    expected = [completion.text for completion in llm.generate(["the", "in"], params)]
    first = llm.stream("the", params)
    text = next(first).text
    second = llm.stream("in", params)
    assert llm.generate(["in"], params)[0].text == expected[1]
    pairs = list(zip(first, second, strict=False))
    assert text + "".join(delta.text for delta, _ in pairs) == expected[0]
    assert (
        "".join(delta.text for _, delta in pairs)
        == expected[1][: len(expected[1])][: sum(len(delta.text) for _, delta in pairs)]
    )
    assert llm.stats.running == 1  # the second has one token left


def test_model_smaller_than_a_page(tmp_path: Path) -> None:
    config = tiny_config(max_position=2)
    model = write_model(tmp_path, config)
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    (completion,) = llm.generate([[5]], SamplingParams(temperature=0, ignore_eos=True))
    assert completion.token_ids == recompute(model, [5], 2)


def test_ids_that_the_tokenizer_has_not_are_not_sampled(tmp_path: Path) -> None:
    """nanoGPT's vocab_size is 50,304 over 50,257 tokens."""
    write_model(tmp_path, tiny_config(vocab_size=288))
    llm = LLM(tmp_path, device="cpu", dtype="float32")
    params = SamplingParams(temperature=100.0, max_tokens=150, ignore_eos=True, seed=1)
    assert max(llm.generate([[1]], params)[0].token_ids) <= EOS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 260, "eos_token_id": 3}, "ids up to 267; vocab_size .* is 260"),
        ({"vocab_size": 280, "eos_token_id": 270}, "eos_token_id is 270, which the tokenizer"),
    ],
)
def test_model_and_tokenizer_must_agree(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    write_model(tmp_path, tiny_config(**changes))
    with pytest.raises(ConfigError, match=message):
        LLM(tmp_path, device="cpu", dtype="float32")


def test_llm_leaving_a_stream_frees_pages(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, device="cpu", dtype="float32")
    stream = llm.stream("the", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert llm.stats.blocks_free < llm.stats.blocks_total
    stream.close()
    assert llm.stats.blocks_free == llm.stats.blocks_total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_prefix_cache(tiny_model_dir: Path, dtype: str) -> None:
    """Uncached, partly cached, wholly cached, and shared while running: equal to the bit."""
    rng = random.Random(5)
    common = [rng.randrange(EOS) for _ in range(100)]
    params = SamplingParams(seed=9, max_tokens=30, logprobs=3, ignore_eos=True)
    requests = [
        (str(at), common[: rng.randrange(1, 100)] + [rng.randrange(EOS)] * rng.randrange(3), params)
        for at in range(12)
    ]
    requests.append(("12", common[:96], params))  # whole pages
    requests.append(("13", common[:96], params))

    def outcome(cores: list[EngineCore]) -> tuple[dict[str, object], int]:
        tokens: dict[str, object] = {}
        for at, (name, prompt, each) in enumerate(requests):
            outputs = run(cores[at % len(cores)], {0: [(name, prompt, each)]})[name]
            tokens[name] = [(output.token_id, output.logprobs) for output in outputs]
        return tokens, sum(core.stats.prefix_hits for core in cores)

    def make() -> EngineCore:
        return EngineCore(
            EngineConfig(
                model_dir=str(tiny_model_dir),
                device="cpu",
                dtype=dtype,
                cache=CacheConfig(block_size=16, kv_memory=60 * PAGE),
                scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=48),
            )
        )

    uncached, hits = outcome([make() for _ in requests])
    assert hits == 0
    cached, hits = outcome([make()])
    assert hits > 300
    assert cached == uncached
    core = make()
    together = run(core, {2 * at: [request] for at, request in enumerate(requests)})
    assert {
        name: [(output.token_id, output.logprobs) for output in outputs]
        for name, outputs in together.items()
    } == uncached
    assert core.stats.prefix_hits > 0
    assert together["13"][0].cached_tokens == 80
    assert core.stats.blocks_free == core.stats.blocks_total


def test_llm_counts_cached_tokens(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, device="cpu", dtype="float32", block_size=16)
    params = SamplingParams(max_tokens=1)
    assert llm.generate([[1] * 40], params)[0].usage.cached_tokens == 0
    assert llm.generate([[1] * 40], params)[0].usage.cached_tokens == 32
    salted = llm.generate([[1] * 40], params, RequestOptions(cache_salt="mine"))
    assert salted[0].usage.cached_tokens == 0
