"""What tokenizer.json and GPT-2's two files say, and the `tokenizers` library's reading of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import TokenizerError
from engine.files import read_json
from engine.frontend.preparation import AddedToken, Preparation, nfc
from weights.tokenizer.vocabulary import END_OF_TEXT, GPT2_PATTERN, Vocabulary, ranked

VOCABULARIES = ("encoder.json", "vocab.json")
ADDED_FILE = "added_tokens.json"


def _library() -> Any:
    try:
        import tokenizers  # noqa: PLC0415  # of an extra
    except ImportError as error:
        raise TokenizerError(
            "converting this tokenizer needs the `tokenizers` library: pip install tokenizers"
        ) from error
    return tokenizers


def built(path: Path, build: Callable[[Path], tuple[Vocabulary, Any]]) -> tuple[Vocabulary, Any]:
    """What `build` makes of a file that may hold anything. Raises TokenizerError."""
    try:
        return build(path)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare ones
        raise TokenizerError(f"{path}: is no tokenizer as they are written: {error!r}") from error


def from_merges(path: Path) -> tuple[Vocabulary, Any]:
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
    vocabulary = ranked(path, GPT2_PATTERN, vocab, merges, special, preparation)
    pairs = [tuple(line.split(" ")) for line in merges]
    reference = library.Tokenizer(library.models.BPE(vocab, pairs))
    reference.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = library.decoders.ByteLevel()
    reference.add_special_tokens([token for token in vocab if token in vocabulary.special])
    for token in sorted((special | more).items(), key=lambda item: item[1]):
        reference.add_tokens([library.AddedToken(token[0], special=token[0] in special)])
    return vocabulary, reference


def from_json(path: Path) -> tuple[Vocabulary, Any]:
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
    vocabulary = ranked(path, pattern, model["vocab"], merges, special, preparation)
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
