"""What an encoding costs: time per training step, and per decoded token with a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from weights.corpus.tokens import Mixture, Tokens
from weights.experiments.encodings import ENCODINGS, SAME_COST, EncodedAttention
from weights.experiments.small import Plan, Run, held_out_block

WARM = 2
"""Rounds that are not counted."""


@torch.no_grad()
def decode_seconds(run: Run, prompt: torch.Tensor, repeats: int) -> list[float]:
    """Seconds per token, one sequence, float32, with the cache nearly full.

    prompt: int64 [1, length - repeats]
    """
    attention = EncodedAttention(run.model.encoding, cached=True)
    hidden = run.model(prompt, attention)[:, -1:]
    seconds = []
    for _ in range(repeats):
        token = run.model.network.logits(hidden).argmax(-1)
        began = time.perf_counter()
        hidden = run.model(token, attention)
        seconds.append(time.perf_counter() - began)
    return seconds


def times(
    plan: Plan,
    mixture: Callable[[int], Mixture],
    held_out: dict[str, Tokens],
    lengths: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    """Milliseconds per training step and per decoded token, encodings taking turns in each round.

    By length of window, then by encoding; all repetitions, so that the spread is there to see.
    """
    results: dict[str, Any] = {}
    for length in lengths:
        longer = replace(plan, length=length, held_out_windows=len(held_out))
        block = held_out_block(held_out, longer)
        runs = {name: Run(name, 1, longer) for name in ENCODINGS if name not in SAME_COST}
        training: dict[str, list[float]] = {name: [] for name in runs}
        decoding: dict[str, list[float]] = {name: [] for name in runs}
        tokens = min(32, length // 4)
        for repeat in tqdm(range(rounds + WARM), desc=f"windows of {length}", unit=" rounds"):
            for name, run in runs.items():
                began = time.perf_counter()
                run.train_step(repeat, mixture(1))
                training[name].append(time.perf_counter() - began)
                decoding[name] += decode_seconds(run, block[:1, : length - tokens], tokens)
        results[str(length)] = {
            name: {
                "train_step_ms": [round(1000 * s, 2) for s in training[name][WARM:]],
                "decode_ms": [round(1000 * s, 3) for s in decoding[name][WARM * tokens :]],
            }
            for name in runs
        }
    return results
