"""Commands that need no server: `ropeway generate` and `ropeway chat`."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from engine.frontend.tokenizer import Tokenizer
from engine.request import SamplingParams
from server.chat import ChatTemplate
from server.conversation import Conversation
from server.options import (
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
    SeedOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    model_directory,
    option,
)
from server.outcome import MISUSED, fail, reported
from server.talk import talk

SAMPLING = SamplingParams()


def generate(
    prompt: Annotated[
        str,
        typer.Argument(show_envvar=False, help="The text to continue; - reads standard input."),
    ],
    *,
    model: ModelOption = None,
    max_tokens: Annotated[
        int, option(help="Tokens to generate; 0: as many as the context has room for.")
    ] = 128,
    temperature: TemperatureOption = SAMPLING.temperature,
    top_k: TopKOption = SAMPLING.top_k,
    top_p: TopPOption = SAMPLING.top_p,
    min_p: MinPOption = SAMPLING.min_p,
    repetition_penalty: RepetitionPenaltyOption = SAMPLING.repetition_penalty,
    presence_penalty: PresencePenaltyOption = SAMPLING.presence_penalty,
    frequency_penalty: FrequencyPenaltyOption = SAMPLING.frequency_penalty,
    seed: SeedOption = None,
    stop: StopOption = None,
    ignore_eos: IgnoreEosOption = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt in the terminal, without a server; the speed goes to standard error."""
    directory = model_directory(model)
    with reported():
        params = SamplingParams(
            max_tokens=max_tokens or None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
        )
        # This loads PyTorch, which the other commands do without.
        from engine.llm import LLM  # noqa: PLC0415

        llm = LLM(
            directory,
            device,
            dtype,
            kv_memory,
            quantize=quantize,
            threads=threads,
            max_num_seqs=1,
        )
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


def chat(
    *,
    model: ModelOption = None,
    max_tokens: Annotated[
        int, option(help="Tokens of an answer; 0: as many as the context has room for.")
    ] = 256,
    temperature: TemperatureOption = SAMPLING.temperature,
    top_k: TopKOption = SAMPLING.top_k,
    top_p: TopPOption = SAMPLING.top_p,
    min_p: MinPOption = SAMPLING.min_p,
    repetition_penalty: RepetitionPenaltyOption = SAMPLING.repetition_penalty,
    presence_penalty: PresencePenaltyOption = SAMPLING.presence_penalty,
    frequency_penalty: FrequencyPenaltyOption = SAMPLING.frequency_penalty,
    seed: SeedOption = None,
    stop: StopOption = None,
    ignore_eos: IgnoreEosOption = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = "auto",
    quantize: QuantizeOption = "none",
    kv_memory: KvMemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Talk with a model in the terminal, without a server; piped in, each line is a turn."""
    directory = model_directory(model)
    if sys.stdin is None:
        fail("standard input is closed", MISUSED)
    with reported():
        tokenizer = Tokenizer.from_directory(directory)
        template = ChatTemplate.from_directory(directory, tokenizer)
        params = SamplingParams(
            max_tokens=max_tokens or None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=tuple(stop or template.stop),
            ignore_eos=ignore_eos,
        )
        # This loads PyTorch, which the other commands do without.
        from engine.llm import LLM  # noqa: PLC0415

        llm = LLM(
            directory,
            device,
            dtype,
            kv_memory,
            quantize=quantize,
            threads=threads,
            max_num_seqs=1,
        )
        talk(Conversation(llm, template, params))
