from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from weights.training.export import RECIPE
from weights.training.recipe import Recipe, TrainingConfig


def read(tmp_path: Path, text: str, **changes: Any) -> TrainingConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return TrainingConfig.read(path, changes)


def test_the_default_models_file_is_read() -> None:
    config = TrainingConfig.read(RECIPE)
    assert sum(config.weights.values()) == pytest.approx(1)
    assert config.recipe.windows(1024) == (256, 1024)
    assert config.model_config(8192, 8191).head_dim == 64


def test_what_a_file_leaves_out_is_the_default_and_the_command_line_wins(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "[training]\nsteps = 9\nseed = 2\n[model]\nmax_position = 64\nnum_layers = 1\n",
        seed=5,
    )
    assert (config.recipe.steps, config.recipe.seed) == (9, 5)
    assert config.recipe.windows(64) == (16, 64)
    assert config.model_config(300, 299).num_layers == 1
    assert config.model_config(300, 299).num_heads == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nsteps = 0\n", "steps must be an integer of at least 1, got 0"),
        ("[training]\n", "say how long to train"),
        ("[training]\nstep = 9\n", "unknown setting training.step; known: batch_tokens"),
        ("[training]\nsteps = 9\nclip = nan\n", "clip must be a number at least 0, got nan"),
        ("[training]\nsteps = 9\ndecay_share = 1\n", r"decay_share must be a number in \[0, 1\)"),
        ("[training]\nminutes = true\n", "minutes must be a number at least 0, got True"),
        ("[training]\nminutes = 1\nschedule = 'cosine'\n", "schedule cosine needs steps"),
        ("[training]\nsteps = 1\noptimizer = 'sgd'\n", "optimizer must be one of muon, adamw"),
        ("[training]\nsteps = 1\nlength = 2048\n", "length must be at most max_position"),
        ("[training]\nsteps = 1\nbatch_tokens = 8\n", "batch_tokens must hold one window"),
        ("[model]\nvocab_size = 9\n[training]\nsteps = 1\n", "follows from the tokenizer"),
        ("[model]\nlayers = 9\n[training]\nsteps = 1\n", "unknown setting model.layers; known: "),
        ("model = 1\n[training]\nsteps = 1\n", "model must be a table, got 1"),
        ("[data]\nweights = 1\n[training]\nsteps = 1\n", "data.weights must be a table, got 1"),
        (
            "[model]\npairing = 'interleaved'\n[training]\nsteps = 1\n",
            "model.pairing must be 'half'",
        ),
        ("[model]\nhead_bias = true\n[training]\nsteps = 1\n", "model.head_bias must be False"),
        (
            "[model]\nrope = {type = 'ntk', factor = 2}\n[training]\nsteps = 1\n",
            "model.rope must be {'type': 'default'}, which is what is trained; got",
        ),
        ("[training]\nsteps = 1\nbatch_tokens = 5000\n", r"multiple of length \(256\), got 5000"),
        ("[training]\nsteps = 1\nbatch_tokens = 5376\n", r"of long_length \(1024\), .* Next: 5120"),
        (f"[training]\nsteps = 1\nseed = {2**63}\n", "seed must be at most 9223372036854775807"),
        (
            "[training]\nschedule = 'cosine'\nsteps = 100\n",
            r"warmup must be less than steps \(100\) with schedule cosine, got 100",
        ),
        (
            "[training]\nschedule = 'cosine'\nsteps = 200\nminutes = 5\n",
            "minutes must be left out with schedule cosine, which ends by steps; got 5",
        ),
        ("[tokenizer]\nvocab_size = 9\n[training]\nsteps = 1\n", "at least 258, got 9"),
        ("[tokenizer]\nvocab_size = 70000\n[training]\nsteps = 1\n", "at most 65536, got 70000"),
        ("[data]\nheld_out = 0.7\n[training]\nsteps = 1\n", r"in \[0, 0.5\), got 0.7"),
        ("[data.weights]\na = 0\n[training]\nsteps = 1\n", "must not all be 0"),
        ("[date]\n[training]\nsteps = 1\n", r"unknown table \[date\]"),
        ("data = 1\n[training]\nsteps = 1\n", "data must be a table, got 1"),
        ("[training\n", "run.toml: "),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml"):
        TrainingConfig.read(tmp_path / "none.toml")


def test_a_run_goes_on_as_it_began_but_for_its_end(tmp_path: Path) -> None:
    text = "[training]\nsteps = 9\n[data.weights]\na = 1\n[tokenizer]\nvocab_size = 300\n"
    before = read(tmp_path, text)
    assert TrainingConfig.from_tables(before.to_tables(), {}) == before
    read(tmp_path, text, minutes=5.0, steps=20, save_seconds=1).check_resumes(before)
    with pytest.raises(ConfigError, match=r"training.seed was 1 when .* and 2 is asked for"):
        read(tmp_path, text, seed=2).check_resumes(before)
    for old, new, message in (
        ("a = 1", "a = 2", "data.weights was {'a': 1} when this run began, and {'a': 2} is"),
        ("vocab_size = 300", "", "tokenizer.vocab_size was 300 when .*, and None is asked for"),
        ("[data", "[model]\nnum_layers = 2\n[data", "model.num_layers was 6 .* and 2 is asked for"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path, text.replace(old, new)).check_resumes(before)


def test_decay_is_its_share_of_the_whole() -> None:
    recipe = Recipe(steps=1, decay_share=0.2)
    assert 400 * recipe.decay_steps_per_step == pytest.approx(100)
