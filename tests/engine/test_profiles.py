"""A rotation per request: against the uncached forward in float64, and itself to the bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM, Completion, RequestOptions, SamplingParams
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import CheckpointError, ConfigError, ContextOverflow, InvalidRequest
from engine.messages import AddRequest, EngineOutput
from engine.model.attention.base import KVCache
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model
from engine.model.rope import RopeProfile, inverse_frequencies
from engine.scaling import UNSCALED, RopeScaling
from tests.models import EOS, tiny_config, write_model

CONTEXT = 64
CONFIG = tiny_config(max_position=CONTEXT)
PAGE = KVCache.bytes_per_block(CONFIG, 16, torch.float32)
DYNAMIC = RopeScaling(type="dynamic", factor=4)
ROPES = (
    None,
    UNSCALED,
    RopeScaling(type="linear", factor=2),
    RopeScaling(type="ntk", factor=4),
    RopeScaling(type="yarn", factor=4),
    RopeScaling(type="yarn", factor=3, ramp="rotations", attention_factor=1.5),
    RopeScaling(type="llama3", factor=4, original_context=32),
    RopeScaling(type="xpos", scale_base=64),
    RopeScaling(type="xpos", factor=2.5),
    DYNAMIC,
    RopeScaling(type="dynamic", factor=2.5, original_context=40),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained for 64 tokens."""
    directory = tmp_path_factory.mktemp("short")
    write_model(directory, CONFIG)
    return directory


class AbsoluteAttention:
    """Float64 over a whole sequence; a pair is a complex number, and its score
    Re(q conj(k) e^(i n f)) times what xPos and YaRN do to it, n the distance."""

    def __init__(self, config: ModelConfig, profile: RopeProfile) -> None:
        self._config = config
        self._profile = profile

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        config, half = self._config, self._config.rotary_dim // 2
        time = len(qkv)
        heads = qkv.double().view(time, 3, config.num_heads, config.head_dim)
        query, key, value = heads.permute(1, 2, 0, 3)
        inv_freq = self._profile.inv_freq
        inv_freq = inv_freq if inv_freq.ndim == 1 else inv_freq[layer]
        at = torch.arange(time, dtype=torch.float64)
        distance = (at[:, None] - at)[..., None]
        turn = torch.polar(torch.ones(()).double(), distance * inv_freq)  # [query, key, pair]
        if self._profile.log_zeta is not None:
            turn = turn * (distance * self._profile.log_zeta).exp()
        pair_q = torch.complex(query[..., :half].contiguous(), query[..., half : 2 * half])
        pair_k = torch.complex(key[..., :half].contiguous(), key[..., half : 2 * half])
        scores = torch.einsum("hqp,hkp,qkp->hqk", pair_q, pair_k.conj(), turn).real
        scores = scores * self._profile.attention_factor**2
        scores = scores + query[..., 2 * half :] @ key[..., 2 * half :].transpose(1, 2)
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        scores = (scores / math.sqrt(config.head_dim)).masked_fill(future, -math.inf)
        return (scores.softmax(-1) @ value).transpose(0, 1).reshape(time, -1).to(qkv.dtype)


def profile_of(model: GPT2, scaling: RopeScaling, length: int) -> RopeProfile:
    """What is in force at a length; of `dynamic`, by its paper's formula for the base."""
    config = model.config
    base = config.rope_base
    if scaling.type == "dynamic":
        context = scaling.original_context or config.max_position
        stretch = 1
        while context * stretch < length:
            stretch *= 2
        scale = scaling.factor * stretch - (scaling.factor - 1)
        base *= scale ** (config.rotary_dim / (config.rotary_dim - 2))
        return RopeProfile(inverse_frequencies(config.rotary_dim, base))
    if model.inv_freq is not None:
        return RopeProfile.build(scaling, model.inv_freq, config.max_position)
    inv_freq = inverse_frequencies(config.rotary_dim, base)
    return RopeProfile.build(scaling, inv_freq, config.max_position, base)


def assert_uncached(model: GPT2, scaling: RopeScaling, completion: Completion) -> int:
    """Every token is the uncached forward's likeliest, and as likely; how many factors there were.

    For each token the whole sequence before it is computed under the factor of its own length.
    """
    prompt = completion.prompt_token_ids
    token_ids = prompt + completion.token_ids
    seen: dict[float, Tensor] = {}
    assert completion.logprobs is not None
    for at, (token_id, logprobs) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True), start=len(prompt)
    ):
        profile = profile_of(model, scaling, at)
        key = float(profile.inv_freq.flatten()[-1])
        if key not in seen:  # causal: one forward gives every token of this factor
            hidden = model(torch.tensor(token_ids), AbsoluteAttention(model.config, profile))
            seen[key] = model.logits(hidden)[:, : model.config.vocab_size].log_softmax(-1)
        expected = seen[key][at - 1]
        assert token_id == int(expected.argmax()), f"token {at} under {scaling}"
        assert logprobs.logprob == pytest.approx(float(expected.max()), abs=2e-4)
    return len(seen)


