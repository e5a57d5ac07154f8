"""LLM: the engine in this process, for offline batches and tests."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import msgspec

from engine.config import (
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    Quantize,
    SchedulerConfig,
    SharedPrefix,
)
from engine.core import EngineCore
from engine.errors import GrammarFailed, InvalidRequest
from engine.frontend.admission import Admission, Usage
from engine.frontend.output import OutputProcessor, TokenDelta
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, EngineOutput, EngineReady, EngineStats, TokenLogprobs
from engine.params import RequestOptions, SamplingParams
from engine.request import FinishReason, Window
from engine.scaling import RopeScaling


@dataclass(slots=True)
class Completion:
    """What one prompt led to."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage = field(default_factory=lambda: Usage(0, 0))


@dataclass(frozen=True, slots=True)
class Score:
    """What the model thinks of a text.

    logprobs: of token_ids from `first` on, each given all before it that the context holds.
    """

    token_ids: list[int]
    first: int
    logprobs: list[TokenLogprobs]
    usage: Usage

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-math.fsum(each.logprob for each in self.logprobs) / len(self.logprobs))


class LLM:
    """An engine to call. Not for several threads at once."""

    def __init__(
        self,
        model_dir: str | Path,
        device: Device = "auto",
        dtype: DType = "auto",
        kv_memory: int | None = None,
        *,
        quantize: Quantize = "none",
        threads: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        block_size: int = 64,
        max_profiles: int = SchedulerConfig().max_profiles,
        shared_prefixes: Sequence[SharedPrefix] = (),
    ) -> None:
        """kv_memory: bytes for the cache. Raises CheckpointError, TokenizerError or ConfigError."""
        self.tokenizer = Tokenizer.from_directory(Path(model_dir))
        self._core = EngineCore(
            EngineConfig(
                model_dir=str(model_dir),
                device=device,
                dtype=dtype,
                quantize=quantize,
                threads=threads,
                cache=CacheConfig(
                    block_size=block_size,
                    kv_memory=kv_memory,
                    shared_prefixes=tuple(shared_prefixes),
                ),
                scheduler=SchedulerConfig(
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                    max_profiles=max_profiles,
                ),
                num_token_ids=len(self.tokenizer),
                unused_token_ids=tuple(self.tokenizer.unused_ids),
            )
        )
        self._admission = Admission(self.tokenizer, self._core.ready)
        self._ids = map(str, count())
        self._inboxes: dict[str, deque[EngineOutput]] = {}

    @property
    def info(self) -> EngineReady:
        """The sizes that were settled."""
        return self._core.ready

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters as they stand."""
        return self._core.stats

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        options: RequestOptions = RequestOptions(),
    ) -> list[Completion]:
        """Complete every prompt, batched together; results in the order of the prompts.

        params: one for all, or one each. Raises RequestError before anything runs.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts must be a list; for one text pass [text]", "prompts")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts but {len(each)} params", "params")
        requests = [self._admit(*pair, options) for pair in zip(prompts, each, strict=True)]
        completions = {
            request.request_id: Completion(
                request.prompt_token_ids, logprobs=_empty(request.params)
            )
            for request in requests
        }
        cached_tokens = dict.fromkeys(completions, 0)
        for output, delta, finish_reason in self._run(requests):
            completion = completions[output.request_id]
            cached_tokens[output.request_id] += output.cached_tokens
            completion.finish_reason = finish_reason
            if delta is None:
                continue
            completion.token_ids.append(delta.token_id)
            completion.text += delta.text
            if completion.logprobs is not None and delta.logprobs is not None:
                completion.logprobs.append(delta.logprobs)
        for request in requests:
            completion = completions[request.request_id]
            completion.usage = Usage.of(
                request, len(completion.token_ids), cached_tokens[request.request_id]
            )
        return list(completions.values())

    def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams = SamplingParams(),
        options: RequestOptions = RequestOptions(),
    ) -> Generator[TokenDelta]:
        """Complete one prompt, token by token. Leaving early aborts."""
        for _, delta, _ in self._run([self._admit(prompt, params, options)]):
            if delta is not None:
                yield delta

    def stream_all(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams = SamplingParams(),
        options: RequestOptions = RequestOptions(),
    ) -> Iterator[tuple[int, TokenDelta]]:
        """Complete every prompt, batched together; (place of the prompt, token) as they come."""
        requests = [self._admit(prompt, params, options) for prompt in prompts]
        places = {request.request_id: place for place, request in enumerate(requests)}
        for output, delta, _ in self._run(requests):
            if delta is not None:
                yield places[output.request_id], delta

    def score(
        self,
        texts: Sequence[str | list[int]],
        options: RequestOptions = RequestOptions(),
        *,
        first: int = 1,
        top: int = 0,
        rope: RopeScaling | None = None,
        window: Window | None = None,
    ) -> list[Score]:
        """The log-probability of every token of every text from `first` on, batched together.

        The same scheduler, pages and network compute it as would generate the text; a text that is
        longer than the context needs overflow `shift`. top: likeliest tokens to give beside each.
        rope: the rotation profile, None: the model's own. window: instead of what `shift` would
        take, for experiments. Raises RequestError before anything runs, and InvalidRequest where
        timeout_s is too short.
        """
        if isinstance(texts, str):
            raise InvalidRequest("texts must be a list; for one text pass [text]", "texts")
        requests = [
            self._admission.admit_score(
                next(self._ids), text, options, first=first, top=top, rope=rope
            )
            for text in texts
        ]
        if window is not None:
            requests = [msgspec.structs.replace(each, window=window) for each in requests]
        ended = {output.request_id: output for output, _, _ in self._run(requests)}
        return [self._score(each, ended[each.request_id]) for each in requests]

    @staticmethod
    def _score(request: AddRequest, output: EngineOutput) -> Score:
        assert request.targets is not None
        if output.scores is None:
            raise InvalidRequest(
                f"timeout_s of {request.options.timeout_s} is too short for the text", "timeout_s"
            )
        return Score(
            request.prompt_token_ids + request.targets.token_ids[-1:],
            request.targets.first + 1,
            output.scores,
            Usage.of(request, 0, output.cached_tokens),
        )

    def _admit(
        self, prompt: str | list[int], params: SamplingParams, options: RequestOptions
    ) -> AddRequest:
        return self._admission.admit(next(self._ids), prompt, params, options)

    def _run(
        self, requests: Sequence[AddRequest]
    ) -> Iterator[tuple[EngineOutput, TokenDelta | None, FinishReason | None]]:
        """Steps until all have ended; aborts what is left if the caller leaves.

        Steps also carry what other calls have open; their outputs wait in their inboxes.
        """
        open_outputs: dict[str, OutputProcessor] = {}
        try:
            for request in requests:
                open_outputs[request.request_id] = OutputProcessor(
                    self.tokenizer, request.params, frozenset(request.stop_token_ids)
                )
                self._inboxes[request.request_id] = deque()
                self._core.add(request)
            while open_outputs:
                for request_id, processor in list(open_outputs.items()):
                    inbox = self._inboxes[request_id]
                    while inbox and processor.finish_reason is None:
                        output = inbox.popleft()
                        if output.error is not None:
                            raise GrammarFailed(output.error)
                        delta = processor.process(output)
                        if processor.finish_reason is not None:
                            del open_outputs[request_id]
                            self._close(request_id)
                        yield output, delta, processor.finish_reason
                if open_outputs:
                    self._step()
        finally:
            for request_id in open_outputs:
                self._close(request_id)

    def _step(self) -> None:
        for output in self._core.step():
            self._inboxes[output.request_id].append(output)

    def _close(self, request_id: str) -> None:
        self._core.abort(request_id)
        del self._inboxes[request_id]


def _empty(params: SamplingParams) -> list[TokenLogprobs] | None:
    return None if params.logprobs is None else []
