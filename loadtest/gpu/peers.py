"""Hugging Face's generation on the same weights and the same GPU."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from engine.model.gpt2 import GPT2


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