def some_ids(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(EOS) for _ in range(length)]


def greedy(rope: RopeScaling | None, max_tokens: int | None) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, rope=rope
    )


def test_every_type_in_one_batch_equals_the_uncached_forward(directory: Path) -> None:
    """To the last token of the stretched context, which follows the factor."""
    llm = LLM(directory, device="cpu", dtype="float32", block_size=16, max_profiles=12)
    prompts: list[str | list[int]] = []
    params = []
    for at, rope in enumerate(ROPES):
        context = CONTEXT if rope is None else rope.context(CONTEXT)
        for length in (3, context - 5):
            prompts.append(some_ids(length, seed=at))
            params.append(greedy(rope, 40 if length == 3 else None))
    model = load_model(directory, torch.float32)
    completions = llm.generate(prompts, params)
    for each, completion in zip(params, completions, strict=True):
        rope = each.rope or UNSCALED
        if each.max_tokens is None:
            assert completion.usage.total_tokens == rope.context(CONTEXT) + 1
        assert_uncached(model, rope, completion)
    assert llm.stats.profiles == 1
    assert llm.stats.blocks_free == llm.stats.blocks_total


def test_dynamic_recomputes_where_the_factor_changes(directory: Path) -> None:
    llm = LLM(directory, device="cpu", dtype="float32", block_size=16)
    model = load_model(directory, torch.float32)
    for rope in (DYNAMIC, RopeScaling(type="dynamic", factor=8, original_context=20)):
        prompt = some_ids(7, seed=3)
        (completion,) = llm.generate([prompt], greedy(rope, rope.context(CONTEXT) - 7))
        factors = assert_uncached(model, rope, completion)
        assert factors == (3 if rope is DYNAMIC else 4)
    assert llm.stats.preemptions == 0


def core(
    directory: Path, *, pages: int = 200, budget: int = 64, seqs: int = 16, profiles: int = 4
) -> EngineCore:
    return EngineCore(
        EngineConfig(
            model_dir=str(directory),
            device="cpu",
            dtype="float32",
            cache=CacheConfig(block_size=16, kv_memory=pages * PAGE),
            scheduler=SchedulerConfig(
                max_num_seqs=seqs, max_num_batched_tokens=budget, max_profiles=profiles
            ),
        )
    )


def add(
    engine: EngineCore,
    name: str,
    prompt: list[int],
    params: SamplingParams,
    output: Sequence[int] = (),
) -> None:
    assert params.max_tokens is not None
    engine.add(
        AddRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=params,
            seed=params.seed or 0,
            max_tokens=params.max_tokens,
            stop_token_ids=[],
            options=RequestOptions(),
            output_token_ids=list(output),
        )
    )


def drain(engine: EngineCore) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def bits(outputs: list[EngineOutput]) -> list[object]:
    return [(output.index, output.token_id, output.logprobs) for output in outputs]


def test_bits_do_not_depend_on_other_profiles(directory: Path) -> None:
    """Alone, among other rotations, cached, chunked, preempted, with few rows: equal to the bit."""
    rng = random.Random(4)
    common = some_ids(90, seed=8)
    requests = []
    for at in range(3 * len(ROPES)):
        rope = ROPES[at % len(ROPES)]
        room = CONTEXT if rope is None else rope.context(CONTEXT)
        length = rng.randrange(1, room - 30)
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=at,
            max_tokens=min(60, room + 1 - length),
            logprobs=2,
            ignore_eos=True,
            rope=rope,
        )
        prompt = common[: min(length, 90)] + some_ids(max(0, length - 90), seed=at)
        requests.append((str(at), prompt, params))

    def outcome(engine: EngineCore) -> dict[str, list[object]]:
        for name, prompt, params in requests:
            add(engine, name, prompt, params)
        seen = {name: bits(outputs) for name, outputs in drain(engine).items()}
        assert engine.stats.blocks_free == engine.stats.blocks_total
        assert engine.stats.profiles == 1
        return seen

    alone: dict[str, list[object]] = {}
    for name, prompt, params in requests:
        engine = core(directory)
        add(engine, name, prompt, params)
        alone[name] = bits(drain(engine)[name])
    engine = core(directory, pages=600, budget=4096, seqs=40, profiles=12)
    assert outcome(engine) == alone
    assert outcome(engine) == alone  # and again, with every page cached
    assert engine.stats.prefix_hits > 500
    assert outcome(core(directory, budget=9, seqs=5)) == alone
    assert outcome(core(directory, profiles=2)) == alone
    squeezed = core(directory, pages=20, profiles=12)
    assert outcome(squeezed) == alone
    assert squeezed.stats.preemptions > 0


