"""Tokenizer files of a checkpoint into those of a model directory, or a refusal.

What is written is tiktoken's ranks and the regular expression of the split. Merges become ranks by
their order; whether that is the same tokenizer is tried against `tokenizers`, not assumed.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.errors import TokenizerError
from engine.files import read_json
from engine.frontend.preparation import AddedToken, Preparation, nfc
from engine.frontend.tokenizer import CONFIG_FILE, RANKS_FILE, Tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_RANKS = 50_256
END_OF_TEXT = "<|endoftext|>"
MERGES = ("vocab.bpe", "merges.txt")
VOCABULARIES = ("encoder.json", "vocab.json")
JSON_FILE = "tokenizer.json"
ADDED_FILE = "added_tokens.json"
CHARACTERS_FILE = "meta.pkl"
TRIALS = 2000
"""Random texts on which a converted tokenizer must agree."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE. tokens: ids by their bytes; special: names of ids that no text becomes.

    preparation: what becomes of a text before the split.
    """

    pattern: str
    tokens: Mapping[bytes, int]
    special: Mapping[str, int]
    preparation: Preparation | None = None

    def tokenizer(self) -> Tokenizer:
        """As it is served. Raises TokenizerError."""
        return Tokenizer(self.pattern, self.tokens, self.special, self.preparation)

    def write(self, directory: Path) -> None:
        """The two tokenizer files of a model directory."""
        lines = (
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(self.tokens.items(), key=lambda item: item[1])
        )
        (directory / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        config: dict[str, Any] = {
            "pattern": self.pattern,
            "special_tokens": dict(self.special),
        }
        if self.preparation is not None:
            config |= self.preparation.to_config()
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def convert_tokenizer(source: Path, directory: Path) -> str:
    """Write the tokenizer that lies in `source` into `directory`; what it was, '' for none.

    Raises TokenizerError for one that cannot be served as it is.
    """
    if (source / RANKS_FILE).is_file():
        return _copy_ranks(source, directory)
    settings = source / CONFIG_FILE
    if settings.is_file() and "characters" in read_json(settings, TokenizerError):
        shutil.copyfile(settings, directory / CONFIG_FILE)
        return f"{CONFIG_FILE}, characters"
    if (source / JSON_FILE).is_file():
        vocabulary, reference = _built(source / JSON_FILE, _from_json)
        name = JSON_FILE
    elif merges := next((source / m for m in MERGES if (source / m).is_file()), None):
        vocabulary, reference = _built(merges, _from_merges)
        name = f"{merges.name}, {len(vocabulary.tokens):,} tokens"
    elif (source / CHARACTERS_FILE).is_file():
        characters = read_characters(source / CHARACTERS_FILE)
        config = {"characters": characters}
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        return f"{CHARACTERS_FILE}, {len(characters)} characters"
    else:
        return ""
    _check_wrapper(source, vocabulary)
    compare(vocabulary.tokenizer(), reference, vocabulary, name)
    vocabulary.write(directory)
    return name


def _check_wrapper(source: Path, vocabulary: Vocabulary) -> None:
    """Raise where Hugging Face's tokenizer_config.json does more than the tokenizer's own file."""
    path = source / CONFIG_FILE
    config = read_json(path, TokenizerError) if path.is_file() else {}
    for key in ("add_bos_token", "add_eos_token"):
        if config.get(key):
            raise TokenizerError(f"{path}: {key} puts a token beside each text; not supported")
    space = vocabulary.preparation is not None and vocabulary.preparation.prefix_space
    if config.get("add_prefix_space", space) not in (space, None):
        raise TokenizerError(
            f"{path}: add_prefix_space is {config['add_prefix_space']!r}, the tokenizer's own file "
            f"says {space}; let them agree"
        )


def _copy_ranks(source: Path, directory: Path) -> str:
    shutil.copyfile(source / RANKS_FILE, directory / RANKS_FILE)
    settings = source / CONFIG_FILE
    if settings.is_file() and "pattern" in read_json(settings, TokenizerError):
        shutil.copyfile(settings, directory / CONFIG_FILE)
        return f"{RANKS_FILE}, as it was"
    count = len((source / RANKS_FILE).read_bytes().split(b"\n")) - 1
    if count != GPT2_RANKS:
        raise TokenizerError(
            f"{source / RANKS_FILE}: {count:,} ranks without a {CONFIG_FILE} that says the "
            f"`pattern` of their split; only GPT-2's {GPT2_RANKS:,} are known"
        )
    config = {"pattern": GPT2_PATTERN, "special_tokens": {END_OF_TEXT: GPT2_RANKS}}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return f"{RANKS_FILE}, GPT-2's"


def bytes_of_printable() -> dict[str, int]:
    """GPT-2's stand-ins: the printable character that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _vocabulary(
    path: Path,
    pattern: str,
    vocab: Mapping[str, int],
    merges: Sequence[str],
    special: Mapping[str, int],
    preparation: Preparation | None,
) -> Vocabulary:
    """Ranks of a vocabulary; refused where the order of its merges is not that of its ids.

    special: tokens that no text becomes; GPT-2's end of text is one even where nothing says so.
    """
    byte = bytes_of_printable()
    merged = ["".join(merge.split(" ")) for merge in merges]
    reachable = {*byte, *merged}
    added = {each.text: each.id for each in preparation.added} if preparation else {}
    named, plain = dict(special), {}
    for token, rank in vocab.items():
        if token in special or (token in added and token not in reachable):
            continue
        if token in reachable:
            plain[token] = rank
        elif token == END_OF_TEXT:
            named[token] = rank
        else:
            raise TokenizerError(f"{path}: no merge makes token {token!r}, id {rank}")
    ids = [vocab.get(token, -1) for token in merged]
    if any(a >= b for a, b in pairwise(ids)) or (ids and ids[0] < 0):
        raise TokenizerError(f"{path}: the ids do not follow the order of the merges")
    try:
        tokens = {bytes(byte[c] for c in token): rank for token, rank in plain.items()}
    except KeyError as error:
        raise TokenizerError(f"{path}: not a byte-level vocabulary: {error} in it") from error
    return Vocabulary(pattern, tokens, named, preparation)


