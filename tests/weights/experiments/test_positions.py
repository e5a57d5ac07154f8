from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from safetensors.torch import load_file

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.attention.causal import CausalAttention
from engine.model.rope import RotaryTable
from engine.scaling import RopeScaling
from weights.corpus.sources import write_documents
from weights.experiments import xpos
from weights.experiments.encodings import (
    ENCODINGS,
    EncodedAttention,
    EncodedGPT2,
    LearnedRotary,
    RelativeBias,
    Rotary,
    turn,
)
from weights.experiments.positions import main, steps_to, summarise
from weights.experiments.small import Laboratory, Plan, Run
from weights.experiments.stretch import Way, engine
from weights.training.loss import token_losses
from weights.training.train import initialise

SAMPLE = Path(__file__).parents[3] / "weights" / "sample.txt"
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


def corpus(folder: Path) -> Path:
    """The same text to train on and to measure with."""
    for split in ("train", "heldout"):
        text = SAMPLE.read_text(encoding="utf-8")
        write_documents(folder / "corpus" / split / "sample.jsonl", [text] * 3)
    return folder / "corpus"


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
    config = replace(CONFIG, rope=RopeScaling(type="xpos"))
    turned = turn(query, key, Rotary(config).turns(0, 48))
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
    work, out = tmp_path / "work", tmp_path / "out"
    folders = ["--corpus", str(corpus(tmp_path)), "--work", str(work), "--out", str(out)]
    small = ["--steps", "3", "--hidden-size", "16", "--length", "192", "--vocab-size", "300"]
    arguments = [*folders, *small, "--seeds", "1", "2", "--rounds", "2"]
    main([*arguments, "--only", "runs"])
    assert not out.exists()
    main(arguments)
    results = json.loads((out / "positions.json").read_text())
    assert {row["encoding"] for row in results["summary"]} == set(ENCODINGS)
    assert all(math.isfinite(row["final_loss"][0]) for row in results["summary"])
    assert results["held_out"]["RoPE"][1].keys() == {"0", "3"}
    rope = next(row for row in results["summary"] if row["encoding"] == "RoPE")
    assert rope["to_rope"] == [0, 0, 0]
    assert "prefers-color-scheme: dark" in (out / "positions.svg").read_text()

    # the same batches and the same start: a run done again is the same run
    run = work / "runs" / "rope-seed-2.json"
    before = json.loads(run.read_text())
    run.unlink()
    main(arguments)
    assert json.loads(run.read_text())["held_out"] == before["held_out"]
    with pytest.raises(ConfigError, match="is of another plan"):
        main([*folders, *small, "--steps", "4"])

    xpos.main(["--work", str(work), "--out", str(out), "--texts", "2", "--seeds", "1", "2"])
    far = json.loads((out / "xpos.json").read_text())
    names = ["RoPE, none", "RoPE, shift"]
    for kind, losses in far["search"].items():
        best = min(losses, key=losses.__getitem__)
        names.append(f"RoPE, {kind}, factor {float(best) if float(best) > 1 else 8:g}")
    assert [*far["results"]] == [*names, "xPos, none", "xPos, shift"]
    assert far["length"] == 8 * 192
    for name in ("RoPE", "xPos"):
        runs = zip(far["results"][f"{name}, none"], far["results"][f"{name}, shift"], strict=True)
        # within the window nothing is shifted
        assert all(a["within"] == pytest.approx(b["within"]) for a, b in runs)


def test_the_engine_serves_what_was_trained_under_xpos(tmp_path: Path) -> None:
    plan = Plan(vocab_size=300, hidden_size=32, length=64, steps=2)
    laboratory = Laboratory(corpus(tmp_path), tmp_path / "work", plan)
    run = Run("xPos", 1, plan)
    # scores as they are after training, where positions matter
    for parameter in run.model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    laboratory.keep(run, "xPos", tmp_path / "model")
    tokens = torch.from_numpy(laboratory.held_out["sample"][:64].astype("int64"))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    run.model.network.load_state_dict(
        {name: tensor.float() for name, tensor in stored.items()}, strict=False
    )
    with torch.no_grad():
        hidden = run.model(tokens[None, :-1], run.attention)
        expected = token_losses(hidden[0], run.model.network.head.weight, tokens[1:])
    llm = engine(tmp_path / "model")
    (nats,) = Way("none").nats(llm, [tokens.tolist()], 64)
    torch.testing.assert_close(torch.tensor(nats), expected, rtol=1e-4, atol=1e-4)


def test_what_an_encoding_has_learned_is_told_against_rope_and_learned_positions() -> None:
    curves = {
        "RoPE": [{0: 9.0, 10: 5.0, 20: 4.0}, {0: 9.0, 10: 5.0, 20: 4.2}],
        "learned absolute": [{0: 9.0, 10: 6.0, 20: 5.0}, {0: 9.0, 10: 6.0, 20: 5.0}],
        "none": [{0: 9.0, 10: 7.0, 20: 6.0}, {0: 9.0, 10: 5.0, 20: 4.1}],
    }
    best, middle, worst = summarise(curves, {})
    assert [row["encoding"] for row in (best, middle, worst)] == [
        "RoPE",
        "learned absolute",
        "none",
    ]
    assert best["level"] == 5.0
    assert best["steps_to_level"] == [10, 10, 10]
    assert worst["to_rope"] == pytest.approx([0.95, -0.1, 2.0])
    assert (worst["steps_to_level"], worst["seeds_that_reach_it"]) == ([10, 10, 10], 1)
