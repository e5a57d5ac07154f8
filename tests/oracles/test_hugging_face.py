"""Logits and greedy tokens against Hugging Face's networks, after `convert`, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from engine import LLM, SamplingParams
from engine.errors import CheckpointError
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model, read_config
from engine.model.rope import RotaryTable
from tests.models import VOCAB_SIZE, tiny_config, write_model, write_tokenizer
from weights.convert import convert

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}


def neox(**changes: Any) -> torch.nn.Module:
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "max_position_embeddings": 192,
        "attn_implementation": "eager",
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON | settings | changes))


def gptj_settings(**changes: Any) -> dict[str, Any]:
    settings = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 192, "rotary_dim": 8}
    return COMMON | settings | changes


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "neox, parallel": lambda: neox(rotary_pct=0.25, rotary_emb_base=10_000),
    "neox, sequential": lambda: neox(
        use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=1_000
    ),
    "neox, tied, tanh": lambda: neox(
        tie_word_embeddings=True, hidden_act="gelu_new", rotary_pct=1.0
    ),
    "neox, no attention bias": lambda: neox(attention_bias=False, hidden_act="relu"),
    "gpt-j": lambda: GPTJForCausalLM(GPTJConfig(**gptj_settings(n_inner=160))),
    "gpt-j, all rotated": lambda: GPTJForCausalLM(GPTJConfig(**gptj_settings(rotary_dim=16))),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**gptj_settings())),
}


def randomise(model: torch.nn.Module) -> None:
    """Biases and norms too, which begin as zeros and ones."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach()[0].item(), std=0.3)


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    torch.manual_seed(0)
    theirs = MODELS[request.param]().eval()
    randomise(theirs)
    source = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(source)
    write_tokenizer(source)
    directory = source / "ours"
    convert(source, directory)
    return theirs, directory


def our_logits(directory: Path, token_ids: torch.Tensor) -> torch.Tensor:
    model = load_model(directory, torch.float32)
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    return model.logits(model(token_ids, attention))


def some_ids(length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE - 1, (length,), generator=generator)


def test_logits(pair: tuple[Any, Path]) -> None:
    theirs, directory = pair
    token_ids = some_ids(150)
    with torch.inference_mode():
        expected = theirs(token_ids[None]).logits[0]
    ours = our_logits(directory, token_ids)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_greedy_tokens_through_the_paged_engine(pair: tuple[Any, Path]) -> None:
    theirs, directory = pair
    llm = LLM(directory, device="cpu", dtype="float32", max_num_batched_tokens=64)
    prompts: list[str | list[int]] = [some_ids(n, seed=n).tolist() for n in (1, 5, 64, 100)]
    completions = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, logprobs=0))
    for prompt, completion in zip(prompts, completions, strict=True):
        inputs = torch.tensor([prompt])
        with torch.inference_mode():
            expected = theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
            )
            logprobs = theirs(expected).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        assert completion.logprobs is not None
        ours = torch.tensor([each.logprob for each in completion.logprobs])
        assert torch.allclose(ours, logprobs.max(-1).values, rtol=1e-4, atol=1e-4)


LEAVING: dict[str, dict[str, object]] = {
    "as shipped": {},
    "parallel, untied": {"parallel_residual": True, "tie_embeddings": False},
    "no biases": {"bias": False, "activation": "relu2", "rotary_dim": 10},
    "bare norms": {"norm_weight": False, "attention_bias": False, "activation": "gelu_tanh"},
    "interleaved": {"pairing": "interleaved", "rope_sign": -1, "rope_base": 1000.0},
}


@pytest.mark.parametrize("name", LEAVING)
def test_leaving_and_coming_back(tmp_path: Path, name: str) -> None:
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    ours.mkdir()
    config = tiny_config(**LEAVING[name])
    write_model(ours, config)
    convert(ours, theirs, "gpt-neox")
    token_ids = some_ids(150)
    expected = our_logits(ours, token_ids)
    model = AutoModelForCausalLM.from_pretrained(theirs, attn_implementation="eager")
    with torch.inference_mode():
        logits = model.eval()(token_ids[None]).logits[0]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()

    convert(theirs, back)
    assert torch.equal(our_logits(back, token_ids), expected)
    returned = read_config(back).to_dict()
    if config.pairing == "half":
        before, after = (load_file(each / "model.safetensors") for each in (ours, back))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        stored = json.loads((ours / "config.json").read_text())
        told = {key for key, value in stored.items() if value is not None}
        assert {key: returned[key] for key in told} == {key: stored[key] for key in told}


@pytest.mark.parametrize(
    "changes", [{"norm": "rmsnorm"}, {"qk_norm": "before"}, {"head_bias": True}]
)
def test_what_a_neox_has_no_place_for(tmp_path: Path, changes: dict[str, object]) -> None:
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", tiny_config(tie_embeddings=False, **changes))
    with pytest.raises(CheckpointError, match="GPT-NeoX has no place for"):
        convert(tmp_path / "ours", tmp_path / "theirs", "gpt-neox")
    assert not (tmp_path / "theirs").exists()
