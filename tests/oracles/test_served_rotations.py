"""What the paged engine serves under a rotation, against other people's uncached forward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from engine import LLM, SamplingParams
from engine.model.loader import load_model
from engine.scaling import RopeScaling
from tests.models import VOCAB_SIZE, tiny_config, write_model
from tests.oracles.test_hugging_face import some_ids
from weights.convert import convert

CONTEXT = 64
SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 4.0},
    {"type": "yarn", "factor": 4.0},
    {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]


def neox(path: Path, declared: dict[str, Any]) -> Any:
    """The GPT-NeoX of a directory, under a scaling."""
    config = GPTNeoXConfig.from_pretrained(path)
    options = {name: value for name, value in declared.items() if name != "type"}
    config.rope_parameters |= {"rope_type": declared["type"], **options}
    if declared["type"] in ("yarn", "llama3"):
        config.rope_parameters["original_max_position_embeddings"] = CONTEXT
    return GPTNeoXForCausalLM.from_pretrained(path, config=config).eval()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same for Hugging Face."""
    directory = tmp_path_factory.mktemp("rotations")
    ours, theirs = directory / "ours", directory / "theirs"
    ours.mkdir()
    write_model(ours, tiny_config(max_position=CONTEXT))
    convert(ours, theirs, "gpt-neox")
    return ours, theirs


@pytest.mark.parametrize("declared", SCALINGS, ids=lambda declared: declared["type"])
def test_greedy_tokens_are_hugging_faces(
    directories: tuple[Path, Path], declared: dict[str, Any]
) -> None:
    """To the end of the stretched context; theirs without a cache.

    Their dynamic factor follows the length that is given: sequences are padded at their end, which
    no token before it sees, to the length that ours is rounded up to. It only ever grows while a
    model lives, so each sequence gets a new one.
    """
    llm = LLM(directories[0], device="cpu", dtype="float32", block_size=16)
    rope = RopeScaling.from_dict(declared)
    params = SamplingParams(temperature=0, ignore_eos=True, rope=rope)
    prompts: list[str | list[int]] = [some_ids(n, seed=n).tolist() for n in (20, 100)]
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        token_ids = [*prompt, *completion.token_ids]
        assert len(token_ids) == CONTEXT * rope.factor + 1
        theirs = neox(directories[1], declared)
        first = len(prompt)
        for stretch in (1, 2, 4) if rope.type == "dynamic" else (4,):
            end = min(CONTEXT * stretch, len(token_ids) - 1)
            if end < first:
                continue
            padded = [*token_ids[:end], *[0] * (CONTEXT * stretch - end)]
            with torch.inference_mode():
                logits = theirs(torch.tensor([padded]), use_cache=False).logits[0]
            expected = logits[first - 1 : end, :VOCAB_SIZE].argmax(-1).tolist()
            assert token_ids[first : end + 1] == expected
            first = end + 1


class LibraryAttention:
    """Attention over a whole sequence, rotated by rotary-embedding-torch's xPos."""

    def __init__(self, rotary_dim: int, num_heads: int, factor: float, scale_base: float) -> None:
        self._rotary = RotaryEmbedding(
            dim=rotary_dim,
            use_xpos=True,
            xpos_scale_base=scale_base,
            interpolate_factor=factor,
            cache_if_possible=False,
        )
        self._num_heads = num_heads
        self._half = rotary_dim // 2

    def _interleaved(self, x: Tensor) -> Tensor:
        """The library pairs (2i, 2i + 1); we pair (i, i + rotary_dim / 2)."""
        half = self._half
        pairs = torch.stack((x[..., :half], x[..., half : 2 * half]), dim=-1).flatten(-2)
        return torch.cat((pairs, x[..., 2 * half :]), dim=-1)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[time, 3 * hidden_size] -> [time, hidden_size]"""
        heads = qkv.view(len(qkv), 3, self._num_heads, -1)
        query, key, value = heads.permute(1, 2, 0, 3)[:, None]
        query, key = self._rotary.rotate_queries_and_keys(
            self._interleaved(query), self._interleaved(key)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(value.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return (weights @ value)[0].transpose(0, 1).reshape(len(qkv), -1)


@pytest.mark.parametrize(("factor", "scale_base"), [(1.0, 512.0), (1.0, 32.0), (2.5, 64.0)])
def test_a_model_trained_with_xpos(tmp_path: Path, factor: float, scale_base: float) -> None:
    """Declared in config.json, through the page-relative cache; theirs without one."""
    rope = {"type": "xpos", "factor": factor, "scale_base": scale_base}
    config = tiny_config(max_position=160, rope=rope)
    write_model(tmp_path, config)
    llm = LLM(tmp_path, device="cpu", dtype="float32", block_size=16)
    params = SamplingParams(temperature=0, ignore_eos=True, logprobs=0)
    prompts: list[str | list[int]] = [some_ids(n, seed=n).tolist() for n in (3, 120)]
    model = load_model(tmp_path, torch.float32)
    attention = LibraryAttention(config.rotary_dim, config.num_heads, factor, scale_base)
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        token_ids = [*prompt, *completion.token_ids]
        assert len(token_ids) == 160 * factor + 1
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor(token_ids), attention))[:, :VOCAB_SIZE]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert completion.token_ids == logprobs.argmax(-1).tolist()
        assert completion.logprobs is not None
        ours = torch.tensor([each.logprob for each in completion.logprobs])
        assert torch.allclose(ours, logprobs.max(-1).values, atol=1e-3)
