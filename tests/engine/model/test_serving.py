"""A model made ready to serve computes what gpt2.py says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import Quantize
from engine.errors import ConfigError
from engine.model import library
from engine.model.attention.reference import NaiveAttention
from engine.model.cpu_linear import PanelEmbedding
from engine.model.rope import RotaryTable
from engine.model.serving import FusedStack, fuse, prepare
from tests.engine.model.test_exactness import SWITCHES
from tests.models import random_model, tiny_config


@pytest.mark.parametrize("switches", [*SWITCHES, "plain"])
@pytest.mark.parametrize(
    ("dtype", "quantize", "bound"),
    [
        (torch.float32, "none", 1e-5),
        (torch.bfloat16, "none", 0.02),
        (torch.float32, "int8", 0.1),
        (torch.bfloat16, "int8", 0.1),
    ],
)
def test_a_fused_model_computes_the_same(
    switches: str, dtype: torch.dtype, quantize: Quantize, bound: float
) -> None:
    model = random_model(tiny_config(**SWITCHES.get(switches, {}))).to(dtype)
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    token_ids = torch.arange(40)
    expected = copy.deepcopy(model).double()
    reference = expected.logits(expected(token_ids, attention))
    fuse(model, quantize)
    assert [type(each) for each in model.blocks] == [FusedStack]
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    actual = model.logits(model(token_ids, attention))
    assert actual.dtype == torch.float32
    error = (actual - reference).norm() / reference.norm()
    assert error < bound


def test_without_a_kernel_torch_serves_and_int8_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    library.load_library.cache_clear()
    try:
        with pytest.raises(ConfigError, match="quantize int8 needs the compiled kernel"):
            prepare(random_model(tiny_config()), "int8")
        assert "without a C++ compiler" in prepare(random_model(tiny_config()))
    finally:
        library.load_library.cache_clear()


def test_the_products_are_named() -> None:
    best = library.supported_variants("linear")[0]
    assert prepare(random_model(tiny_config())) == f"cpu-{best}"
    assert prepare(random_model(tiny_config()), "int8") == f"cpu-{best}, int8"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_tied_weight_is_held_once(tied: bool, quantize: Quantize) -> None:
    model = random_model(tiny_config(tie_embeddings=tied))
    expected = model.embedding.weight.detach().clone()
    fuse(model, quantize)
    shared = isinstance(model.embedding, PanelEmbedding)
    assert shared == (tied and quantize == "none")
    assert torch.equal(model.embedding(torch.arange(len(expected))), expected)
