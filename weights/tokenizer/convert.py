"""convert_tokenizer(): from whichever files a checkpoint has.

What is written is tiktoken's ranks and the regular expression of the split.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from engine.errors import TokenizerError
from engine.files import read_json
from engine.frontend.tokenizer import CONFIG_FILE, RANKS_FILE
from weights.tokenizer.characters import CHARACTERS_FILE, read_characters
from weights.tokenizer.readers import built, from_json, from_merges
from weights.tokenizer.trial import compare
from weights.tokenizer.vocabulary import END_OF_TEXT, GPT2_PATTERN, Vocabulary

GPT2_RANKS = 50_256
MERGES = ("vocab.bpe", "merges.txt")
JSON_FILE = "tokenizer.json"


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
        vocabulary, reference = built(source / JSON_FILE, from_json)
        name = JSON_FILE
    elif merges := next((source / m for m in MERGES if (source / m).is_file()), None):
        vocabulary, reference = built(merges, from_merges)
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
