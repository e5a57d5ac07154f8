"""How far can a trained context be stretched? Perplexity against position, by the engine itself.

    python -m weights.experiments.context --corpus DIR --out DIR [--model MODEL_DIR]
    python -m weights.experiments.context ... --fine-tune 40    # and after a short fine-tune

Scores held-out text that is `--times` as long as the model's context, through the serving engine:
with no scaling at all, with position interpolation, NTK-aware scaling, dynamic NTK, YaRN and xPos
(which the model was not trained with), and with `overflow: shift`, whose context stays as it is.

Fine-tuning follows the papers' protocol (Chen et al. 2023, arXiv 2306.15595): the model is trained
a little further at the stretched positions, on whole windows of the new length, once per scaling
that is not dynamic. Writes context.json, context.png and context.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from engine import LLM, RequestOptions
from engine.config import ModelConfig
from engine.frontend.tokenizer import Tokenizer
from engine.model.attention.causal import CausalAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model, read_config
from engine.model.rope import RopeProfile, RotaryTable, inverse_frequencies
from engine.scaling import RopeScaling
from weights.corpus import read_documents
from weights.experiments.picture import draw_curves
from weights.export import export_weights
from weights.loss import head_loss
from weights.optimizer import Optimizer
from weights.tokens import Mixture, Tokens, encode_documents

DEFAULT = Path(__file__).parents[1] / "default"
PARTS = 32
"""Stretches of positions whose mean is a point of the picture."""

TYPES = ("linear", "ntk", "dynamic", "yarn", "xpos")
TUNED = ("linear", "ntk", "yarn")
LEARNING_RATE = 3e-4


def heldout_tokens(corpus: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of every held-out source, in a row."""
    return [
        encode_documents(tokenizer, read_documents(path)).tolist()
        for path in sorted((corpus / "heldout").glob("*.jsonl"))
    ]