def _library() -> Any:
    try:
        import tokenizers  # noqa: PLC0415  # of an extra
    except ImportError as error:
        raise TokenizerError(
            "converting this tokenizer needs the `tokenizers` library: pip install tokenizers"
        ) from error
    return tokenizers


def _built(path: Path, build: Callable[[Path], tuple[Vocabulary, Any]]) -> tuple[Vocabulary, Any]:
    """What `build` makes of a file that may hold anything. Raises TokenizerError."""
    try:
        return build(path)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare ones
        raise TokenizerError(f"{path}: is no tokenizer as they are written: {error!r}") from error


def _from_merges(path: Path) -> tuple[Vocabulary, Any]:
    """GPT-2's own two files; added_tokens.json beside them, where a GPT-J or CodeGen has one."""
    library, source = _library(), path.parent
    name = next((source / v for v in VOCABULARIES if (source / v).is_file()), None)
    if name is None:
        raise TokenizerError(f"{path}: needs {' or '.join(VOCABULARIES)} beside it")
    vocab = read_json(name, TokenizerError)
    lines = path.read_text("utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    more = read_json(source / ADDED_FILE, TokenizerError) if (source / ADDED_FILE).is_file() else {}
    special = {text: more.pop(text) for text in (END_OF_TEXT,) if text in more}
    added = [AddedToken(text, rank, True) for text, rank in more.items()]
    preparation = Preparation(added, None, False) if added else None
    vocabulary = _vocabulary(path, GPT2_PATTERN, vocab, merges, special, preparation)
    pairs = [tuple(line.split(" ")) for line in merges]
    reference = library.Tokenizer(library.models.BPE(vocab, pairs))
    reference.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = library.decoders.ByteLevel()
    reference.add_special_tokens([token for token in vocab if token in vocabulary.special])
    for token in sorted((special | more).items(), key=lambda item: item[1]):
        reference.add_tokens([library.AddedToken(token[0], special=token[0] in special)])
    return vocabulary, reference


def _from_json(path: Path) -> tuple[Vocabulary, Any]:
    """tokenizer.json, where it is a byte-level BPE."""
    library, content = _library(), read_json(path, TokenizerError)
    model = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{path}: {model.get('type')} is no byte-level BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise TokenizerError(f"{path}: {key} is {model[key]!r}; not supported")
    decoder = (content.get("decoder") or {}).get("type")
    if decoder != "ByteLevel":
        raise TokenizerError(f"{path}: its decoder ({decoder}) is not a byte-level one")
    added = content.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token.get("special")}
    pattern, prefix_space = _pattern(path, content)
    normalization = _normalization(path, content.get("normalizer"))
    plain = [_added(path, token, normalization) for token in added if not token.get("special")]
    preparation = None
    if plain or normalization or prefix_space:
        preparation = Preparation(plain, normalization, prefix_space)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    vocabulary = _vocabulary(path, pattern, model["vocab"], merges, special, preparation)
    reference = library.Tokenizer.from_file(str(path))
    reference.no_truncation()
    reference.no_padding()
    return vocabulary, reference


def _added(path: Path, token: Mapping[str, Any], normalization: str | None) -> AddedToken:
    """A token that is cut out of texts, though it is not special."""
    for flag in ("single_word", "lstrip", "rstrip"):
        if token.get(flag):
            raise TokenizerError(f"{path}: {flag} of token {token['content']!r} is not supported")
    text, normalized = token["content"], bool(token.get("normalized", True))
    return AddedToken(nfc(text) if normalized and normalization else text, token["id"], normalized)


