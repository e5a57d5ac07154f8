"""Text -> vocabulary and token files, once: a run that is resumed finds them as they were."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from rich.console import Console
from rich.progress import Progress

from engine.errors import ConfigError
from engine.frontend.tokenizer import Tokenizer
from weights.corpus.text import Documents, Texts, read_texts, size_of
from weights.corpus.tokens import encode_documents
from weights.tokenizer.bpe import ranks_of, train_tokenizer, write_tokenizer
from weights.tokenizer.vocabulary import END_OF_TEXT
from weights.training.recipe import MOST_IDS, VOCAB_SIZE, TrainingConfig

HELD_OUT_SIZES = "held_out_bytes.json"


def fingerprint(texts: Texts, config: TrainingConfig) -> str:
    """Of everything that decides the token files."""
    vocab_size = config.vocab_size or VOCAB_SIZE
    digest = hashlib.sha256(json.dumps([vocab_size, config.held_out]).encode())
    for part in (texts.train, texts.held_out):
        for name, documents in sorted(part.items()):
            digest.update(json.dumps([name, len(documents)]).encode())
            for document in documents:
                digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def _pieces(texts: Texts, weights: dict[str, float]) -> Iterator[str]:
    """Lines of the training text, sources that are read more often repeated, at most three times.

    So the vocabulary sees about the mixture that the network will see.
    """
    sizes = {name: size_of(documents) for name, documents in texts.train.items()}
    total = sum(sizes.values())
    for name, documents in sorted(texts.train.items()):
        share = weights.get(name, 0.0) / sum(weights.values()) if weights else 1.0
        repeats = round(min(3.0, share * total / sizes[name])) if weights else 1
        for _ in range(max(1, repeats)):
            for document in documents:
                yield from document.splitlines(keepends=True)


def _agrees(stored: Tokenizer, trained: tokenizers.Tokenizer, documents: Documents) -> None:
    for name, texts in documents.items():
        if any(stored.encode(text) != trained.encode(text).ids for text in texts):
            raise ConfigError(
                f"tiktoken and tokenizers split the text of {name} differently: this is a fault of "
                "ours, please report it with the text"
            )


def prepare(
    folder: Path, model_dir: Path, run_dir: Path, config: TrainingConfig, console: Console
) -> Path:
    """The folder of token files; writes the tokenizer into model_dir, unless one lies there.

    Raises ConfigError.
    """
    with console.status(f"reading {folder}"):
        texts = read_texts(folder, config.held_out)
    if missing := sorted(config.weights.keys() - texts.train.keys()):
        raise ConfigError(
            f"data.weights names {missing[0]}, which the text does not have; it has "
            f"{', '.join(sorted(texts.train))}"
        )
    if config.weights and (unnamed := sorted(texts.train.keys() - config.weights.keys())):
        raise ConfigError(
            f"data.weights must name every source, and lacks {unnamed[0]}: 0 leaves it out"
        )
    out, mark = run_dir / "tokens", run_dir / "prepared.json"
    print_of_text = fingerprint(texts, config)
    if mark.exists():
        if json.loads(mark.read_text(encoding="utf-8"))["fingerprint"] == print_of_text:
            console.print("text and vocabulary are as they were prepared before")
            return out
        raise ConfigError(
            f"{folder}, vocab_size or held_out has changed since {run_dir} was prepared: choose "
            "another model directory"
        )
    console.print(
        f"{texts.size / 1e6:,.2f} MB to train on, from {len(texts.train)} source(s); "
        f"{sum(map(size_of, texts.held_out.values())) / 1e6:,.2f} MB held out"
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(texts, model_dir, config, console)
    if out.exists():
        shutil.rmtree(out)  # of a preparation that was stopped
    with Progress(console=console) as progress:
        for split, documents in (("train", texts.train), ("heldout", texts.held_out)):
            (out / split).mkdir(parents=True, exist_ok=True)
            for name, source in sorted(documents.items()):
                bar = progress.add_task(f"{split} {name}", total=len(source))
                with (out / split / f"{name}.bin").open("wb") as file:
                    for document in source:
                        file.write(encode_documents(tokenizer, [document]).tobytes())
                        progress.advance(bar)
    (out / "heldout" / HELD_OUT_SIZES).write_text(
        json.dumps({name: size_of(source) for name, source in texts.held_out.items()}) + "\n",
        encoding="utf-8",
    )
    mark.write_text(json.dumps({"fingerprint": print_of_text}) + "\n", encoding="utf-8")
    return out


def _tokenizer(
    texts: Texts, model_dir: Path, config: TrainingConfig, console: Console
) -> Tokenizer:
    """The one in model_dir; without one, a byte-level BPE of vocab_size tokens, trained now."""
    wanted = config.vocab_size
    if (model_dir / "tokenizer_config.json").exists():
        tokenizer = Tokenizer.from_directory(model_dir)
        if wanted is not None and len(tokenizer) != wanted:
            raise ConfigError(
                f"tokenizer.vocab_size is {wanted}, and the tokenizer that lies in {model_dir} has "
                f"{len(tokenizer)} tokens. Next: leave vocab_size out to take that tokenizer, or "
                "choose another model directory"
            )
        console.print(f"taking the tokenizer in {model_dir}: {len(tokenizer):,} tokens")
    else:
        console.print(f"training a vocabulary of {wanted or VOCAB_SIZE:,} tokens")
        pieces = _pieces(texts, dict(config.weights))
        trained = train_tokenizer(pieces, (wanted or VOCAB_SIZE) - 1)
        ranks = ranks_of(trained)
        if len(ranks) + 1 < (wanted or VOCAB_SIZE):
            if wanted is not None:
                raise ConfigError(
                    f"tokenizer.vocab_size must be at most {len(ranks) + 1} for this text, where "
                    f"no more pairs are left to merge; got {wanted}"
                )
            console.print(f"the text gives {len(ranks) + 1:,} tokens and no more")
        write_tokenizer(model_dir, ranks)
        tokenizer = Tokenizer.from_directory(model_dir)
        _agrees(tokenizer, trained, texts.held_out)
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise ConfigError(f"the tokenizer in {model_dir} has no {END_OF_TEXT} token")
    if len(tokenizer) > MOST_IDS:
        raise ConfigError(
            f"the tokenizer in {model_dir} has {len(tokenizer):,} ids: at most {MOST_IDS:,}"
        )
    return tokenizer