def stretches(sources: Sequence[list[int]], length: int, count: int) -> list[list[int]]:
    """`count` texts of `length` tokens and one, from all sources in turn, evenly spaced.

    Raises ValueError where no source is so long.
    """
    long = [tokens for tokens in sources if len(tokens) > length]
    if not long:
        raise ValueError(f"no held-out source has more than {length} tokens")
    texts = []
    for number in range(count):
        tokens, turn = long[number % len(long)], number // len(long)
        turns = max(1, -(-count // len(long)))
        start = turn * ((len(tokens) - length - 1) // turns)
        texts.append(tokens[start : start + length + 1])
    return texts


def unscaled_copy(model_dir: Path, folder: Path, times: int) -> Path:
    """The same model, declared to have been trained so many times as far: no scaling at all."""
    for path in model_dir.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config["max_position"] *= times
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def engine(model_dir: Path) -> LLM:
    """One sequence at a time: memory is for its length."""
    return LLM(model_dir, device="cpu", kv_memory=512 * 2**20, max_num_seqs=1)


def nats(
    llm: LLM, texts: Sequence[list[int]], rope: RopeScaling | None, options: RequestOptions
) -> list[list[float]]:
    """-ln p of each token but the first, by text; float [texts][length]."""
    scores = llm.score(list(texts), options, rope=rope)
    return [[-each.logprob for each in score.logprobs] for score in scores]


def by_position(losses: Sequence[Sequence[float]]) -> list[float]:
    """Perplexity of each of PARTS stretches of positions, over all texts."""
    parts = np.array_split(np.array(losses), PARTS, axis=1)
    return [float(np.exp(part.mean())) for part in parts]


def summary(losses: Sequence[Sequence[float]], trained: int) -> dict[str, float]:
    """Perplexity within the trained context, beyond it, and in its last stretch."""
    values = np.array(losses)
    last = by_position(losses)[-1]
    return {
        "within": float(np.exp(values[:, :trained].mean())),
        "beyond": float(np.exp(values[:, trained:].mean())),
        "last": last,
    }


def fine_tuned(
    model_dir: Path, sources: Mapping[str, Tokens], scaling: RopeScaling, steps: int
) -> dict[str, Any]:
    """A checkpoint of the model after some steps at the stretched positions, one window each.

    AdamW at a tenth of the training's peak, falling to 0.
    """
    config = read_config(model_dir)
    model = load_model(model_dir, torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_()
    length = scaling.context(config.max_position)
    inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
    profile = RopeProfile.build(scaling, inv_freq, config.max_position, config.rope_base)
    table = RotaryTable.build(profile.inv_freq, length, factor=profile.attention_factor)
    attention = CausalAttention(table, config.num_heads)
    optimizer = Optimizer(model, LEARNING_RATE, kind="adamw")
    mixture = Mixture(sources, {name: float(len(t)) for name, t in sources.items()}, seed=1)
    for step in tqdm(range(steps), desc=f"fine-tune {scaling.type}", unit=" steps"):
        loss = _loss(model, attention, *mixture.batch(step, 1, length))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1 - step / steps)
    return {"config": config.to_dict(), "model": model.state_dict()}


def _loss(
    model: GPT2, attention: CausalAttention, token_ids: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(token_ids, attention)
    return head_loss(hidden, model.head.weight, targets, torch.bfloat16)


def measure(
    model_dir: Path, texts: Sequence[list[int]], times: int, config: ModelConfig
) -> dict[str, Any]:
    """Every way to stretch the model as it is."""
    results: dict[str, Any] = {}

    def note(name: str, losses: list[list[float]], began: float) -> None:
        results[name] = summary(losses, config.max_position) | {
            "by_position": by_position(losses),
            "seconds": round(time.monotonic() - began, 1),
        }

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        llm = engine(unscaled_copy(model_dir, Path(folder), times))
        note("none", nats(llm, texts, None, RequestOptions()), began)
    llm = engine(model_dir)
    for kind in tqdm(TYPES, desc="scalings"):
        began = time.monotonic()
        rope = RopeScaling.from_dict({"type": kind, "factor": times})
        note(kind, nats(llm, texts, rope, RequestOptions()), began)
    began = time.monotonic()
    note("shift", nats(llm, texts, None, RequestOptions(overflow="shift")), began)
    return results


def measure_tuned(
    model_dir: Path,
    texts: Sequence[list[int]],
    times: int,
    steps: int,
    sources: Mapping[str, Tokens],
) -> dict[str, Any]:
    """The scalings after a fine-tune of their own."""
    results: dict[str, Any] = {}
    trained = read_config(model_dir).max_position
    for kind in TUNED:
        rope = RopeScaling.from_dict({"type": kind, "factor": times})
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tuned = Path(folder)
            for path in model_dir.glob("tokenizer*"):
                (tuned / path.name).symlink_to(path.resolve())
            export_weights(fine_tuned(model_dir, sources, rope, steps), tuned)
            losses = nats(engine(tuned), texts, rope, RequestOptions())
        results[f"{kind}, fine-tuned"] = summary(losses, trained) | {
            "by_position": by_position(losses),
            "seconds": round(time.monotonic() - began, 1),
            "steps": steps,
        }
    return results


def table(results: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Perplexity of {document['texts']} held-out texts of {document['length']:,} tokens, "
        f"{document['times']} times the trained context of {document['trained']:,}.",
        "",
        "| scaling | within the trained context | beyond it | in the last "
        f"{document['length'] // PARTS} positions |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['within']:.1f} | {row['beyond']:.1f} | {row['last']:.1f} |"
        for name, row in results.items()
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.experiments.context")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="what weights.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", type=Path, default=DEFAULT, help="default: the shipped model")
    parser.add_argument("--times", type=int, default=8, help="how far to stretch")
    parser.add_argument("--texts", type=int, default=4, help="how many texts")
    parser.add_argument("--fine-tune", type=int, default=0, help="steps; 0: none")
    options = parser.parse_args(arguments)
    config = read_config(options.model)
    length = options.times * config.max_position
    tokenizer = Tokenizer.from_directory(options.model)
    texts = stretches(heldout_tokens(options.corpus, tokenizer), length - 1, options.texts)
    options.out.mkdir(parents=True, exist_ok=True)
    results = measure(options.model, texts, options.times, config)
    if options.fine_tune:
        sources = {
            path.stem: encode_documents(tokenizer, read_documents(path))
            for path in sorted((options.corpus / "train").glob("*.jsonl"))
        }
        sources = {name: tokens for name, tokens in sources.items() if len(tokens) > length}
        results |= measure_tuned(options.model, texts, options.times, options.fine_tune, sources)
    document = {
        "texts": len(texts),
        "length": length,
        "times": options.times,
        "trained": config.max_position,
        "results": results,
    }
    (options.out / "context.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    text = table(results, document)
    (options.out / "context.md").write_text(text, encoding="utf-8")
    print(text)
    at = [(part + 0.5) * length / PARTS for part in range(PARTS)]
    curves = {name: [[math.log(p) for p in row["by_position"]]] for name, row in results.items()}
    plain = statistics.median(math.log(row["within"]) for row in results.values())
    draw_curves(
        curves,
        options.out / "context.png",
        f"position (trained: {config.max_position:,})",
        "ln perplexity",
        at=at,
        highest=plain + 3.5,
    )


if __name__ == "__main__":
    main()
