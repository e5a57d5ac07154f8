"""LitGPT's own network and its own files: the logits that it computes are ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tests.models import write_tokenizer
from tests.weights.checkpoints import TOKENS, logits
from weights.convert import convert

SPEC = find_spec("litgpt")
pytestmark = pytest.mark.skipif(SPEC is None, reason="needs: pip install --no-deps litgpt")

SHAPE: dict[str, Any] = {
    "name": "tiny",
    "block_size": 192,
    "vocab_size": 267,
    "padded_vocab_size": 288,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "rotary_percentage": 0.25,
}


@pytest.fixture(scope="module")
def litgpt() -> Iterator[ModuleType]:
    """litgpt.model, without litgpt/__init__.py and a script, which would want all of Lightning."""
    assert SPEC is not None
    package, scripts = ModuleType("litgpt"), ModuleType("litgpt.scripts")
    package.__path__ = list(SPEC.submodule_search_locations or ())
    script = ModuleType("litgpt.scripts.convert_hf_checkpoint")
    script.__dict__["qkv_reassemble"] = None  # only for checkpoints from before 2025
    stubs = {each.__name__: each for each in (package, scripts, script)}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        yield import_module("litgpt.model")
        for name in ("litgpt.model", "litgpt.config"):
            patch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "changes",
    [
        {},  # as Pythia
        {"parallel_residual": False, "gelu_approximate": "tanh", "rotary_percentage": 1.0},
        {"shared_attention_norm": True, "lm_head_bias": True, "rope_base": 1000},
        {"norm_class_name": "RMSNorm", "bias": False, "norm_eps": 1e-6, "rotary_percentage": 0.5},
    ],
    ids=["Pythia", "sequential", "one norm", "RMS norms"],
)
@pytest.mark.parametrize("nested", [False, True], ids=["pretrained", "finetuned"])
def test_logits(litgpt: ModuleType, tmp_path: Path, changes: dict[str, Any], nested: bool) -> None:
    config = litgpt.Config(**SHAPE | changes)
    torch.manual_seed(0)
    model = litgpt.GPT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    source = tmp_path / "source"
    source.mkdir()
    state = model.state_dict()
    torch.save({"model": state} if nested else state, source / "lit_model.pth")
    (source / "model_config.yaml").write_text(yaml.dump(asdict(config)))
    # Its converter and its trainers copy Hugging Face's settings along.
    (source / "config.json").write_text('{"model_type": "gpt_neox", "rotary_pct": 1.0}')
    write_tokenizer(source)
    converted = convert(source, tmp_path / "out")
    assert converted.why["rope_base"] == "model_config.yaml: rope_base"
    expected = model(TOKENS[None])[0]
    ours = logits(tmp_path / "out")
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
