"""overflow `shift`: streams far longer than the context, in constant memory, exact to the bit."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from torch import Tensor

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.messages import AddRequest, EngineOutput
from engine.model.attention.base import KVCache
from engine.model.loader import load_model
from engine.model.rope import RotaryTable, rotate
from engine.params import RequestOptions, SamplingParams
from engine.request import SINK_BLOCKS, Window
from tests.models import EOS, tiny_config, write_model

CONFIG = tiny_config(max_position=96)
SIZE = 16
WINDOW = Window(SIZE, 6)
PAGE = KVCache.bytes_per_block(CONFIG, SIZE, torch.float32)


def engine(directory: Path, pages: int = 40, budget: int = 64, max_num_seqs: int = 8) -> EngineCore:
    return EngineCore(
        EngineConfig(
            model_dir=str(directory),
            device="cpu",
            dtype="float32",
            cache=CacheConfig(block_size=SIZE, kv_memory=pages * PAGE),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        )
    )


def add(
    core: EngineCore,
    name: str,
    prompt: list[int],
    params: SamplingParams,
    output: list[int] | None = None,
    window: Window | None = WINDOW,
) -> None:
    assert params.max_tokens is not None
    core.add(
        AddRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=params,
            seed=params.seed or 0,
            max_tokens=params.max_tokens,
            stop_token_ids=[],
            options=RequestOptions(overflow="shift" if window else "error"),
            window=window,
            output_token_ids=output or [],
        )
    )


def drain(core: EngineCore, most_pages: int | None = None) -> dict[str, list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {}
    while core.has_unfinished:
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        if most_pages is not None:
            assert core.stats.blocks_total - core.stats.blocks_free <= most_pages
    return outputs


def bits(outputs: list[EngineOutput]) -> list[object]:
    return [(output.index, output.token_id, output.logprobs) for output in outputs]


class ShiftedAttention:
    """One token at a time in float64, keys kept as they are and rotated anew for every query."""

    def __init__(self, num_sinks: int = SINK_BLOCKS) -> None:
        self._sinks = num_sinks
        self._table = RotaryTable.for_model(CONFIG)
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        heads = qkv[0].double().view(3, CONFIG.num_heads, CONFIG.head_dim)
        seen = self._seen.setdefault(layer, [])
        seen.append((heads[1], heads[2]))
        index = len(seen) - 1
        shift = max(0, index // SIZE - WINDOW.num_blocks + 1)
        visible = [
            (at if at // SIZE < self._sinks else at - shift * SIZE, *seen[at])
            for at in range(len(seen))
            if at // SIZE < self._sinks or at // SIZE >= self._sinks + shift
        ]
        at = torch.tensor([position for position, _, _ in visible])
        keys = torch.stack([key for _, key, _ in visible])  # [slots, heads, dim]
        values = torch.stack([value for _, _, value in visible])
        cos, sin = self._table.cos.double(), self._table.sin.double()
        query = self._rotated(heads[0], cos[at[-1]], sin[at[-1]])
        keys = self._rotated(keys, cos[at, None], sin[at, None])
        scores = torch.einsum("hd,shd->hs", query, keys) / math.sqrt(CONFIG.head_dim)
        out = torch.einsum("hs,shd->hd", scores.softmax(-1), values)
        return out.reshape(1, -1).to(qkv.dtype)

    @staticmethod
    def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = CONFIG.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def short_model(directory: Path) -> Path:
    write_model(directory, CONFIG)
    return directory


def test_rotation_is_the_engines() -> None:
    x = torch.randn(3, CONFIG.head_dim)
    cos, sin = torch.randn(2, CONFIG.rotary_dim // 2)
    torch.testing.assert_close(ShiftedAttention._rotated(x, cos, sin), rotate(x, cos, sin))


def test_equals_attention_over_what_is_left(tmp_path: Path) -> None:
    """Against keys that were never moved, three contexts long."""
    model = load_model(short_model(tmp_path), torch.float32)
    attention = ShiftedAttention()
    token_ids, expected = [3, 1, 4], []
    for at in range(3 * CONFIG.max_position):
        hidden = model(torch.tensor(token_ids[at : at + 1]), attention)
        if at >= 2:
            logprobs = model.logits(hidden[-1])[: CONFIG.vocab_size].log_softmax(-1)
            token_ids.append(int(logprobs.argmax()))
            expected.append(float(logprobs.max()))
    core = engine(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=len(expected), logprobs=0)
    add(core, "a", token_ids[:3], params)
    outputs = drain(core)["a"]
    assert [output.token_id for output in outputs] == token_ids[3:]
    got = [output.logprobs.logprob for output in outputs if output.logprobs is not None]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_20_contexts_in_constant_pages_whatever_else_runs(tmp_path: Path) -> None:
    """Alone token by token; replayed from its first token in chunks, among others: equal bits."""
    directory = short_model(tmp_path)
    rng = random.Random(2)
    params = SamplingParams(
        seed=5, temperature=1.2, max_tokens=20 * CONFIG.max_position, logprobs=2, ignore_eos=True
    )
    prompt = [rng.randrange(EOS) for _ in range(40)]
    core = engine(directory, pages=WINDOW.num_blocks)
    add(core, "a", prompt, params)
    whole = drain(core, WINDOW.num_blocks)["a"]
    assert len(whole) == 20 * CONFIG.max_position
    assert core.stats.blocks_free == core.stats.blocks_total
    token_ids = [output.token_id for output in whole if output.token_id is not None]

    core = engine(directory, pages=14, budget=37, max_num_seqs=5)
    cut = len(whole) - 60
    add(core, "a", prompt, params, token_ids[:cut])  # as after a crash
    small = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for at in range(12):
        other = [rng.randrange(EOS) for _ in range(rng.randrange(1, 70))]
        add(core, f"other {at}", other, small, window=None)
    together = drain(core)
    assert bits(together["a"]) == bits(whole[cut:])
    assert core.stats.preemptions > 0
    assert core.stats.blocks_free == core.stats.blocks_total


def test_a_long_prompt_shifts_like_a_long_output(tmp_path: Path) -> None:
    directory = short_model(tmp_path)
    rng = random.Random(3)
    prompt = [rng.randrange(EOS) for _ in range(250)]
    params = SamplingParams(seed=1, max_tokens=30, logprobs=1, ignore_eos=True)
    seen = []
    for budget in (8, 19, 500):
        core = engine(directory, budget=budget)
        add(core, "a", prompt, params)
        seen.append(bits(drain(core)["a"]))
    assert seen[0] == seen[1] == seen[2]


def test_only_pages_before_the_first_shift_are_cached(tmp_path: Path) -> None:
    directory = short_model(tmp_path)
    prompt = [7] * 200
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=1, ignore_eos=True)
    core = engine(directory)
    add(core, "a", prompt, params)
    first = drain(core)["a"]
    assert core.stats.blocks_cached == WINDOW.num_blocks
    add(core, "b", prompt, params)
    second = drain(core)["b"]
    assert second[0].cached_tokens == 5 * SIZE
    assert bits(second) == bits(first)
    add(core, "c", prompt[:90], params, window=None)
    third = drain(core)["c"]
    assert third[0].cached_tokens == 5 * SIZE
    fresh = engine(directory)
    add(fresh, "c", prompt[:90], params, window=None)
    assert bits(drain(fresh)["c"]) == bits(third)
