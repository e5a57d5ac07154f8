"""The shipped model: what its files promise, and that it speaks English."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import LLM, SamplingParams
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model, read_config
from engine.model.rope import RotaryTable

DIRECTORY = Path(str(resources.files("weights") / "default"))
ENGLISH = (
    "It was a fine morning in the spring of the year, and the people of the village were on their "
    "way to the market. The old man stood at the door of his house and looked at the sea."
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DIRECTORY, device="cpu", dtype="float32", max_num_seqs=4)


def test_sizes() -> None:
    weights = DIRECTORY / "model.safetensors"
    assert weights.stat().st_size <= 40e6
    tensors = load_file(weights).values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 10e6 <= sum(tensor.numel() for tensor in tensors) <= 20e6
    config = read_config(DIRECTORY)
    assert config.max_position == 1024
    assert config.rotary_dim == 32


def test_tokenizer_fits_the_model(llm: LLM) -> None:
    config = read_config(DIRECTORY)
    assert len(llm.tokenizer) == config.vocab_size
    assert 8192 <= config.vocab_size <= 16384
    assert llm.tokenizer.unused_ids == []
    assert config.eos_token_id in llm.tokenizer.special_tokens.values()
    assert llm.tokenizer.decode(llm.tokenizer.encode(ENGLISH)) == ENGLISH


def test_it_has_learned_english(llm: LLM) -> None:
    """Its loss on a text that it has not seen; letters by their frequency alone cost 4.1 bits."""
    token_ids = torch.tensor(llm.tokenizer.encode(ENGLISH))
    model = load_model(DIRECTORY, torch.float32)
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    logits = model.logits(model(token_ids, attention))
    nats = torch.nn.functional.cross_entropy(logits[:-1], token_ids[1:], reduction="sum")
    assert float(nats) / math.log(2) / len(ENGLISH.encode()) < 1.6


def test_words(llm: LLM) -> None:
    (completion,) = llm.generate(
        ["The old captain"], SamplingParams(seed=1, max_tokens=64, top_k=40)
    )
    words = completion.text.split()
    assert len(words) > 20
    assert sum(word.strip(".,;\"'").isalpha() for word in words) > 0.7 * len(words)


def test_card() -> None:
    card = (DIRECTORY / "README.md").read_text("utf-8")
    for word in ("CC BY-SA", "public domain", "bits per byte", "training.png", "Alice"):
        assert word in card
    assert (DIRECTORY / "training.png").stat().st_size > 10_000
