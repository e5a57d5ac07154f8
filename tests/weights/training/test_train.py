from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.attention.causal import CausalAttention
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from weights.corpus.tokens import Mixture, Tokens
from weights.training.attention import ShortWindowAttention
from weights.training.curve import stretches
from weights.training.evaluate import bits_per_byte
from weights.training.export import export_weights
from weights.training.loss import head_loss, token_losses
from weights.training.optimizer import Schedule
from weights.training.recipe import Recipe
from weights.training.train import Trainer, end_asked_for, load_checkpoint, run, trim_log

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
    decay_share=0.4,
    steps=7,
    seed=3,
    evaluate_every=2,
    save_seconds=1000,
)


class Listener:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.ends: list[int | None] = []
        self.held_out: list[Mapping[str, Any]] = []
        self.messages: list[str] = []

    def stepped(self, values: Mapping[str, Any], end: int | None) -> None:
        self.ends.append(end)

    def measured(self, values: Mapping[str, Any]) -> None:
        self.held_out.append(values["held_out"])

    def told(self, message: str) -> None:
        self.messages.append(message)


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
    listener, saves = Listener(), []
    run(trainer, tmp_path, {"up": sources()["up"]}, listener, lambda: saves.append(trainer.step))
    assert (listener.ends, saves) == ([None] * 4 + [7] * 3, [7])
    assert listener.messages == ["step 4: ends in 3 steps"]
    assert [set(losses) for losses in listener.held_out] == [{"up"}] * 3
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["length"] for e in entries if "loss" in e] == [16, 16, 16, 16, 16, 32, 32]
    assert [set(e["held_out"]) for e in entries if "held_out" in e] == [{"up"}] * 3

    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    export_weights(checkpoint, tmp_path / "model")
    model = load_model(tmp_path / "model", torch.float32)
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert 0 < bits_per_byte(model, sources()["up"][:100], size=100) < 10


@pytest.mark.parametrize(("request_text", "steps"), [("7\n", 7), ("now", 2), ("", None)])
def test_a_file_asks_for_the_end(tmp_path: Path, request_text: str, steps: int | None) -> None:
    trainer, listener = Trainer(CONFIG, RECIPE, sources()), Listener()
    trainer.step = 3
    assert end_asked_for(tmp_path, trainer, listener) is None
    (tmp_path / "end").write_text(request_text)
    assert end_asked_for(tmp_path, trainer, listener) == steps
    assert end_asked_for(tmp_path, trainer, listener) is None
    assert not listener.messages


@pytest.mark.parametrize("request_text", ["soon", "-5", "0", "1e3"])
def test_an_end_that_is_no_end_is_told_and_the_run_goes_on(
    tmp_path: Path, request_text: str
) -> None:
    trainer, listener = Trainer(CONFIG, RECIPE, sources()), Listener()
    (tmp_path / "end").write_text(request_text)
    assert end_asked_for(tmp_path, trainer, listener) is None
    (message,) = listener.messages
    assert f"must be a number of steps, at least 1, or `now`; got '{request_text}'" in message
    assert not (tmp_path / "end").exists()


def test_minutes_include_the_decay(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=None, minutes=10.0, decay_share=0.2)
    trainer = Trainer(CONFIG, recipe, sources())
    trainer.step, trainer.busy = 400, 479.0
    assert end_asked_for(tmp_path, trainer, Listener()) is None
    trainer.busy = 480.0
    assert end_asked_for(tmp_path, trainer, Listener()) == 100


def test_a_cosine_falls_from_the_warm_up_to_the_last_step() -> None:
    schedule = Schedule.of(replace(RECIPE, schedule="cosine", steps=102))
    assert [schedule.scale(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert schedule.scale(27) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule.scale(52) == pytest.approx(0.5)
    assert schedule.scale(102) == 0
    assert (schedule.end, schedule.finished(101), schedule.finished(102)) == (102, False, True)


def test_adamw_alone_equals_pytorchs_on_all_parameters() -> None:
    ours = Trainer(CONFIG, replace(RECIPE, optimizer="adamw"), sources())
    theirs = Trainer(CONFIG, RECIPE, sources())
    matrices = [p for n, p in theirs.model.named_parameters() if p.ndim == 2 and "blocks" in n]
    others = [p for n, p in theirs.model.named_parameters() if p.ndim < 2 or "blocks" not in n]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=RECIPE.learning_rate / 2,  # the first step of two of warming up
        betas=(0.9, 0.95),
    )
    ours.train_step()
    theirs.loss(*theirs.mixture.batch(0, 4, 16)).backward()
    torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 1.0)
    adamw.step()
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict())


