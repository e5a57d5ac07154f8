"""Bits per byte of held-out text: what a model of this tokenizer would compress it to.

python -m weights.training.evaluate --corpus DIR --model MODEL_DIR
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tqdm import tqdm

from engine.config import ModelConfig
from engine.frontend.tokenizer import Tokenizer
from engine.model.attention.causal import CausalAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from weights.corpus.sources import read_documents
from weights.corpus.tokens import Tokens, encode_documents
from weights.training.loss import token_losses


@torch.no_grad()
def total_nats(model: GPT2, tokens: Tokens, name: str = "") -> float:
    """Sum of -ln p over all tokens but the first; windows of the whole context, no overlap.

    A window starts with nothing before it, so its first tokens are dear: the figure is an upper
    bound of what a sliding context would give.
    """
    config: ModelConfig = model.config
    attention = CausalAttention(RotaryTable.for_model(config), config.num_heads)
    total = 0.0
    for start in tqdm(range(0, len(tokens) - 1, config.max_position), desc=name, unit=" windows"):
        window = torch.from_numpy(tokens[start : start + config.max_position + 1].astype("int64"))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(window[None, :-1], attention)[0]
        losses = token_losses(hidden.bfloat16(), model.head.weight, window[1:])
        total += losses.double().sum().item()
    return total


def bits_per_byte(model: GPT2, tokens: Tokens, size: int, name: str = "") -> float:
    """Bits per byte of a text of `size` bytes; its end-of-text tokens are paid for too."""
    return total_nats(model, tokens, name) / size / math.log(2)


def evaluate(model_dir: Path, corpus: Path) -> dict[str, float]:
    """Held-out bits per byte of each source."""
    model = load_model(model_dir, torch.float32)
    tokenizer = Tokenizer.from_directory(model_dir)
    results = {}
    for path in sorted((corpus / "heldout").glob("*.jsonl")):
        documents = read_documents(path)
        size = sum(len(document.encode()) for document in documents)
        tokens = encode_documents(tokenizer, documents)
        results[path.stem] = bits_per_byte(model, tokens, size, path.stem)
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m weights.training.evaluate", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="what weights.corpus wrote")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    options = parser.parse_args()
    for name, bits in evaluate(options.model, options.corpus).items():
        print(f"{name:12} {bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
