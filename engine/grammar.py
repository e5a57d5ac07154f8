"""Grammars that an output must obey, by llguidance (the extra `grammar`)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import GrammarFailed, InvalidRequest
from engine.params import Grammar

try:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
except ModuleNotFoundError:
    INSTALLED = False
else:
    INSTALLED = True


def check(grammar: Grammar) -> None:
    """Raises InvalidRequest where no output could obey it, or llguidance is not installed."""
    field = grammar.field
    if not INSTALLED:
        raise InvalidRequest(
            f"{field} needs llguidance, which this server lacks: pip install 'ropeway[grammar]'",
            field,
        )
    try:
        fault = LLMatcher.validate_grammar(_source(grammar))
    except ValueError as error:
        fault = str(error)
    if fault:
        said = " ".join(fault.split())
        raise InvalidRequest(f"{field} cannot be obeyed: {said}", field)


def _source(grammar: Grammar) -> str:
    """As llguidance reads it. Raises ValueError."""
    if grammar.kind == "json_schema":
        # Small models would fill a line with spaces, where any number of them may stand.
        return LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"whitespace_flexible": False}
        )
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    texts = json.loads(grammar.text)
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, texts))}")


class Vocabulary:
    """The tokens of a model, as llguidance needs them. Built once: it takes some tenths of a
    second for 50,000 tokens."""

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_token_id: int | None
    ) -> None:
        """tokens: by id; empty for ids that no token has. special_ids: never part of a text.

        A model without an end token gets one that it cannot say; its outputs end where nothing can
        follow.
        """
        self.size = len(tokens)
        self._tokens = list(tokens)
        self._special_ids = list(special_ids)
        if eos_token_id is None:
            eos_token_id = len(self._tokens)
            self._tokens.append(b"<end>")
            self._special_ids.append(eos_token_id)
        self.executor = LLExecutor(1)  # the network has the other cores
        self.handle = LLTokenizer(
            TokenizerWrapper(_Plain(self._tokens, self._special_ids, eos_token_id))
        )


class _Plain:
    """What TokenizerWrapper asks for. Texts are cut greedily; masks do not depend on that."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: list[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos_token_id
        self._single = {token: token_id for token_id, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._single[bytes([byte])] for byte in text]


class Matcher:
    """How far one output has come in its grammar: a function of its tokens alone."""

    def __init__(self, vocabulary: Vocabulary, grammar: Grammar) -> None:
        """At the beginning. Raises GrammarFailed."""
        self.handle = LLMatcher(vocabulary.handle, _source(grammar), log_level=0)
        self.num_tokens = 0
        self.check()

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self.handle.is_stopped()

    def take(self, token_ids: Sequence[int]) -> None:
        """Go on by some tokens. Raises GrammarFailed."""
        self.handle.consume_tokens(list(token_ids))
        self.num_tokens += len(token_ids)
        self.check()

    def check(self) -> None:
        """Raises GrammarFailed where it cannot go on."""
        if self.handle.is_error():
            said = " ".join(self.handle.get_error().split())
            raise GrammarFailed(f"the grammar cannot be followed any further: {said}")


def masks_of(matchers: Sequence[Matcher], vocabulary: Vocabulary) -> NDArray[np.uint8]:
    """[matchers, tokens or some more]: 1 for each token that may follow.

    Other threads run meanwhile. A matcher that fails says so when it is checked.
    """
    bits = allocate_token_bitmask(len(matchers), vocabulary.handle.vocab_size)
    handles = [(matcher.handle, at) for at, matcher in enumerate(matchers)]
    if handles:  # else llguidance complains
        fill_next_token_bitmask_par(vocabulary.executor, handles, bits)
    return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
