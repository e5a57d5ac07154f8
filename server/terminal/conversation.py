"""A conversation with a model in this process."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from engine.errors import ContextOverflow
from engine.params import SamplingParams
from server.chat import ChatTemplate

if TYPE_CHECKING:  # it loads PyTorch
    from engine.llm import LLM


class Conversation:
    """The turns so far, and the model that answers."""

    def __init__(self, llm: LLM, template: ChatTemplate, params: SamplingParams) -> None:
        """params: of every answer; its max_tokens are kept free."""
        self._llm = llm
        self._template = template
        self._params = params
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0

    def reset(self) -> None:
        """Forget everything."""
        self.messages.clear()

    def answer(self, text: str) -> Generator[str]:
        """The answer to a message, token by token; leaving early keeps what was said until then.

        Where the conversation has outgrown the context, its oldest turns go; `forgotten` is the
        number of messages that went this time. Raises RequestError, and all is as before then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        while True:
            deltas = self._llm.stream(self._template.token_ids(messages), self._params)
            try:
                delta = next(deltas, None)
                break
            except ContextOverflow:
                if len(messages) == 1:
                    raise
                messages = messages[2:]
        self.forgotten = len(self.messages) + 1 - len(messages)
        said = ""
        try:
            while delta is not None:
                piece = delta.text if said else delta.text.lstrip()
                said += piece
                yield piece
                delta = next(deltas, None)
        finally:
            deltas.close()
            self.messages = [*messages, {"role": "assistant", "content": said.rstrip()}]
