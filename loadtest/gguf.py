"""A GPT-NeoX directory as a GGUF file, so that llama.cpp runs the same weights.

`python -m loadtest.gguf SRC DST`; SRC is what `ropeway convert --to gpt-neox` writes. Names, shapes
and the order of query, key and value are those of llama.cpp's own conversion/gptneox.py; the file
is written by its own package, `gguf`. llama.cpp computes GELU by the tanh formula, whichever was
trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import gguf
import torch
import typer
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.frontend.tokenizer import CharacterTokenizer, Tokenizer

Kind = Literal["f32", "bf16", "q8_0"]
KINDS: dict[Kind, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
MODULES = {
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
LAYER = "gpt_neox.layers."
QKV = "attention.query_key_value"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")


def write_gguf(source: Path, path: Path, kind: Kind) -> None:
    """Write the model and its vocabulary. Norms and biases stay float32, as llama.cpp wants them.

    The tokenizer's pattern has no place in GGUF: give llama.cpp token ids, not text.
    Raises CheckpointError for what its GPT-NeoX cannot be.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    if config.get("model_type") != "gpt_neox":
        raise CheckpointError(
            f"{source}: model_type is {config.get('model_type')!r}; expected 'gpt_neox'"
        )
    if config["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(f"llama.cpp's GPT-NeoX knows GELU only, not {config['hidden_act']}")
    writer = GGUFWriter(path, "gptneox")
    quantization, file_type = KINDS[kind]
    _write_config(writer, config)
    writer.add_file_type(file_type)
    _write_vocabulary(writer, Tokenizer.from_directory(source), config)
    for name, tensor in _tensors(source, config):
        wanted = GGMLQuantizationType.F32 if tensor.ndim == 1 else quantization
        data = gguf.quantize(tensor.float().numpy(), wanted)
        writer.add_tensor(name, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config["rotary_pct"] * head_dim))
    writer.add_rope_freq_base(config["rotary_emb_base"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def _write_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens by id, as GPT-2 prints bytes, and the merges that lead to them."""
    if isinstance(tokenizer, CharacterTokenizer):
        raise CheckpointError("a tokenizer of characters has no place in GGUF")
    printed = _printable()
    special = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    ranks: dict[bytes, int] = {}
    tokens, types = [], []
    for token_id in range(config["vocab_size"]):
        if token_id in special:
            tokens.append(special[token_id])
            types.append(TokenType.CONTROL)
        elif token_id in tokenizer:
            token = tokenizer.token_bytes(token_id)
            ranks[token] = token_id
            tokens.append("".join(printed[byte] for byte in token))
            types.append(TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{token_id}]")
            types.append(TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [
            " ".join("".join(printed[byte] for byte in part) for part in pair)
            for pair in merges(ranks)
        ]
    )
    writer.add_add_bos_token(False)
    if config["eos_token_id"] is not None:
        writer.add_eos_token_id(config["eos_token_id"])


def merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts of each longer token: what the merges before its own make of its bytes.

    A token that no merges lead to (tiktoken takes a word that is a token as a whole) parts before
    its last byte: llama.cpp wants merges, and is given no text.
    """
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            pairs = (ranks.get(parts[at] + parts[at + 1], own) for at in range(len(parts) - 1))
            rank, at = min((rank, at) for at, rank in enumerate(pairs))
            if rank >= own:
                parts = [token[:-1], token[-1:]]
            else:
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def _printable() -> dict[int, str]:
    """GPT-2's stand-in for each byte: itself where it prints, else a character from 256 on."""
    printed = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in printed]
    return printed | {byte: chr(256 + at) for at, byte in enumerate(others)}


def _tensors(source: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """By llama.cpp's names. It knows no tied head and no absent bias here: they are written out."""
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            module, _, kind = name.rpartition(".")
            prefix = ""
            if module.startswith(LAYER):
                layer, module = module.removeprefix(LAYER).split(".", 1)
                prefix = f"blk.{layer}."
            if module not in MODULES:
                raise CheckpointError(f"{path}: no place for {name}")
            theirs = f"{prefix}{MODULES[module]}"
            yield f"{theirs}.{kind}", by_kind(tensor, config) if module == QKV else tensor
            if module == "gpt_neox.embed_in" and config["tie_word_embeddings"]:
                yield "output.weight", tensor
            if module.startswith("attention.") and not config["attention_bias"]:
                yield f"{theirs}.bias", torch.zeros(len(tensor))


def by_kind(tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """[heads, (q, k, v), head_dim, ...] to [(q, k, v), heads, head_dim, ...], both flat in rows."""
    parts = tensor.view(config["num_attention_heads"], 3, -1, *tensor.shape[1:])
    return parts.transpose(0, 1).reshape(tensor.shape)


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="GPT-NeoX directory.")],
    path: Annotated[Path, typer.Argument(metavar="DST", help="The GGUF file.")],
    kind: Annotated[Kind, typer.Option(help="Of the matrices.")] = "bf16",
) -> None:
    """Turn a GPT-NeoX directory into GGUF."""
    try:
        write_gguf(source, path, kind)
    except (OSError, CheckpointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
