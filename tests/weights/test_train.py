from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.attention.causal import CausalAttention
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from weights.attention import ShortWindowAttention
from weights.evaluate import bits_per_byte
from weights.export import export_weights
from weights.loss import head_loss, token_losses
from weights.optimizer import Schedule
from weights.tokens import Mixture, Tokens
from weights.train import Recipe, Trainer, end_asked_for, run

CONFIG = ModelConfig(
    vocab_size=50,
    padded_vocab_size=64,
    num_layers=2,
    num_heads=2,
    hidden_size=32,
    intermediate_size=64,
    max_position=32,
    rotary_dim=8,
)
RECIPE = Recipe(
    batch_tokens=64,
    length=16,
    long_length=32,
    long_below=0.7,
    warmup=2,
    decay_steps=3,
    steps=4,
    seed=3,
)


def sources() -> dict[str, Tokens]:
    counting = np.arange(600, dtype=np.uint16) % 50
    return {"up": counting, "down": counting[::-1].copy()}


def test_schedule_warms_up_stays_and_decays_to_nothing() -> None:
    open_ended = Schedule(warmup=4)
    assert [open_ended.scale(step) for step in (0, 1, 3, 1000)] == [0.25, 0.5, 1.0, 1.0]
    assert not open_ended.finished(10**6)
    closing = open_ended.ending(100, 10)
    assert [closing.scale(step) for step in (3, 99, 100, 105, 110)] == [1.0, 1.0, 1.0, 0.5, 0.0]
    assert (closing.finished(109), closing.finished(110)) == (False, True)


def test_an_end_asked_for_again_goes_on_from_where_the_rate_is() -> None:
    sooner = Schedule(warmup=1).ending(100, 100).ending(150, 5)
    assert [sooner.scale(step) for step in (150, 151, 155)] == [0.5, 0.4, 0.0]
    later = Schedule(warmup=1).ending(100, 100).ending(150, 500)
    assert (later.scale(150), later.scale(400), later.finished(649)) == (0.5, 0.25, False)


def test_batches_depend_on_seed_and_step_alone() -> None:
    mixture = Mixture(sources(), {"up": 0.5, "down": 0.5}, seed=1)
    inputs, targets = mixture.batch(7, rows=4, length=10)
    again, _ = Mixture(sources(), {"down": 0.5, "up": 0.5}, seed=1).batch(7, rows=4, length=10)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, mixture.batch(8, rows=4, length=10)[0])


def test_head_loss_is_cross_entropy_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 200, 16, generator=generator, requires_grad=True)
    weight = torch.randn(70, 16, generator=generator, requires_grad=True)
    targets = torch.randint(70, (3, 200), generator=generator)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = head_loss(hidden, weight, targets, torch.float32)
    found = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    each = token_losses(hidden.detach().flatten(0, 1), weight.detach(), targets.flatten())
    torch.testing.assert_close(each.mean(), expected.detach())


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = Trainer(CONFIG, RECIPE, sources())
    first = [whole.train_step()["loss"] for _ in range(3)]
    whole.save(tmp_path / "ckpt.pt")
    whole.end_in(3)
    rest = [whole.train_step()["loss"] for _ in range(3)]

    resumed = Trainer(CONFIG, RECIPE, sources())
    resumed.restore(torch.load(tmp_path / "ckpt.pt", weights_only=True))
    assert (resumed.step, resumed.tokens) == (3, 3 * 64)
    resumed.end_in(3)
    assert [resumed.train_step()["loss"] for _ in range(3)] == rest
    assert len({*first, *rest}) == 6


def test_a_run_decays_when_asked_and_leaves_a_model_that_loads(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, RECIPE, sources())
    run(trainer, tmp_path, {"up": sources()["up"]}, every=2, save_seconds=1000)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["length"] for e in entries if "loss" in e] == [16, 16, 16, 16, 16, 32, 32]
    assert [set(e["held_out"]) for e in entries if "held_out" in e] == [{"up"}] * 3

    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    export_weights(checkpoint, tmp_path / "model")
    model = load_model(tmp_path / "model", torch.float32)
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert 0 < bits_per_byte(model, sources()["up"][:100], size=100) < 10


@pytest.mark.parametrize(("request_text", "steps"), [("7\n", 7), ("now", 3), ("", None)])
def test_a_file_asks_for_the_end(tmp_path: Path, request_text: str, steps: int | None) -> None:
    trainer = Trainer(CONFIG, RECIPE, sources())
    assert end_asked_for(tmp_path, trainer) is None
    (tmp_path / "end").write_text(request_text)
    assert end_asked_for(tmp_path, trainer) == steps
    assert end_asked_for(tmp_path, trainer) is None


@pytest.mark.parametrize("time", [1, 24, 600])
def test_short_window_attention_is_causal_attention(time: int) -> None:
    table = RotaryTable.for_model(CONFIG, 600)
    qkv = torch.randn(2, time, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ShortWindowAttention(table, 2)(0, qkv), CausalAttention(table, 2)(0, qkv)
    )
