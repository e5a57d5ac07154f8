"""Logits against Hugging Face's GPT-NeoX with the same weights, and its greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from engine import LLM, SamplingParams
from engine.config import ModelConfig
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from tests.models import VOCAB_SIZE, tiny_config, write_tokenizer

LAYER = "gpt_neox.layers.{}."
NAMES = {  # ours -> theirs, inside a layer
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def per_kind(tensor: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """NeoX keeps q, k, v head by head; we keep all heads of q, then of k, then of v."""
    heads = tensor.view(config.num_heads, 3, config.head_dim, *tensor.shape[1:])
    return heads.transpose(0, 1).reshape(tensor.shape).contiguous()


def convert(theirs: GPTNeoXForCausalLM, config: ModelConfig, directory: Path) -> None:
    state = theirs.state_dict()
    ours = {
        "embedding.weight": state["gpt_neox.embed_in.weight"],
        "head.weight": theirs.get_output_embeddings().weight.detach(),
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = state[f"gpt_neox.final_layer_norm.{kind}"]
        for layer in range(config.num_layers):
            for our_name, their_name in NAMES.items():
                tensor = state[f"{LAYER.format(layer)}{their_name}.{kind}"]
                if our_name == "qkv":
                    tensor = per_kind(tensor, config)
                ours[f"blocks.{layer}.{our_name}.{kind}"] = tensor
    ours = {name: tensor.contiguous() for name, tensor in ours.items()}
    save_file(ours, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    write_tokenizer(directory)


@pytest.fixture(scope="module", params=["gelu", "gelu_tanh"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GPTNeoXForCausalLM, Path]:
    config = tiny_config(
        num_layers=3,
        tie_embeddings=False,
        padded_vocab_size=VOCAB_SIZE,
        activation=request.param,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[request.param],
            rotary_pct=config.rotary_dim / config.head_dim,
            rotary_emb_base=10_000,
            max_position_embeddings=config.max_position,
            initializer_range=0.3,
            layer_norm_eps=config.norm_eps,
            use_parallel_residual=False,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    for parameter in theirs.parameters():  # biases and norms, which begin as zeros and ones
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach()[0].item(), std=0.3)
    directory = tmp_path_factory.mktemp("neox")
    convert(theirs, config, directory)
    return theirs, directory


def test_logits(pair: tuple[GPTNeoXForCausalLM, Path]) -> None:
    theirs, directory = pair
    model = load_model(directory, torch.float32)
    token_ids = torch.randint(0, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(1))
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    ours = model.logits(model(token_ids, attention))
    with torch.inference_mode():
        expected = theirs(token_ids[None]).logits[0]
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_greedy_tokens_through_the_paged_engine(pair: tuple[GPTNeoXForCausalLM, Path]) -> None:
    theirs, directory = pair
    llm = LLM(directory, device="cpu", dtype="float32", max_num_batched_tokens=64)
    generator = torch.Generator().manual_seed(2)
    prompts: list[str | list[int]] = [
        torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in (1, 5, 64, 100)
    ]
    completions = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, logprobs=0))
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.inference_mode():
            inputs = torch.tensor([prompt])
            expected = theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
            )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        with torch.inference_mode():
            logprobs = theirs(expected).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.logprobs is not None
        ours = torch.tensor([each.logprob for each in completion.logprobs])
        best = logprobs.max(-1).values
        assert torch.allclose(ours, best, rtol=1e-4, atol=1e-4)
