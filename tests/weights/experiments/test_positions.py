from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding

from engine.config import ModelConfig
from engine.model.attention.causal import CausalAttention
from engine.model.rope import RotaryTable
from weights.experiments.encodings import (
    ENCODINGS,
    EncodedAttention,
    EncodedGPT2,
    LearnedRotary,
    RelativeBias,
    Rotary,
)
from weights.experiments.positions import main, steps_to
from weights.train import initialise

CONFIG = ModelConfig(
    vocab_size=40,
    padded_vocab_size=40,
    num_layers=2,
    num_heads=2,
    hidden_size=32,
    intermediate_size=64,
    max_position=48,
    rotary_dim=16,
)


@pytest.mark.parametrize("name", ENCODINGS)
def test_decoding_with_a_cache_is_the_whole_forward(name: str) -> None:
    model = EncodedGPT2(CONFIG, ENCODINGS[name](CONFIG))
    initialise(model.network, 1)
    if isinstance(model.encoding, RelativeBias):
        torch.nn.init.normal_(model.encoding.weight)
    token_ids = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(token_ids, EncodedAttention(model.encoding))
        cached = EncodedAttention(model.encoding, cached=True)
        parts = [model(token_ids[:, :20], cached)]
        parts += [model(token_ids[:, at : at + 1], cached) for at in range(20, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_rope_is_the_engines_and_xpos_the_librarys() -> None:
    qkv = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    ours = EncodedAttention(Rotary(CONFIG))(0, qkv)
    table = RotaryTable.for_model(CONFIG)
    torch.testing.assert_close(ours, CausalAttention(table, 2)(0, qkv))
    query, key = torch.randn(2, 1, 2, 48, 16, generator=torch.Generator().manual_seed(1))
    turned = Rotary(CONFIG, "xpos").turn(query, key, 0)
    library = RotaryEmbedding(16, use_xpos=True)
    # pairs stand side by side there, and half a head apart here
    apart = torch.arange(16).view(8, 2).T.flatten()
    back = apart.argsort()
    theirs = library.rotate_queries_and_keys(query[..., back], key[..., back])
    scores = turned[0] @ turned[1].transpose(-1, -2)
    expected = theirs[0] @ theirs[1].transpose(-1, -2)
    torch.testing.assert_close(scores.tril(), expected.tril(), rtol=1e-4, atol=1e-4)


def test_learned_frequencies_get_gradients() -> None:
    encoding = LearnedRotary(CONFIG)
    qkv = torch.randn(1, 12, 96, generator=torch.Generator().manual_seed(0))
    EncodedAttention(encoding)(0, qkv).square().sum().backward()
    assert encoding.inv_freq.grad is not None
    assert encoding.inv_freq.grad.abs().min() > 0


def test_relative_bias_has_t5s_buckets() -> None:
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"max_position": 400})
    distances = torch.arange(400)
    expected = transformers.T5Attention._relative_position_bucket(
        -distances, bidirectional=False, num_buckets=32, max_distance=128
    )
    assert torch.equal(RelativeBias(config).bucket, expected)


def test_steps_are_read_between_measurements() -> None:
    curve = {0: 9.0, 20: 7.0, 40: 6.0}
    assert steps_to(curve, 6.5) == pytest.approx(30)
    assert steps_to(curve, 9.5) == 0
    assert steps_to(curve, 5.0) is None


def test_the_experiment_runs_and_goes_on(tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        (np.arange(3000) % 50).astype(np.uint16).tofile(tmp_path / split / "counting.bin")
    small = ["--steps", "3", "--seeds", "2", "--hidden-size", "16", "--length", "32"]
    arguments = ["--tokens", str(tmp_path), "--out", str(tmp_path / "out"), *small]
    main(arguments)
    path = tmp_path / "out" / "positions.json"
    results = json.loads(path.read_text())
    assert {row["encoding"] for row in results["summary"]} == set(ENCODINGS)
    assert all(math.isfinite(row["final_loss"]) for row in results["summary"])
    assert (tmp_path / "out" / "positions.png").stat().st_size > 1000
    del results["runs"]["RoPE"]["2"]
    path.write_text(json.dumps(results))
    main(arguments)
    again = json.loads(path.read_text())
    assert again["runs"]["RoPE"]["2"]["held_out"].keys() == {"0", "3"}