def _normalization(path: Path, normalizer: Mapping[str, Any] | None) -> str | None:
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers", [])
    kinds = {step.get("type") for step in steps}
    if kinds - {"NFC"}:
        raise TokenizerError(
            f"{path}: it normalises text by {', '.join(sorted(map(str, kinds)))}; only NFC is "
            "supported"
        )
    return "NFC" if kinds else None


def _pattern(path: Path, content: Mapping[str, Any]) -> tuple[str, bool]:
    """The regular expression of the split; whether a space is put before what is split."""
    split = content.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", []) if split.get("type") == "Sequence" else [split]
    kinds = [step.get("type") for step in steps]
    prefix_space = bool(steps and steps[-1].get("add_prefix_space"))
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_PATTERN, prefix_space
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        if prefix_space:
            raise TokenizerError(f"{path}: it puts a space before each word; not supported")
        pattern = steps[0].get("pattern", {}).get("Regex")
        if steps[0].get("behavior") == "Isolated" and not steps[0].get("invert") and pattern:
            return str(pattern), False
    raise TokenizerError(
        f"{path}: its split ({', '.join(map(str, kinds))}) is not a byte-level one"
    )


WORDS: tuple[str, ...] = (
    " the",
    "don't",
    "we'LL",
    "  ",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "1234567",
    "٣",
    "中文字",
)
WORDS += ("🙂", "👩\u200d👩\u200d👧", "\u00a0", "\u2028", "\u200b", "ß", "ﬁ", "İ", "'s", "_x")
WORDS += ("\r\n", "…", "\x00", " ", "   ", "\t\t", "\u212b")
WORDS += ("\u1112\u1161\u11ab", "q\u0323\u0307", "a\u0301\u0323")


def trial_texts(vocabulary: Vocabulary) -> Iterator[str]:
    """Every token by itself, words with accents and spaces, and random characters.

    Where text is normalised, every mark of today's Unicode before another one.
    """
    for token in vocabulary.tokens:
        try:
            yield token.decode("utf-8")
        except UnicodeDecodeError:
            continue
    words = list(WORDS)
    if vocabulary.preparation is not None:
        words += [each.text for each in vocabulary.preparation.added]
        yield from (f"x{text}y {text}{text} {text}" for text in words)
        if vocabulary.preparation.normalization is not None:
            for mark in filter(unicodedata.combining, map(chr, range(0x110000))):
                yield f"a{mark}\u0334\u0301{mark}"
    generator = random.Random(0)
    for _ in range(TRIALS):
        pieces = [
            generator.choice(words)
            if generator.random() < 0.5
            else chr(generator.choice((generator.randrange(0x300), generator.randrange(0xD800))))
            for _ in range(generator.randrange(1, 24))
        ]
        yield "".join(pieces)


def compare(ours: Tokenizer, reference: Any, vocabulary: Vocabulary, name: str) -> None:
    """Raise TokenizerError for the first text on which ours differs from the library's."""
    texts = [t for t in trial_texts(vocabulary) if not any(s in t for s in vocabulary.special)]
    for text, theirs in zip(texts, reference.encode_batch(texts), strict=True):
        ids = ours.encode(text)
        if ids != theirs.ids:
            raise TokenizerError(
                f"{name}: as tiktoken ranks it gives {ids[:8]} for {text[:40]!r}, the "
                f"`tokenizers` library {theirs.ids[:8]}; it cannot be served as it is"
            )
    output = [[token_id] for token_id in range(len(ours)) if token_id in ours]
    output += [ours.encode(text) for text in texts[-TRIALS:]]
    for ids, theirs in zip(output, reference.decode_batch(output), strict=True):
        if ours.decode(ids) != theirs:
            raise TokenizerError(
                f"{name}: ids {ids[:8]} are {ours.decode(ids)[:40]!r}; the `tokenizers` library "
                f"decodes them to {theirs[:40]!r}"
            )


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, texts and numbers; anything that has to be imported is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise TokenizerError(f"{CHARACTERS_FILE}: refused, since it wants {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise TokenizerError(f"{CHARACTERS_FILE}: refused, since it wants object {pid!r}")


def read_characters(path: Path) -> list[str]:
    """nanoGPT's character-level alphabet, by id. Raises TokenizerError."""
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except TokenizerError:
        raise
    except Exception as error:  # a broken pickle fails in any way at all
        raise TokenizerError(f"{path}: cannot be read: {error!r}") from error
    itos = content.get("itos") if isinstance(content, dict) else None
    if isinstance(itos, dict) and set(itos) == set(range(len(itos))):
        characters = [itos[i] for i in range(len(itos))]
        if all(isinstance(c, str) and len(c) == 1 for c in characters):
            return characters
    raise TokenizerError(f"{path}: needs `itos`, a character for each id from 0")