def test_a_dynamic_request_goes_on_after_a_crash(directory: Path) -> None:
    """Wherever the engine died: before, at and after the lengths at which the factor changes."""
    params = SamplingParams(seed=3, max_tokens=150, logprobs=1, ignore_eos=True, rope=DYNAMIC)
    engine = core(directory)
    add(engine, "a", some_ids(5), params)
    whole = drain(engine)["a"]
    token_ids = [output.token_id for output in whole if output.token_id is not None]
    for cut in (1, 58, 59, 60, 61, 100, 122, 123, 124, 149):
        engine = core(directory, budget=50)
        add(engine, "a", some_ids(5), params, token_ids[:cut])
        assert bits(drain(engine)["a"]) == bits(whole[cut:]), f"after {cut} tokens"


def test_a_stretch_costs_each_token_at_most_thrice(directory: Path) -> None:
    """Lengths double from one recomputation to the next, so the sum is bounded."""
    engine = core(directory, budget=512)
    params = SamplingParams(temperature=0, max_tokens=251, ignore_eos=True, rope=DYNAMIC)
    add(engine, "a", some_ids(5), params)
    computed = 0
    while engine.has_unfinished:
        step = engine._scheduler.schedule()
        computed += step.num_tokens
        engine._scheduler.update(step, engine._runner.execute(step))
    assert computed == 255 + 64 + 128


def test_pages_are_shared_by_the_rotation_in_force(directory: Path) -> None:
    llm = LLM(directory, device="cpu", dtype="float32", block_size=16)
    prompt = some_ids(49, seed=5)

    def cached(rope: RopeScaling | None) -> int:
        return llm.generate([prompt], greedy(rope, 2))[0].usage.cached_tokens

    assert cached(None) == 0
    assert cached(UNSCALED) == 48  # the same rotation, by another name
    assert cached(DYNAMIC) == 48  # within the trained context it is the model's own
    assert cached(RopeScaling(type="ntk", factor=4)) == 0
    assert cached(RopeScaling(type="ntk", factor=4)) == 48  # its row was free in between
    assert cached(RopeScaling(type="ntk", factor=4.5)) == 0


@pytest.mark.parametrize("learned", ["shared", "per_layer"])
def test_learned_frequencies_are_served(tmp_path: Path, learned: str) -> None:
    """Any sign and size, kept in float32 or better also where the model is bfloat16."""
    config = tiny_config(max_position=CONTEXT, learned_frequencies=learned)
    written = write_model(tmp_path, config)
    assert written.inv_freq is not None
    assert written.inv_freq.shape == ((2, 8) if learned == "per_layer" else (8,))
    model = load_model(tmp_path, torch.float32)
    llm = LLM(tmp_path, device="cpu", dtype="float32", block_size=16)
    linear = RopeScaling(type="linear", factor=2)
    prompts: list[str | list[int]] = [some_ids(20), some_ids(90), some_ids(30)]
    params = [greedy(None, 44), greedy(linear, 30), greedy(RopeScaling(type="xpos"), 30)]
    for each, completion in zip(params, llm.generate(prompts, params), strict=True):
        assert_uncached(model, each.rope or UNSCALED, completion)
    for kind in ("ntk", "dynamic", "yarn"):
        with pytest.raises(InvalidRequest, match=f"rope.type {kind} changes the base.*learned"):
            llm.generate([[1]], SamplingParams(rope=RopeScaling(type=kind, factor=2)))  # type: ignore[arg-type]  # parametrised
    half = load_model(tmp_path, torch.bfloat16)
    assert half.inv_freq is not None
    assert torch.equal(half.inv_freq.float(), written.inv_freq)
    assert LLM(tmp_path, device="cpu", dtype="bfloat16").generate(["the"])[0].token_ids


def test_missing_learned_frequencies_are_named(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(learned_frequencies="shared"))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["inv_freq"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing, first inv_freq"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    "rope",
    [
        RopeScaling(type="xpos", scale_base=64),
        RopeScaling(type="yarn", factor=4),
        RopeScaling(type="yarn", factor=4, original_context=16),
        DYNAMIC,
    ],
)
def test_a_models_own_rotation_is_served(tmp_path: Path, rope: RopeScaling) -> None:
    """Declared in config.json; its context follows the factor too."""
    write_model(tmp_path, tiny_config(max_position=CONTEXT, rope=rope.to_dict()))
    model = load_model(tmp_path, torch.float32)
    llm = LLM(tmp_path, device="cpu", dtype="float32", block_size=16)
    assert llm.info.context == rope.context(CONTEXT)
    prompts: list[str | list[int]] = [some_ids(9), some_ids(50)]
    for completion in llm.generate(prompts, greedy(None, None)):
        assert completion.usage.total_tokens == rope.context(CONTEXT) + 1
        assert_uncached(model, rope, completion)


