"""How far outputs have come in their grammars, and what may follow, by llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from engine.errors import GrammarFailed
from engine.grammar import source
from engine.params import Grammar

with suppress(ModuleNotFoundError):  # then admission lets no grammar in
    from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

SLICES = (r'[^"\\\x00-\x1F\x7F]{1,10}',)
"""Tokens whose masks are found at once where all of them may follow, as within a JSON string. Every
set costs memory: llguidance's own four take 13 MB more for 50,000 tokens, and gain no time."""


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
        if eos_token_id is None:
            eos_token_id = len(tokens)
            tokens, special_ids = [*tokens, b"<end>"], [*special_ids, eos_token_id]
        self.executor = LLExecutor(1)  # the network has the other cores
        plain = _Plain(tokens, special_ids, eos_token_id)
        wrapper = TokenizerWrapper(plain)
        self.handle = LLTokenizer(wrapper, slices=list(SLICES))
        wrapper.tokens = plain.tokens = []  # the handle has its own, and keeps the wrapper


class _Plain:
    """What TokenizerWrapper asks for. Texts are cut greedily; masks do not depend on that."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_token_id: int
    ) -> None:
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
        self.handle = LLMatcher(vocabulary.handle, source(grammar), log_level=0)
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
