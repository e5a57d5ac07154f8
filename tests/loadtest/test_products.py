"""The comparison of products: all ways compute the same, and it prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F

from loadtest.products import shapes_of, ways_of

WAYS = {"kernel", "kernel_16_bits", "linear", "prepacked", "kernel_int8", "weight_only_int8"}


@torch.no_grad()
def test_all_ways_compute_the_same() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(64, 96, dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(5, 64).to(torch.bfloat16)
    ways = ways_of(linears, compiles=False)
    assert set(ways) == WAYS
    expected = [
        F.linear(x.double(), linear.weight.double(), linear.bias.double()) for linear in linears
    ]
    for name, way in ways.items():
        for got, wanted in zip(way(x), expected, strict=True):
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            assert error < (0.02 if "int8" in name else 0.005), name


def test_the_command_prints_json() -> None:
    options = ["--no-compile", "--repeats", "1", "--rows", "1,3", "--shapes", "64x32"]
    command = [sys.executable, "-m", "loadtest.products", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(done.stdout)["results"]
    assert [(row["outputs"], row["inputs"], row["rows"]) for row in results] == [
        (64, 32, 1),
        (64, 32, 3),
    ]
    assert all(row[way]["median"] > 0 for row in results for way in WAYS)


def test_shapes_are_checked() -> None:
    assert shapes_of("64x32, 3x1") == [(64, 32), (3, 1)]
    for text in ("", "64", "64x0", "64x32x2", "64x32,", "-1x2"):
        with pytest.raises(typer.BadParameter, match="must be OUTPUTSxINPUTS, by commas, got"):
            shapes_of(text)
