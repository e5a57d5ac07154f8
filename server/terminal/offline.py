"""Commands that need no server: `ropeway generate` and `ropeway chat`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.frontend.tokenizer import Tokenizer
from engine.params import SamplingParams
from server.chat import ChatTemplate
from server.terminal.conversation import Conversation
from server.terminal.options import (
    DeviceOption,
    DTypeOption,
    FrequencyPenaltyOption,
    IgnoreEosOption,
    KvMemoryOption,
    MinPOption,
    ModelOption,
    PresencePenaltyOption,
    QuantizeOption,
    RepetitionPenaltyOption,
    RopeOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    model_directory,
    option,
    taking,
)
from server.terminal.outcome import MISUSED, fail, reported
from server.terminal.talk import talk

if TYPE_CHECKING:  # it loads PyTorch
    from engine.llm import LLM

SAMPLING = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The model, and how it is asked: options of both commands."""

    model: ModelOption = None
    temperature: TemperatureOption = SAMPLING.temperature
    top_k: TopKOption = SAMPLING.top_k
    top_p: TopPOption = SAMPLING.top_p
    min_p: MinPOption = SAMPLING.min_p
    repetition_penalty: RepetitionPenaltyOption = SAMPLING.repetition_penalty
    presence_penalty: PresencePenaltyOption = SAMPLING.presence_penalty
    frequency_penalty: FrequencyPenaltyOption = SAMPLING.frequency_penalty
    seed: SeedOption = None
    stop: StopOption = None
    ignore_eos: IgnoreEosOption = False
    rope: RopeOption = None
    device: DeviceOption = "auto"
    dtype: DTypeOption = "auto"
    quantize: QuantizeOption = "none"
    kv_memory: KvMemoryOption = None
    threads: ThreadsOption = None

    def params(self, max_tokens: int, stop: Sequence[str] = ()) -> SamplingParams:
        """max_tokens: 0: no limit; stop: unless others were named. Raises InvalidRequest."""
        return SamplingParams(
            max_tokens=max_tokens or None,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop or stop),
            ignore_eos=self.ignore_eos,
            rope=self.rope,
        )

    def llm(self, directory: Path) -> LLM:
        """The model. Raises CheckpointError, TokenizerError or ConfigError."""
        from engine.llm import LLM  # noqa: PLC0415  # loads PyTorch

        return LLM(
            directory,
            self.device,
            self.dtype,
            self.kv_memory,
            quantize=self.quantize,
            threads=self.threads,
            # One runs; there are pages for so many contexts of the model's own as it may stretch.
            max_num_seqs=1 if self.rope is None else math.ceil(self.rope.factor),
        )


@taking(Wanted)
def generate(
    wanted: Wanted,
    prompt: Annotated[
        str,
        typer.Argument(show_envvar=False, help="The text to continue; - reads standard input."),
    ],
    *,
    max_tokens: Annotated[
        int, option(help="Tokens to generate; 0: as many as the context has room for.")
    ] = 128,
) -> None:
    """Continue a prompt in the terminal, without a server; the speed goes to standard error."""
    directory = model_directory(wanted.model)
    with reported():
        params = wanted.params(max_tokens)
        llm = wanted.llm(directory)
        began = time.monotonic()
        moments = []
        if prompt == "-" and sys.stdin is None:
            fail("- reads standard input, which is closed", MISUSED)
        text = sys.stdin.read() if prompt == "-" else prompt
        for delta in llm.stream(text, params):
            moments.append(time.monotonic())
            typer.echo(delta.text, nl=False)
        typer.echo()
    first, rest = moments[0] - began, moments[-1] - moments[0]
    speed = f", then {(len(moments) - 1) / rest:.1f} tokens/s" if rest else ""
    typer.echo(f"{len(moments)} tokens: first after {first:.3f} s{speed}", err=True)


@taking(Wanted)
def chat(
    wanted: Wanted,
    *,
    max_tokens: Annotated[
        int, option(help="Tokens of an answer; 0: as many as the context has room for.")
    ] = 256,
) -> None:
    """Talk with a model in the terminal, without a server; piped in, each line is a turn."""
    directory = model_directory(wanted.model)
    if sys.stdin is None:
        fail("standard input is closed", MISUSED)
    with reported():
        tokenizer = Tokenizer.from_directory(directory)
        template = ChatTemplate.from_directory(directory, tokenizer)
        params = wanted.params(max_tokens, template.stop)
        talk(Conversation(wanted.llm(directory), template, params))
