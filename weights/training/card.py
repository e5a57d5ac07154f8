"""The model card: what the default model is, from what, how good, and how it sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine import LLM, SamplingParams
from engine.config import ModelConfig
from weights.corpus.sources import SOURCES

PROMPTS = (
    "The old captain",
    "It was a dark night, and",
    "Once upon a time there was a king who",
    '"My dear Miss Woodhouse," said',
    "She opened the letter, and",
    "The whale",
    "The history of Ireland",
    "Albert Einstein was",
    "An atom is",
    "Fellow citizens,",
)
BASELINES = ("5-gram", "xz", "gzip")
SAMPLING = "temperature 0.8, top_p 0.95, 120 tokens, bfloat16, seeds 1 to 10"


@dataclass(frozen=True)
class Facts:
    """What was measured. held_out: bits per byte by source; train_bytes: text by source; baselines:
    bits per byte by source and name (weights.baselines)."""

    config: ModelConfig
    parameters: int
    tokens: int
    steps: int
    busy_hours: float
    threads: int
    mixture: Mapping[str, float]
    train_bytes: Mapping[str, int]
    held_out_bytes: Mapping[str, int]
    held_out: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]


def draw_samples(model_dir: Path) -> list[str]:
    """One completion of each prompt, none chosen, by the engine itself."""
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, max_tokens=120, seed=seed)
        for seed in range(1, len(PROMPTS) + 1)
    ]
    llm = LLM(model_dir, device="cpu", dtype="bfloat16", kv_memory=64 * 2**20)
    return [completion.text for completion in llm.generate(list(PROMPTS), params)]


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f} MB"


def write_card(facts: Facts, samples: Sequence[str]) -> str:
    """The card, in Markdown."""
    config = facts.config
    rows = "\n".join(
        f"| {source.title} | {source.package.name} | {source.licence} "
        f"| {_megabytes(facts.train_bytes.get(source.name))} "
        f"| {f'{facts.mixture[source.name]:.0%}' if source.name in facts.mixture else '-'} |"
        for source in SOURCES
    )
    titles = {source.name: source.title for source in SOURCES}
    measured = "\n".join(
        f"| {titles[name]} | {_megabytes(facts.held_out_bytes.get(name))} | **{bits:.3f}** | "
        + " | ".join(f"{facts.baselines[name][baseline]:.3f}" for baseline in BASELINES)
        + " |"
        for name, bits in facts.held_out.items()
    )
    said = "\n\n".join(
        f"{number}. **{prompt}**\n\n{_quote(prompt + text)}"
        for number, (prompt, text) in enumerate(zip(PROMPTS, samples, strict=True), start=1)
    )
    return f"""# Ropeway's default model

A GPT-2 with rotary positions that Ropeway serves when no other model is named:
{facts.parameters:,} parameters, small enough to ship with the package and to answer on any machine.
It continues text in the manner of old novels and of encyclopaedia articles. It knows nothing,
follows no instruction and is no assistant: it exists so that the server has something real to
serve.

## Shape

{config.num_layers} layers, {config.hidden_size} wide, {config.num_heads} heads of
{config.head_dim}; context {config.max_position:,} tokens; {config.rotary_dim} of {config.head_dim}
dimensions rotated, base {config.rope_base:,.0f}, pairing `{config.pairing}`; tied embeddings;
bfloat16. The vocabulary is a byte-level BPE of {config.vocab_size:,} tokens trained on the same
text, `<|endoftext|>` among them.

## Text

Everything comes out of published packages; `python -m weights.corpus` builds it again.

| Text | Package | Licence | Training text | Share of tokens seen |
|---|---|---|---|---|
{rows}

Quotation marks, dashes and spaces are made uniform; hard-wrapped lines are joined. From Wikipedia
the markup, tables, footnotes, lists of links, redirects and disambiguation pages are dropped.

Wikipedia's text is by its contributors, <https://en.wikipedia.org>, and is available under the
Creative Commons Attribution-ShareAlike License, <https://creativecommons.org/licenses/by-sa/3.0/>;
each article's history names its authors. The packages' own licences cover their code; the books
and speeches in them are in the public domain in the United States.

## Training

`ropeway train CORPUS MODEL_DIR --config weights/default.toml`: {facts.steps:,} steps,
{facts.tokens / 1e6:.1f} million tokens, {facts.busy_hours:.1f} busy hours of {facts.threads}
CPU cores, no accelerator. Muon for the matrices of the layers, AdamW for the rest; warm-up, a
constant learning rate, and a linear decay to zero, towards the end of which windows grow from 256
tokens to the whole context. bfloat16 products, float32 weights. It went through this twice: after
8.4 million tokens it was taken up again at the full rate.

![Loss during training](training.png)

## Held-out text

Never trained on: the last 5 % of the articles of enwik8, and one book whose author is in no
training text. Windows of {config.max_position:,} tokens without overlap; bits per byte of the raw
text.

| Text | Size | This model | 5-gram | xz | gzip |
|---|---|---|---|---|---|
{measured}

The 5-gram (interpolated, Witten & Bell) has the same tokens and read all of the training text;
the compressors were given it first, gzip the last 32 kB (`python -m weights.baselines`).

## Limits

It has seen {facts.tokens / 1e6:.0f} million tokens, a small fraction of what its size could use. It
loses the thread within a few sentences, invents names, dates and facts, and repeats the views of
its sources, many of them two centuries old, on women, peoples and classes. English only. Do not
use it for anything but trying the server.

## Ten samples, none chosen

{SAMPLING}.

{said}
"""
