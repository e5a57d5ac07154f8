"""Admission: what must hold before a request enters the engine. AsyncEngine and LLM share it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from engine.errors import ConfigError, ContextOverflow, InvalidRequest
from engine.frontend.tokenizer import Tokenizer
from engine.grammar import check as check_grammar
from engine.messages import AddRequest, EngineReady
from engine.params import (
    MAX_INT,
    SEED_BITS,
    Overflow,
    RequestOptions,
    SamplingParams,
    no_such_rotation,
)
from engine.request import SINK_BLOCKS, Targets, Window
from engine.scaling import RopeScaling

MAX_CONTEXTS = 64
"""How many times the context a prompt may be, where `overflow` says what to do with it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request took.

    cached_tokens: of the prompt, found in the prefix cache. dropped_tokens: what the end did not
    see, by `overflow`: cut from the prompt (and not counted in it), or shifted out.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    dropped_tokens: int = 0

    @classmethod
    def of(cls, request: AddRequest, completion_tokens: int, cached_tokens: int) -> Self:
        """The usage of a request that has come so far."""
        prompt_tokens = len(request.prompt_token_ids)
        dropped = request.truncated_tokens
        if request.window is not None:
            last = max(0, prompt_tokens + completion_tokens - 2)  # computed; the last one is not
            dropped += request.window.num_dropped_blocks(last) * request.window.block_size
        return cls(prompt_tokens, completion_tokens, cached_tokens, dropped)

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Room:
    """What one request has room for: tokens of the context under its rotation, and of the cache."""

    context: int
    block_size: int
    num_blocks: int

    @property
    def limit(self) -> int:
        """Tokens that one request can have in the cache."""
        return min(self.context, self.num_blocks * self.block_size)

    def truncated(self, token_ids: list[int], max_tokens: int | None) -> list[int]:
        """The end of a prompt, so that max_tokens fit behind it."""
        if max_tokens is None:
            if len(token_ids) > self.limit:
                raise InvalidRequest(
                    f"max_tokens must be given with overflow 'truncate' where the prompt "
                    f"({len(token_ids)} tokens) is longer than the limit of {self.limit}",
                    "max_tokens",
                )
            return token_ids
        room = self.limit + 1 - max_tokens
        if room < 1:
            raise ContextOverflow(
                f"max_tokens must be at most {self.limit} where at least one token of the prompt "
                f"is kept, got {max_tokens}",
                "max_tokens",
            )
        return token_ids[-room:]

    def window(self, num_prompt_tokens: int, max_tokens: int | None) -> Window | None:
        """What a shifting request sees; None where it fits as it is."""
        if max_tokens is not None and num_prompt_tokens + max_tokens <= self.limit + 1:
            return None
        num_blocks = self.context // self.block_size
        least = SINK_BLOCKS + 2
        if num_blocks < least or num_blocks > self.num_blocks:
            raise ContextOverflow(
                f"overflow 'shift' needs {max(num_blocks, least)} pages of {self.block_size} "
                f"tokens; the context of {self.context} tokens has {num_blocks}, the cache "
                f"{self.num_blocks}",
                "overflow",
            )
        return Window(self.block_size, num_blocks)

    def max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        """The last token is sampled but never computed, so it needs no position of its own."""
        limit = self.limit
        room = limit + 1 - num_prompt_tokens
        if room < 1 or (asked is not None and asked > room):
            what = "context" if limit == self.context else "cache"
            raise ContextOverflow(
                f"prompt ({num_prompt_tokens} tokens) and max_tokens ({asked or 1}) need more than "
                f"the {what} of {limit} tokens; max_tokens can be at most {max(room, 0)}",
                "max_tokens",
            )
        return room if asked is None else asked


def check_token_ids(token_ids: Sequence[int], tokenizer: Tokenizer, name: str, field: str) -> None:
    """Raises InvalidRequest for an id that no token has. name: what the error calls the list."""
    for at, token_id in enumerate(token_ids):
        if token_id not in tokenizer:
            raise _no_such_token(f"{name}[{at}] is {token_id}", tokenizer, field)


def _no_such_token(said: str, tokenizer: Tokenizer, field: str) -> InvalidRequest:
    return InvalidRequest(f"{said}; the tokenizer has ids 0 to {len(tokenizer) - 1}", field)