def test_a_source_smaller_than_a_window_is_refused() -> None:
    small = {"up": sources()["up"], "few": np.zeros(32, np.uint16)}
    with pytest.raises(ConfigError, match="source few has 32 tokens: too few for a window of 32"):
        Trainer(CONFIG, RECIPE, small)


def test_what_is_stopped_leaves_a_checkpoint_and_goes_on_exactly(tmp_path: Path) -> None:
    def asked() -> bool:
        return trainer.step == 3

    saves: list[int] = []
    trainer = Trainer(CONFIG, RECIPE, sources())
    done = run(trainer, tmp_path, {}, Listener(), lambda: saves.append(trainer.step), asked)
    assert (done, saves) == (False, [3])
    trainer = Trainer(CONFIG, RECIPE, sources())
    trainer.restore(load_checkpoint(tmp_path / "ckpt.pt"))
    assert run(trainer, tmp_path, {}, Listener(), lambda: None)
    assert run(Trainer(CONFIG, RECIPE, sources()), tmp_path / "..", {}, Listener(), lambda: None)
    log, whole = (tmp_path / "log.jsonl").read_text(), (tmp_path / ".." / "log.jsonl").read_text()
    both = [[json.loads(line)["loss"] for line in each.splitlines()] for each in (log, whole)]
    assert both[0] == both[1]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    trainer = Trainer(CONFIG, replace(RECIPE, learning_rate=1e30), sources())
    with pytest.raises(ConfigError, match=r"the loss is \w+ after step \d: learning_rate must be "):
        run(trainer, tmp_path, {}, Listener(), lambda: None)
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [f'{{"loss": 1, "step": {step}}}\n' for step in range(1, 6)]
    path.write_text("".join(lines) + '{"loss": 1, "st')  # killed as it wrote
    trim_log(path, 5)
    assert path.read_text() == "".join(lines)
    trim_log(path, 3)
    assert path.read_text() == "".join(lines[:3])
    trim_log(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_checkpoint_that_was_cut_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "ckpt.pt"
    Trainer(CONFIG, RECIPE, sources()).save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"ckpt.pt cannot be read as a checkpoint: "):
        load_checkpoint(path)


def test_an_end_that_comes_too_late_is_refused() -> None:
    trainer = Trainer(CONFIG, RECIPE, sources())
    trainer.step = 4
    state = trainer.checkpoint()
    longer = Trainer(CONFIG, replace(RECIPE, steps=70), sources())
    longer.restore(state)  # the learning rate still stays
    trainer.end_in(3)
    with pytest.raises(ConfigError, match=r"steps is 70, and was 7 when .* fall, at step 4"):
        longer.restore(trainer.checkpoint())


def test_a_checkpoint_of_another_network_is_refused() -> None:
    state = Trainer(CONFIG, RECIPE, sources()).checkpoint()
    other = Trainer(replace(CONFIG, num_heads=4), RECIPE, sources())
    with pytest.raises(ConfigError, match="the checkpoint's num_heads is 2, and 4 is asked for"):
        other.restore(state)


@pytest.mark.parametrize("time", [1, 24, 600])
def test_short_window_attention_is_causal_attention(time: int) -> None:
    table = RotaryTable.for_model(CONFIG, 600)
    qkv = torch.randn(2, time, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ShortWindowAttention(table, 2)(0, qkv), CausalAttention(table, 2)(0, qkv)
    )


def test_stretches_are_first_and_last_places() -> None:
    assert stretches([True, False, True, True]) == [(0, 0), (2, 3)]
    assert stretches([False]) == []
