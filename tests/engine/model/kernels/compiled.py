"""Compiles the kernels of a bfloat16 model for a GPU by its capability; a line for each."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.execution.kernels.logprobs import logprobs
from engine.execution.kernels.penalties import adjust
from engine.execution.kernels.sampling import sample
from engine.execution.kernels.step import advance, begin
from engine.model.kernels.attention import attend, combine, store
from engine.model.kernels.norm import norm
from engine.model.kernels.product import product

ASSEMBLERS = Path(nvidia.__file__).parent / "bin"
TYPES = {
    "*bf16": "qkv out keys values rows weight bias residual",
    "*fp32": "part_out part_best part_total temperatures min_ps logits adjusted "
    "penalties bias_values",
    "*fp64": "top_ps",
    "*i64": "slot_mapping tables seeds slots token_ids",
    "*i32": "tile_seq tile_start query_start positions block_tables bases num_blocks row_seq "
    "profiles top_ks indices choices present counts sampled num_biases bias_ids num_logprobs",
    "*i8": "allowed",
    "fp32": "scale eps",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}
SHAPE = {
    "num_heads": 12,
    "head_dim": 64,
    "block_size": 64,
    "value_pad": 64,
    "emulated": False,
}
ROTATION = {"num_kv_heads": 12, "half": 16, "half_pad": 16, "rest_pad": 32}
TILE = {"tile_rows": 16, "tile_out": 32, "tile_in": 128}
VOCABULARY = {"vocab_size": 50272, "block": 4096, "counts_width": 50272}
KERNELS = {
    "store": (store, {**SHAPE, **ROTATION, "head_tile": 16}, 4),
    "attend": (attend, {**SHAPE, **ROTATION, "tile_rows": 16, "split": False}, 1),
    "attend split": (attend, {**SHAPE, **ROTATION, "tile_rows": 16, "split": True}, 1),
    "combine": (combine, {**SHAPE, "unroll": 8}, 1),
    "product": (
        product,
        {"in_features": 768, "out_features": 3072, "has_bias": True, "activation": "gelu"}
        | {**TILE, "has_residual": True, "emulated": False},
        2,
    ),
    "norm": (
        norm,
        {"width": 768, "width_pad": 1024, "centred": True, "has_weight": True, "has_bias": True}
        | {"emulated": False},
        4,
    ),
    "adjust": (adjust, VOCABULARY, 8),
    "sample": (sample, VOCABULARY, 8),
    "logprobs": (logprobs, {**VOCABULARY, "most": 20}, 8),
    "begin": (begin, {"block_size": 64}, 1),
    "advance": (advance, {"counts_width": 50272, "not_run": -2}, 1),
}


def facts(name: str, capability: int) -> str:
    kernel, constants, warps = KERNELS[name]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        each: "constexpr" if each in constants else TYPE_OF.get(each, "i32")
        for each in kernel.arg_names
    }
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, each in enumerate(kernel.arg_names)
        if signature[each].startswith("*") or each.endswith(("stride", "_block", "_head", "_slot"))
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 2, "enable_fp_fusion": False},
    )
    ptx = compiled.asm["ptx"]
    architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    assembler = ASSEMBLERS / ("ptxas" if capability < 100 else "ptxas-blackwell")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"\d+ bytes spill stores", said)
    assert spills is not None, said
    return (
        f"{spills.group()}, {len(re.findall(r'fma.rn', ptx))} contractions, "
        f"{len(re.findall(r'mma.sync|wgmma.mma_async|tcgen05.mma', ptx))} tensor core instructions"
    )


if __name__ == "__main__":
    for each in KERNELS:
        print(f"{each}: {facts(each, int(sys.argv[1]))}")
