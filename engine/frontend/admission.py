"""Admission: what must hold before a request enters the engine. AsyncEngine and LLM share it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from engine.errors import ContextOverflow, InvalidRequest
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, EngineReady
from engine.request import SEED_BITS, SamplingParams


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Admission:
    """Turns a prompt and its parameters into an AddRequest that the engine can always finish."""

    tokenizer: Tokenizer
    engine: EngineReady

    def admit(self, request_id: str, prompt: str | list[int], params: SamplingParams) -> AddRequest:
        """Settle tokens, seed, limit and end tokens.

        Raises InvalidRequest for a prompt that is empty or holds ids that no token has, and
        ContextOverflow where prompt and output cannot fit the context or the whole cache.
        """
        token_ids = self._token_ids(prompt)
        stop_token_ids = set(params.stop_token_ids)
        if self.engine.eos_token_id is not None and not params.ignore_eos:
            stop_token_ids.add(self.engine.eos_token_id)
        return AddRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            seed=secrets.randbits(SEED_BITS) if params.seed is None else params.seed,
            max_tokens=self._max_tokens(len(token_ids), params.max_tokens),
            stop_token_ids=sorted(stop_token_ids),
        )

    def _token_ids(self, prompt: str | list[int]) -> list[int]:
        limit = self.engine.max_position
        if isinstance(prompt, str):
            # Checked before tokenising, which can take long for a text that has no spaces.
            if len(prompt) > limit * self.tokenizer.longest_token:
                raise ContextOverflow(
                    f"prompt has {len(prompt)} characters; the context of {limit} tokens cannot "
                    f"hold more than {limit * self.tokenizer.longest_token}",
                    "prompt",
                )
            try:
                prompt = self.tokenizer.encode(prompt)
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"prompt cannot be tokenised: {error}", "prompt") from error
        else:
            for at, token_id in enumerate(prompt):
                if token_id not in self.tokenizer:
                    raise InvalidRequest(
                        f"prompt[{at}] is {token_id}; the tokenizer has ids 0 to "
                        f"{len(self.tokenizer) - 1}",
                        "prompt",
                    )
        if not prompt:
            raise InvalidRequest("prompt must hold at least one token, got none", "prompt")
        if len(prompt) > limit:
            raise ContextOverflow(
                f"prompt has {len(prompt)} tokens; the context is {limit}", "prompt"
            )
        return prompt

    def _max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        """The last token is sampled but never computed, so it needs no position of its own."""
        capacity = self.engine.num_blocks * self.engine.block_size
        limit = min(self.engine.max_position, capacity)
        room = limit + 1 - num_prompt_tokens
        if room < 1 or (asked is not None and asked > room):
            what = "context" if limit == self.engine.max_position else "cache"
            raise ContextOverflow(
                f"prompt ({num_prompt_tokens} tokens) and max_tokens ({asked or 1}) need more than "
                f"the {what} of {limit} tokens; max_tokens can be at most {max(room, 0)}",
                "max_tokens",
            )
        return room if asked is None else asked
