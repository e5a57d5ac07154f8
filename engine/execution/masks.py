"""Which tokens each grammar lets come next, found out while the network computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from engine.errors import GrammarFailed
from engine.grammar import Matcher, Vocabulary
from engine.request import Request


class GrammarMasks:
    """A matcher for each request that has a grammar, rebuilt from its output where it is not known:
    after a preemption, and in another process."""

    def __init__(self, build: Callable[[], Vocabulary]) -> None:
        """build: called once, in another thread."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._vocabulary = self._executor.submit(build)
        self._matchers: dict[str, Matcher] = {}
        self._masks: dict[str, Future[bytes]] = {}

    def prepare(self, requests: Sequence[Request]) -> None:
        """Begin to find what may follow; to be called before the network's work begins."""
        for request in requests:
            if request.params.grammar is not None:
                self._masks[request.request_id] = self._executor.submit(self._mask, request)

    def apply(self, logits: Tensor, request: Request) -> None:
        """Forbid in one row [vocab_size], in place, what may not follow.

        Raises GrammarFailed, also where nothing may follow that the model could say.
        """
        bits = np.frombuffer(self._masks.pop(request.request_id).result(), np.uint8)
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)])
        allowed[: len(known)] = known.bool()
        if not (allowed & logits.isfinite()).any():
            raise GrammarFailed("no token of the model can follow as the grammar demands")
        logits.masked_fill_(~allowed, -torch.inf)

    def take(self, request: Request, token_id: int) -> bool:
        """The token that came; whether nothing can follow it. Raises GrammarFailed."""
        matcher = self._matchers[request.request_id]
        matcher.take([token_id])
        return matcher.ended

    def forget(self, request_id: str) -> None:
        """Drop what was kept for a request."""
        self._matchers.pop(request_id, None)
        self._masks.pop(request_id, None)

    def _mask(self, request: Request) -> bytes:
        """In the other thread: nothing else touches a matcher until its mask is there."""
        matcher = self._matchers.get(request.request_id)
        if matcher is None:
            assert request.params.grammar is not None
            matcher = Matcher(self._vocabulary.result(), request.params.grammar)
            self._matchers[request.request_id] = matcher
        matcher.take(request.token_ids[request.num_prompt_tokens + matcher.num_tokens :])
        return matcher.mask()