def test_xpos_is_not_dropped_from_a_model_that_has_it(tmp_path: Path) -> None:
    rope = RopeScaling(type="xpos", scale_base=64)
    write_model(tmp_path, tiny_config(max_position=CONTEXT, rope=rope.to_dict()))
    llm = LLM(tmp_path, device="cpu", dtype="float32", block_size=16)
    with pytest.raises(InvalidRequest, match=r"rope.type must be xpos, .*64.*; got linear, 512"):
        llm.generate([[1]], SamplingParams(rope=RopeScaling(type="linear", factor=2)))
    with pytest.raises(InvalidRequest, match=r"scale_base 64.*; got xpos, 512"):
        llm.generate([[1]], SamplingParams(rope=RopeScaling(type="xpos", factor=2)))
    stretched = RopeScaling(type="xpos", factor=2, scale_base=64)
    (completion,) = llm.generate([some_ids(100)], greedy(stretched, 20))
    assert_uncached(load_model(tmp_path, torch.float32), stretched, completion)


def test_the_limit_follows_the_factor(directory: Path) -> None:
    memory = 10 * PAGE
    llm = LLM(directory, device="cpu", dtype="float32", block_size=16, kv_memory=memory)

    def ask(length: int, rope: RopeScaling | None, overflow: str = "error") -> Completion:
        options = RequestOptions(overflow=overflow)  # type: ignore[arg-type]  # parametrised
        params = SamplingParams(max_tokens=20, ignore_eos=True, rope=rope)
        return llm.generate([some_ids(length)], params, options)[0]

    double = RopeScaling(type="ntk", factor=2)
    with pytest.raises(ContextOverflow, match="context of 64 tokens; max_tokens can be at most 15"):
        ask(50, None)
    assert ask(50, double).usage.completion_tokens == 20
    with pytest.raises(ContextOverflow, match=r"context of 128 tokens; .* at most 9"):
        ask(120, double)
    with pytest.raises(ContextOverflow, match=r"cache of 160 tokens; .* at most 11"):
        ask(150, RopeScaling(type="ntk", factor=100))
    cut = ask(300, double, "truncate").usage
    assert (cut.prompt_tokens, cut.dropped_tokens) == (109, 191)
    shifted = ask(300, double, "shift").usage
    assert shifted.dropped_tokens == (318 // 16 - 8 + 1) * 16
    with pytest.raises(ContextOverflow, match=r"needs 16 pages of 16 tokens; .*, the cache 10"):
        ask(300, RopeScaling(type="ntk", factor=4), "shift")


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"type": "nkt", "factor": 2}, "rope.type must be one of .*; got 'nkt'"),
        ({"type": "ntk"}, "rope.factor is required for type ntk"),
        ({"factor": 2}, "rope.type must be one of .*; got None"),
        ({"type": "ntk", "factor": 0.5}, "rope.factor must be at least 1, got 0.5"),
        ({"type": "yarn", "factor": 2, "scale_base": 64}, "rope.scale_base is not an option"),
        (4, "rope must be a RopeScaling, got 4"),
    ],
)
def test_what_is_no_rotation_is_refused(rope: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(rope=rope)  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.field == message.split(" ", 1)[0]


def test_a_rotation_may_be_a_mapping() -> None:
    params = SamplingParams(rope={"type": "ntk", "factor": 4})  # type: ignore[arg-type]  # as JSON has it
    assert params.rope == RopeScaling(type="ntk", factor=4)


def test_one_profile_is_the_models_own(directory: Path) -> None:
    llm = LLM(directory, device="cpu", dtype="float32", max_profiles=1)
    with pytest.raises(InvalidRequest, match="got ntk: max_profiles of the server is 1"):
        llm.generate([[1]], SamplingParams(rope=RopeScaling(type="ntk", factor=2)))
    assert llm.generate([[1]], greedy(UNSCALED, 3))[0].token_ids


def test_a_dynamic_model_needs_a_second_profile(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(max_position=CONTEXT, rope=DYNAMIC.to_dict()))
    with pytest.raises(ConfigError, match=r"max_profiles must be at least 2 .* got 1"):
        LLM(tmp_path, device="cpu", max_profiles=1)
    llm = LLM(tmp_path, device="cpu", dtype="float32", block_size=16, max_profiles=2)
    assert llm.generate([[1]], greedy(None, None))[0].usage.total_tokens == 4 * CONTEXT + 1
