"""`bench grammar`: what a step costs where outputs must obey a grammar, and where not."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from engine.config import DType
from engine.core import grammar_vocabulary
from engine.execution.matcher import Matcher, Vocabulary, masks_of
from engine.params import Grammar
from loadtest.figures import percentile, ranged, spread
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.report import Column, offline_document
from loadtest.workload import Measured, Workload

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["sailor", "cook", "captain"]},
        "ships": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "ships"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, Grammar | None] = {
    "none": None,
    # Neither can end early, so that all streams run to their last token.
    "json_schema": Grammar(
        "json_schema", json.dumps({"type": "array", "items": PERSON, "minItems": 1000})
    ),
    "regex": Grammar("regex", r"([A-Z][a-z]{1,12}( [a-z]{1,12}){3,9}[.?!] ){1000}"),
}


def _masks(row: Any) -> str:
    return f"{row['mask_us']}, {row['mask_us_p95']}" if "mask_us" in row else ""


COLUMNS: Sequence[Column] = (
    ("grammar", lambda row: row["grammar"]),
    ("streams", lambda row: str(row["streams"])),
    ("step ms", lambda row: ranged(row["step_ms"])),
    ("added ms", lambda row: ranged(row.get("added_ms"))),
    ("p95 of steps ms", lambda row: ranged(row["step_ms_p95"])),
    ("masks of a step ms", lambda row: str(row.get("masks_ms", ""))),
    ("one mask us, p95", _masks),
)


def measure(
    model: Path,
    dtype: DType,
    threads: int | None,
    streams: Sequence[int],
    output_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Each number of streams without a grammar and with each, in turns.

    `masks_ms` is what the masks of a step take by themselves, replayed over the same outputs by one
    thread; `added_ms` is what they add to the step, so what of it the network's work did not hide.
    progress: called repeats + 1 times for each number of streams.
    """
    others = Others()
    llm = LLM(model, dtype=dtype, threads=threads, max_num_seqs=max(streams))
    info = llm.info
    machine = Machine.measure(info.threads)
    vocabulary = grammar_vocabulary(model, info.eos_token_id)
    results = []
    for count in streams:
        workload = Workload(count, 16, output_tokens, len(llm.tokenizer))
        runs: dict[str, list[Measured]] = {name: [] for name in GRAMMARS}
        masks: dict[str, list[float]] = {}
        for repeat in range(repeats + 1):
            for name, grammar in GRAMMARS.items():
                measured, outputs = _run(llm, workload, repeat, grammar)
                if repeat:  # the first run warms up
                    runs[name].append(measured)
                elif grammar is not None:
                    masks[name] = _mask_seconds(vocabulary, grammar, outputs)
            progress()
        results += [_result(name, count, runs, masks) for name in GRAMMARS]
    return offline_document("grammar", info, machine, others, results, repeats)


def _run(
    llm: LLM, workload: Workload, repeat: int, grammar: Grammar | None
) -> tuple[Measured, list[list[int]]]:
    """All streams through the engine in this process, and their tokens."""
    params = SamplingParams(
        max_tokens=workload.output_tokens,
        ignore_eos=grammar is None,  # a grammar's end is the output's
        seed=repeat,
        grammar=grammar,
    )
    outputs: list[list[int]] = [[] for _ in range(workload.streams)]
    measured = Measured()
    for stream, delta in llm.stream_all(list(workload.prompts(repeat)), params):
        measured.token(stream)
        outputs[stream].append(delta.token_id)
    return measured, outputs


def _mask_seconds(
    vocabulary: Vocabulary, grammar: Grammar, outputs: Sequence[Sequence[int]]
) -> list[float]:
    """What each mask of these outputs takes, alone."""
    seconds = []
    for output in outputs:
        matcher = Matcher(vocabulary, grammar)
        for token_id in output:
            began = time.perf_counter()
            masks_of([matcher], vocabulary)
            seconds.append(time.perf_counter() - began)
            matcher.take([token_id])
    return seconds


def _result(
    name: str, count: int, runs: dict[str, list[Measured]], masks: dict[str, list[float]]
) -> dict[str, Any]:
    steps = {each: [_steps_ms(run) for run in some] for each, some in runs.items()}
    medians = {each: [statistics.median(step) for step in some] for each, some in steps.items()}
    result: dict[str, Any] = {
        "grammar": name,
        "streams": count,
        "step_ms": spread(medians[name], 3),
        "step_ms_p95": spread([percentile(step, 0.95) for step in steps[name]], 3),
    }
    if name in masks:
        pairs = zip(medians[name], medians["none"], strict=True)
        result["added_ms"] = spread([with_it - without for with_it, without in pairs], 3)
        seconds = masks[name]
        result["masks_ms"] = round(1000 * count * statistics.mean(seconds), 3)
        result["mask_us"] = round(1e6 * statistics.median(seconds), 1)
        result["mask_us_p95"] = round(1e6 * percentile(seconds, 0.95), 1)
    return result


def _steps_ms(run: Measured) -> list[float]:
    """Between consecutive tokens of a stream lies a step of all."""
    return [1000 * gap for gap in run.gaps_s]
