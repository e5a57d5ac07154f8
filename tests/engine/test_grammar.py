"""Outputs that obey a grammar: each one, alone or among others, preempted or recovered."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine import LLM, SamplingParams
from engine.errors import GrammarFailed, InvalidRequest
from engine.execution.masks import GrammarMasks
from engine.execution.matcher import Matcher, Vocabulary, masks_of
from engine.grammar import check
from engine.params import Grammar
from engine.request import FinishReason, Request
from tests.models import EOS, tiny_config, write_model
from tests.patience import PATIENCE

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
DATE = Grammar("regex", r"\d{4}-(0[1-9]|1[0-2])-\d\d")
YES = Grammar("choice", json.dumps(["yes", "no", 'per"haps', "né"]))


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return LLM(tiny_model_dir, "cpu", "float32")


def params(grammar: Grammar | None, seed: int, **settings: object) -> SamplingParams:
    return SamplingParams(grammar=grammar, seed=seed, max_tokens=100, **settings)  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_every_output_obeys(llm: LLM, temperature: float) -> None:
    grammars = [JSON, DATE, YES] * 6
    each = [params(grammar, seed, temperature=temperature) for seed, grammar in enumerate(grammars)]
    outputs = llm.generate(["the a"] * len(each), each)
    for grammar, output in zip(grammars, outputs, strict=True):
        assert output.finish_reason is FinishReason.STOP, output.text
        if grammar is JSON:
            jsonschema.validate(json.loads(output.text), SCHEMA)
        elif grammar is DATE:
            assert re.fullmatch(DATE.text, output.text)
        else:
            assert output.text in json.loads(YES.text)
    if temperature:
        assert len({output.text for output in outputs}) > 6


def test_neighbours_and_preemption_change_nothing(tiny_model_dir: Path, llm: LLM) -> None:
    prompts = ["the a" * 8, "in", "he" * 20, "a"]
    each = [params(JSON, 1), params(None, 2), params(JSON, 3), params(DATE, 4)]
    alone = [
        llm.generate([one], [how])[0].token_ids for one, how in zip(prompts, each, strict=True)
    ]
    together = [output.token_ids for output in llm.generate(prompts, each)]
    assert together == alone
    small = LLM(tiny_model_dir, "cpu", "float32", kv_memory=9 * 16 * 2 * 2 * 64 * 4, block_size=16)
    assert [output.token_ids for output in small.generate(prompts * 3, each * 3)] == alone * 3
    assert small.stats.preemptions > 0


def test_recovery_rebuilds_the_state_from_the_tokens(llm: LLM) -> None:
    """What another engine is told after a crash: the prompt, and the output so far."""
    (whole,) = llm.generate(["the a"], [params(JSON, 5)])
    request = llm._admission.admit("x", "the a", params(JSON, 5))
    for cut in range(len(whole.token_ids)):
        again = msgspec.structs.replace(
            request, request_id=f"x{cut}", output_token_ids=whole.token_ids[:cut]
        )
        llm._core.add(again)
        rest: list[int | None] = []
        reason = None
        while reason is None:
            for output in llm._core.step():
                rest.append(output.token_id)
                reason = output.finish_reason
        assert rest == whole.token_ids[cut:]


def test_a_model_without_an_end_token(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config(eos_token_id=None))
    llm = LLM(tmp_path, "cpu", "float32")
    (output,) = llm.generate(["the"], [params(YES, 0)])
    assert output.text in json.loads(YES.text)
    assert output.finish_reason is FinishReason.STOP


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    (output,) = llm.generate(["the"], [params(YES, 0, logprobs=1)])
    assert output.logprobs is not None
    assert any(each.logprob < each.top[0][1] for each in output.logprobs)


@pytest.mark.parametrize(
    ("grammar", "field", "words"),
    [
        (Grammar("regex", "(a"), "regex", "unclosed group"),
        (Grammar("json_schema", '{"type": "strung"}'), "response_format", "strung"),
        (Grammar("json_schema", "{"), "response_format", "cannot be obeyed"),
    ],
)
def test_what_cannot_be_obeyed(grammar: Grammar, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check(grammar)
    assert caught.value.field == field


def test_limits_and_what_does_not_go_together() -> None:
    with pytest.raises(InvalidRequest, match="at most 65536 characters, got 65537"):
        SamplingParams(grammar=Grammar("regex", "a" * 65_537))
    with pytest.raises(InvalidRequest, match="ignore_eos cannot go with regex"):
        SamplingParams(grammar=DATE, ignore_eos=True)


def test_an_absent_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammar.INSTALLED", False)
    with pytest.raises(InvalidRequest, match=r"ropeway\[grammar\]"):
        check(DATE)


def test_an_output_that_cannot_go_on_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Matcher.take

    def stuck(self: Matcher, token_ids: list[int]) -> None:
        if self.num_tokens == 3:
            raise GrammarFailed("too complex")
        taken(self, token_ids)

    monkeypatch.setattr(Matcher, "take", stuck)
    with pytest.raises(GrammarFailed, match="too complex"):
        llm.generate(["the"], [params(DATE, 0)])
    monkeypatch.undo()
    assert llm.stats.blocks_free == llm.stats.blocks_total
    assert re.fullmatch(DATE.text, llm.generate(["the"], [params(DATE, 0)])[0].text)


def small_vocabulary() -> Vocabulary:
    return Vocabulary([bytes([byte]) for byte in range(256)] + [b"<end>"], [256], 256)


def request(grammar: Grammar, output: list[int]) -> Request:
    return Request(
        "r",
        [1],
        SamplingParams(grammar=grammar),
        seed=0,
        max_tokens=9,
        stop_token_ids=frozenset([EOS]),
        output_token_ids=output,
    )


@pytest.fixture
def masks() -> GrammarMasks:
    return GrammarMasks(small_vocabulary)


def test_a_mask_allows_what_the_grammar_does(masks: GrammarMasks) -> None:
    """Against Python's own regular expressions: which byte may follow `2`."""
    logits = torch.zeros(300)
    one = request(Grammar("regex", "(2[0-3]|1[0-9])"), [ord("2")])
    masks.prepare([one])
    masks.apply(logits, one)
    assert logits.isfinite().nonzero().flatten().tolist() == [*b"0123"]
    assert masks.take(one, ord("1"))


def test_nothing_that_the_model_could_say(masks: GrammarMasks) -> None:
    logits = torch.zeros(300)
    logits[ord("b")] = -torch.inf
    one = request(Grammar("regex", "ab"), [ord("a")])
    masks.prepare([one])
    with pytest.raises(GrammarFailed, match="no token of the model"):
        masks.apply(logits, one)
    assert logits[0] == 0


def test_masks_are_found_in_another_thread(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare() returns while the masks are still being found."""
    gate = threading.Event()

    def slow(matchers: Sequence[Matcher], vocabulary: Vocabulary) -> NDArray[np.uint8]:
        assert gate.wait(PATIENCE)
        return masks_of(matchers, vocabulary)

    monkeypatch.setattr("engine.execution.masks.masks_of", slow)
    one = request(DATE, [])
    masks.prepare([one])  # fails where it waits for the gate
    gate.set()
    masks.apply(torch.zeros(257), one)
