"""Which tokens each grammar lets come next, found out while the network computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from engine.errors import GrammarFailed
from engine.execution.matcher import Matcher, Vocabulary, masks_of
from engine.request import Request

Found = Mapping[str, Tensor | GrammarFailed]
"""By request id: what may not follow, bool [tokens]; or why that cannot be said."""


class GrammarMasks:
    """A matcher for each request that has a grammar, rebuilt from its output where it is not known:
    after a preemption, and in another process."""

    def __init__(self, build: Callable[[], Vocabulary]) -> None:
        """build: called once, in another thread."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._vocabulary = self._executor.submit(build)
        self._matchers: dict[str, Matcher] = {}
        self._found: Future[Found] | None = None

    def prepare(self, requests: Sequence[Request]) -> None:
        """Begin to find what may follow; to be called before the network's work begins."""
        bound = [request for request in requests if request.params.grammar is not None]
        self._found = self._executor.submit(self._find, bound) if bound else None

    def apply(self, logits: Tensor, request: Request) -> None:
        """Forbid in one row [vocab_size], in place, what may not follow.

        Raises GrammarFailed, also where nothing may follow that the model could say.
        """
        assert self._found is not None
        forbidden = self._found.result()[request.request_id]
        if isinstance(forbidden, GrammarFailed):
            raise forbidden
        forbidden = forbidden[: len(logits)]
        masked = logits.clone()
        masked[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        masked[len(forbidden) :] = -torch.inf  # what the grammar knows no token for
        if masked.max() == -torch.inf:
            raise GrammarFailed("no token of the model can follow as the grammar demands")
        logits.copy_(masked)

    def take(self, request: Request, token_id: int) -> bool:
        """The token that came; whether nothing can follow it. Raises GrammarFailed."""
        matcher = self._matchers[request.request_id]
        matcher.take([token_id])
        return matcher.ended

    def forget(self, request_id: str) -> None:
        """Drop what was kept for a request."""
        self._matchers.pop(request_id, None)

    def _find(self, requests: Sequence[Request]) -> Found:
        """In the other thread: nothing else touches a matcher until the masks are there."""
        found: dict[str, Tensor | GrammarFailed] = {}
        matchers: dict[str, Matcher] = {}
        for request in requests:
            try:
                matchers[request.request_id] = self._matcher(request)
            except GrammarFailed as fault:
                found[request.request_id] = fault
        masks = masks_of(list(matchers.values()), self._vocabulary.result())
        for (request_id, matcher), mask in zip(matchers.items(), masks, strict=True):
            try:
                matcher.check()
                found[request_id] = torch.from_numpy(mask == 0)
            except GrammarFailed as fault:
                found[request_id] = fault
        return found

    def _matcher(self, request: Request) -> Matcher:
        """Of a request, as far as its output has come. Raises GrammarFailed."""
        matcher = self._matchers.get(request.request_id)
        if matcher is None:
            assert request.params.grammar is not None
            matcher = Matcher(self._vocabulary.result(), request.params.grammar)
            self._matchers[request.request_id] = matcher
        matcher.take(request.token_ids[request.num_prompt_tokens + matcher.num_tokens :])
        return matcher
