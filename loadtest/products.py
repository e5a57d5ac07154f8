"""`python -m loadtest.products`: weight products by the kernel beside PyTorch's, as JSON.

All take turns in one process, so that whatever else the machine does falls on all of them. Each
goes through as many weights as a model has layers: the next is in no cache when it is needed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
import torch._inductor.config
import typer
from torch import Tensor, nn

from engine.model.cpu_linear import KernelLinear, WeightMemory, quantize_rows
from engine.model.linear import PackedProduct
from loadtest.bench.options import counts
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.turns import in_turns

Way = Callable[[Tensor], list[Tensor]]
"""From rows [num_rows, in_features], through the products of all layers, one after the other."""


class Layers(nn.Module):
    """Products that all take the same rows."""

    def __init__(self, products: Sequence[nn.Module]) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each gives."""
        return [product(x) for product in self.products]


class WeightOnly(nn.Module):
    """PyTorch's product of bfloat16 rows and int8 weights, which become bfloat16 on the way."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, scale = quantize_rows(linear.weight)
        self.scale, self.bias = scale.to(linear.weight.dtype), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[num_rows, in_features] -> [num_rows, out_features]"""
        return torch._weight_int8pack_mm(x, self.weight, self.scale).add_(self.bias)


def ways_of(linears: Sequence[nn.Linear], *, compiles: bool) -> dict[str, Way]:
    """The products by each way. `kernel` reads bfloat16 from 12 bits, `kernel_16_bits` from 16."""
    memory = WeightMemory()
    packed = [PackedProduct(linear, None) for linear in linears]
    ways: dict[str, Way] = {
        "kernel": Layers([KernelLinear(linear, memory) for linear in linears]),
        "kernel_16_bits": Layers(
            [KernelLinear(linear, memory, twelve_bits=False) for linear in linears]
        ),
        "linear": Layers(linears),
        "prepacked": lambda x: [product(x) for product in packed],
        "kernel_int8": Layers(
            [KernelLinear(linear, memory, weight_format="int8") for linear in linears]
        ),
        "weight_only_int8": Layers([WeightOnly(linear) for linear in linears]),
    }
    if compiles:
        torch._dynamo.reset()  # it compiles the same code for few shapes, and gives up then
        ways["compiled"] = torch.compile(Layers(linears), dynamic=False)
    return ways


def shapes_of(text: str) -> list[tuple[int, int]]:
    """(outputs, inputs), each from 1, of 64x32,128x32. typer.BadParameter for anything else."""
    shapes = []
    for part in text.split(","):
        shape = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", part.strip())
        if shape is None:
            raise typer.BadParameter(f"must be OUTPUTSxINPUTS, by commas, got {part!r}")
        shapes.append((int(shape[1]), int(shape[2])))
    return shapes


def main(
    shapes: Annotated[
        Any, typer.Option(parser=shapes_of, metavar="OxI,...", help="Outputs x inputs, by commas.")
    ] = "2304x768,768x768,3072x768,768x3072",
    rows: Annotated[
        Any, typer.Option(parser=counts, metavar="N,...", help="Numbers of rows, by commas.")
    ] = "1,8,32,128,512",
    layers: Annotated[int, typer.Option(help="Weights of each shape.", min=1)] = 12,
    repeats: Annotated[int, typer.Option(help="Samples of each; the median counts.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="Threads of all.", min=1)] = 2,
    compiles: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="With torch.compile, tuned for each case."),
    ] = True,
) -> None:
    """Milliseconds that the products of all layers take, by each way."""
    torch.set_num_threads(threads)
    machine, others = Machine.measure(threads), Others()
    generator = torch.Generator().manual_seed(0)
    results: list[dict[str, Any]] = []
    with (
        torch.no_grad(),
        torch._inductor.config.patch(freezing=True, max_autotune=True),  # its best
    ):
        for outputs, inputs in shapes:
            linears = [nn.Linear(inputs, outputs, dtype=torch.bfloat16) for _ in range(layers)]
            ways = ways_of(linears, compiles=compiles)
            for count in rows:
                x = torch.randn(count, inputs, generator=generator).to(torch.bfloat16)
                times = in_turns({name: partial(way, x) for name, way in ways.items()}, repeats)
                results.append({"outputs": outputs, "inputs": inputs, "rows": count, **times})
                medians = {name: each["median"] for name, each in times.items()}
                print(f"{outputs}x{inputs}, {count} rows:", medians, file=sys.stderr)
    document = {
        "command": "products",
        "machine": asdict(machine),
        "layers": layers,
        "repeats": repeats,
        "results": results,
        "load": others.document(),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    typer.run(main)
