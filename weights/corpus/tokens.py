"""Token files: a source's documents as one array of uint16, each closed by the end of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.frontend.tokenizer import Tokenizer
from weights.tokenizer.vocabulary import END_OF_TEXT

Tokens = npt.NDArray[np.uint16]


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> Tokens:
    """All documents in a row, uint16 [tokens]."""
    end = tokenizer.special_tokens[END_OF_TEXT]
    ids = ([*tokenizer.encode(document), end] for document in documents)
    return np.concatenate([np.array(document, dtype=np.uint16) for document in ids])


def open_tokens(folder: Path) -> dict[str, Tokens]:
    """Memory maps of every source of a split, by name."""
    files = sorted(folder.glob("*.bin"))
    return {path.stem: np.memmap(path, dtype=np.uint16, mode="r") for path in files}


@dataclass(frozen=True)
class Mixture:
    """Windows drawn from several sources by weight.

    A batch is a function of (seed, step) alone, so a resumed run sees what it would have seen.
    """

    sources: Mapping[str, Tokens]
    weights: Mapping[str, float]
    seed: int

    def batch(self, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [rows, length] each; targets are the inputs one token on."""
        random = np.random.default_rng((self.seed, step))
        names = sorted(self.weights)
        share = np.array([self.weights[name] for name in names])
        picks = random.choice(len(names), size=rows, p=share / share.sum())
        windows = np.empty((rows, length + 1), dtype=np.int64)
        for row, pick in enumerate(picks):
            tokens = self.sources[names[pick]]
            start = random.integers(0, len(tokens) - length)
            windows[row] = tokens[start : start + length + 1]
        block = torch.from_numpy(windows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()