@dataclass(frozen=True)
class Admission:
    """Turns a prompt and its parameters into an AddRequest that the engine can always finish."""

    tokenizer: Tokenizer
    engine: EngineReady

    def admit(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
        name: str = "prompt",
    ) -> AddRequest:
        """Settle tokens, seed, limit and end tokens. name: what errors call the prompt.

        Raises InvalidRequest for a prompt that is empty or holds ids that no token has and for a
        rotation that the model cannot have, and ContextOverflow where prompt and output cannot fit
        the context or the whole cache, and `overflow` does not help.
        """
        room = self._room(params.rope)
        token_ids = self._token_ids(prompt, options.overflow, room, name)
        num_tokens, window, max_tokens = len(token_ids), None, params.max_tokens
        if options.overflow == "truncate":
            token_ids = room.truncated(token_ids, max_tokens)
        elif options.overflow == "shift":
            window = room.window(num_tokens, max_tokens)
        if window is None:
            max_tokens = room.max_tokens(len(token_ids), max_tokens)
        stop_token_ids = set(params.stop_token_ids)
        check_token_ids(params.stop_token_ids, self.tokenizer, "stop_token_ids", "stop_token_ids")
        if params.grammar is not None:
            check_grammar(params.grammar)
        for token_id in params.logit_bias:
            if token_id not in self.tokenizer:
                raise _no_such_token(f"logit_bias holds {token_id}", self.tokenizer, "logit_bias")
        if self.engine.eos_token_id is not None and not params.ignore_eos:
            stop_token_ids.add(self.engine.eos_token_id)
        return AddRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            options=options,
            seed=secrets.randbits(SEED_BITS) if params.seed is None else params.seed,
            max_tokens=MAX_INT if max_tokens is None else max_tokens,
            stop_token_ids=sorted(stop_token_ids),
            window=window,
            truncated_tokens=num_tokens - len(token_ids),
        )

    def admit_score(
        self,
        request_id: str,
        text: str | list[int],
        options: RequestOptions = RequestOptions(),
        *,
        first: int = 1,
        top: int = 0,
        name: str = "text",
        rope: RopeScaling | None = None,
    ) -> AddRequest:
        """A request that ends with the log-probabilities of a text's tokens from `first` on.

        It generates one token, which means nothing: the last token of the text is only looked for,
        and the engine samples behind the one before it. top: likeliest tokens to give beside each.
        rope: the rotation profile, None: the model's own.

        Raises InvalidRequest and ContextOverflow as above, and where there is nothing to score.
        """
        if options.overflow == "truncate":
            raise InvalidRequest(
                "overflow must be error or shift where a text is scored; got 'truncate'", "overflow"
            )
        room = self._room(rope)
        token_ids = self._token_ids(text, options.overflow, room, name)
        field = name.partition("[")[0]
        if not 1 <= first < len(token_ids):
            raise InvalidRequest(
                f"{name} must have more tokens than the {max(first, 1)} before the first that is "
                f"scored, got {len(token_ids)}",
                field,
            )
        if options.overflow == "error" and len(token_ids) > room.limit + 1:
            raise ContextOverflow(
                f"{name} has {len(token_ids)} tokens; the cache of {room.limit} tokens takes "
                f"{room.limit + 1}",
                field,
            )
        params = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, logprobs=top, rope=rope
        )
        request = self.admit(request_id, token_ids[:-1], params, options)
        targets = Targets(first - 1, token_ids[first:])
        return msgspec.structs.replace(request, targets=targets)

    def _room(self, rope: RopeScaling | None) -> Room:
        """What a request has room for under the rotation that it asks for, None: the model's."""
        engine = self.engine
        if rope is not None and rope != engine.rope:
            try:
                rope.check_model(engine.rotary_dim, engine.learned_frequencies)
            except ConfigError as error:
                raise no_such_rotation(error) from error
            if engine.rope.type == "xpos" and (rope.type, rope.scale_base) != (
                "xpos",
                engine.rope.scale_base,
            ):
                raise InvalidRequest(
                    f"rope.type must be xpos, with rope.scale_base {engine.rope.scale_base}, since "
                    f"the model was trained so; got {rope.type}, {rope.scale_base}",
                    "rope",
                )
            if engine.max_profiles == 1:
                raise InvalidRequest(
                    f"rope must be the model's own ({engine.rope.type}) or absent, got "
                    f"{rope.type}: max_profiles of the server is 1",
                    "rope",
                )
        context = (rope or engine.rope).context(engine.max_position)
        return Room(context, engine.block_size, engine.num_blocks)

    def _token_ids(
        self, prompt: str | list[int], overflow: Overflow, room: Room, name: str
    ) -> list[int]:
        """name: a `prompt`, or a `text` of which the last token is not computed, so that it may
        have one more."""
        field = name.partition("[")[0]
        limit = room.context
        what = "the context"
        if overflow != "error":
            limit *= MAX_CONTEXTS
            what = f"overflow {overflow!r} with a context of {room.context}"
        limit += field == "text"
        if isinstance(prompt, str):
            # Checked before tokenising, which can take long for a text that has no spaces.
            if len(prompt) > limit * self.tokenizer.longest_token:
                raise ContextOverflow(
                    f"{name} has {len(prompt)} characters; {what} takes {limit} tokens, which "
                    f"cannot hold more than {limit * self.tokenizer.longest_token}",
                    field,
                )
            try:
                prompt = self.tokenizer.encode(prompt)
            except ValueError as error:
                raise InvalidRequest(f"{name} cannot be tokenised: {error}", field) from error
        else:
            check_token_ids(prompt, self.tokenizer, name, field)
        if not prompt:
            raise InvalidRequest(f"{name} must hold at least one token, got none", field)
        if len(prompt) > limit:
            raise ContextOverflow(f"{name} has {len(prompt)} tokens; {what} takes {limit}", field)
        return prompt
