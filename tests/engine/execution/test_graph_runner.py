"""The engine one step ahead of itself: the tokens of the plain one, whatever comes between.

The graph is a fake: it computes the rows that are present by the CPU's kernels and samples as the
host does, so that tokens can be compared to the bit. `test_cuda_graphs` tries the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import core
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.execution.cuda_graphs import NOT_RUN, DecodeGraphs, DecodeState
from engine.execution.graph_runner import GraphRunner
from engine.execution.inputs import InputBatch
from engine.execution.journal import StepJournal
from engine.execution.runner import ModelRunner
from engine.execution.sampler import Sampler
from engine.execution.sampling_tensors import SamplingTensors
from engine.execution.transfer import Download
from engine.grammar import INSTALLED as GRAMMARS
from engine.messages import AddRequest, EngineOutput
from engine.model.attention.base import AttentionBackend, AttentionMetadata
from engine.model.gpt2 import GPT2
from engine.params import MAX_LOGPROBS, Grammar, SamplingParams
from engine.request import Request
from tests.lives import PAGE, SIZE, Lives, drive, plain_engine

LETTERS = Grammar("regex", "[a-z]{30,}")


class HostTokens:
    """A DeviceSampler that draws as `Sampler` does, from what the device knows."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def sample(self, logits: Tensor, params: SamplingTensors, sampled: Tensor) -> None:
        requests = [known_on_device(params, row) for row in range(len(logits))]
        tokens = self._sampler.sample(logits.float().clone(), requests)
        for request in requests:
            self._sampler.forget(request.request_id)  # what is known is on the device
        floats = sampled.view(torch.float32)
        for row, token in enumerate(tokens):
            sampled[row, 0] = token.token_id
            if token.logprobs is not None:
                floats[row, 1] = token.logprobs.logprob
                for at, (token_id, logprob) in enumerate(token.logprobs.top):
                    sampled[row, 2 + at] = token_id
                    floats[row, 2 + MAX_LOGPROBS + at] = logprob


def known_on_device(params: SamplingTensors, row: int) -> Request:
    """A request that has the parameters and the counts of a row."""
    repetition, frequency, presence = params.penalties[row].double().tolist()
    index = int(params.index[row])
    prompt, output = [0], [0] * index
    if (repetition, frequency, presence) != (1.0, 0.0, 0.0):
        counts = params.counts[row].numpy()
        prompt = np.flatnonzero(counts & 1).tolist()
        output = np.repeat(np.arange(len(counts)), counts >> 1).tolist()
        assert len(output) == index
    biases = slice(int(params.num_biases[row]))
    ids, values = params.bias_ids[row, biases], params.bias_values[row, biases]
    num_logprobs = int(params.num_logprobs[row])
    return Request(
        f"row {row}",
        prompt,
        SamplingParams(
            temperature=float(params.temperature[row]),
            top_k=int(params.top_k[row]),
            top_p=float(params.top_p[row]),
            min_p=float(params.min_p[row]),
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            logit_bias=dict(zip(ids.tolist(), values.tolist(), strict=True)),
            logprobs=num_logprobs if num_logprobs >= 0 else None,
        ),
        seed=int(params.seed[row : row + 1].numpy().view(np.uint64)[0]),
        max_tokens=1,
        stop_token_ids=frozenset(),
        output_token_ids=output,
        choice=int(params.choice[row]),
    )


class Recorder:
    """Runs the work again."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def free_memory(self) -> int:
        return 0


@dataclass
class FakeStep:
    """What DecodeStep does, of the rows that are present."""

    model: GPT2
    backend: AttentionBackend
    sampler: HostTokens
    state: DecodeState
    rows: list[int] = field(default_factory=list)  # how many were computed, for each step

    def __call__(self, num_rows: int) -> None:
        state = self.state
        present = state.positions[:num_rows] < state.num_blocks[:num_rows] * SIZE
        at = present.nonzero()[:, 0]
        state.sampled[:num_rows, 0] = NOT_RUN
        self.rows.append(len(at))
        if not len(at):
            return
        positions = state.positions[at]
        blocks = state.block_tables[at, (positions // SIZE).long()].long()
        metadata = AttentionMetadata(
            query_start=torch.arange(len(at) + 1, dtype=torch.int32),
            positions=positions,
            slot_mapping=blocks * SIZE + positions % SIZE,
            block_tables=state.block_tables[at],
            bases=state.bases[at],
            num_blocks=state.num_blocks[at],
            profiles=state.profiles[at],
        )
        hidden = self.model(state.token_ids[at], self.backend.bind(metadata))
        params = SamplingTensors(**{name: each[at] for name, each in vars(state.sampling).items()})
        sampled = state.sampled[at]
        self.sampler.sample(self.model.logits(hidden), params, sampled)
        state.sampled[at] = sampled
        tokens = sampled[:, 0].long()
        state.token_ids[at] = tokens
        state.positions[at] += 1
        state.sampling.index[at] += 1
        state.sampling.counts[at, tokens] += 2


def engine_ahead(
    monkeypatch: pytest.MonkeyPatch,
    directory: Path,
    pages: int,
    config: SchedulerConfig,
    journal: StepJournal | None = None,
) -> tuple[EngineCore, FakeStep]:
    """The same engine with graphs; and what they compute."""
    made: list[FakeStep] = []

    def select(
        model: GPT2,
        backend: AttentionBackend,
        sampler: Sampler,
        batch: InputBatch,
        unused_token_ids: Sequence[int],
    ) -> GraphRunner:
        max_rows, max_blocks = batch.block_tables.shape
        state = DecodeState(max_rows, max_blocks, SIZE, model.config.vocab_size, "cpu")
        tokens = HostTokens(Sampler(model.config.vocab_size, unused_token_ids))
        step = FakeStep(model, backend, tokens, state)
        made.append(step)
        eager = ModelRunner(model, backend, sampler, batch)
        return GraphRunner(eager, state, DecodeGraphs(step, state, Recorder(), (1, 4)), tokens)

    with monkeypatch.context() as patch:
        patch.setattr(core, "select_runner", select)
        engine_config = EngineConfig(
            model_dir=str(directory),
            device="cpu",
            dtype="float32",
            cache=CacheConfig(block_size=SIZE, kv_memory=pages * PAGE),
            scheduler=config,
        )
        return EngineCore(engine_config, journal), made[0]


def told(outputs: Sequence[EngineOutput]) -> list[tuple[object, ...]]:
    return [(o.index, o.token_id, o.finish_reason, o.logprobs, o.scores, o.error) for o in outputs]


@pytest.mark.parametrize("seed", range(8))
def test_random_lives_have_the_tokens_of_the_plain_engine(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    lives = Lives.drawn(seed)
    expected = drive(plain_engine(tiny_model_dir, lives.pages, lives.config), lives.arrivals, {})
    ahead, step = engine_ahead(monkeypatch, tiny_model_dir, lives.pages, lives.config)
    actual = drive(ahead, lives.arrivals, lives.aborts)
    for name, outputs in expected.items():
        got = told(actual.get(name, []))
        whole = name not in lives.gone
        assert got == (told(outputs) if whole else told(outputs)[: len(got)]), name
    assert ahead.stats.blocks_free == ahead.stats.blocks_total
    assert sum(step.rows) > sum(map(len, actual.values())) / 3  # most are by graphs


def request(name: str, max_tokens: int, *, prompt: int = 20, **changes: object) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_token_ids=[5] * prompt,
        params=SamplingParams(temperature=1.0, **changes),  # type: ignore[arg-type]  # by name
        seed=ord(name),
        max_tokens=max_tokens,
        stop_token_ids=[],
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"frequency_penalty": 0.5, "logit_bias": {3: 2.0}, "logprobs": 2}],
    ids=["plain", "changed"],
)
def test_a_stream_alone_is_computed_once(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """After its prompt every token is a graph's, and the last is not computed on."""
    engine, step = engine_ahead(monkeypatch, tiny_model_dir, 60, SchedulerConfig())
    recorded = len(step.rows)
    assert len(drive(engine, {0: [request("a", 40, **changes)]}, {})["a"]) == 40
    assert sum(step.rows[recorded:]) == 39


def test_what_comes_after_the_end_is_dropped(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, step = engine_ahead(monkeypatch, tiny_model_dir, 60, SchedulerConfig())
    whole = drive(engine, {0: [request("a", 40)]}, {})["a"]
    stop = whole[20].token_id
    assert stop is not None
    first = next(at for at, output in enumerate(whole) if output.token_id == stop)
    computed = sum(step.rows)
    arrival = request("a", 40)
    stopped = AddRequest(
        **{name: getattr(arrival, name) for name in arrival.__struct_fields__}
        | {"stop_token_ids": [stop]}
    )
    got = drive(engine, {0: [stopped], first: [request("b", 30)]}, {})
    assert [output.token_id for output in got["a"]] == [o.token_id for o in whole[: first + 1]]
    assert sum(step.rows) - computed == (first + 1) + 29  # one of a's for nothing
    alone = drive(plain_engine(tiny_model_dir, 60, SchedulerConfig()), {0: [request("b", 30)]}, {})
    assert told(got["b"]) == told(alone["b"])
    assert engine.stats.blocks_free == engine.stats.blocks_total


def test_a_name_may_be_anothers_at_once(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Aborted and added again between two steps, while a token of the first one is computed."""
    engine, _ = engine_ahead(monkeypatch, tiny_model_dir, 60, SchedulerConfig())
    engine.add(request("a", 40))
    engine.step()
    engine.abort("a")
    got = drive(engine, {0: [request("a", 20, prompt=33)]}, {})["a"]
    plain = plain_engine(tiny_model_dir, 60, SchedulerConfig())
    assert told(got) == told(drive(plain, {0: [request("a", 20, prompt=33)]}, {})["a"])


@pytest.mark.skipif(not GRAMMARS, reason="the extra `grammar` is not installed")
def test_rows_that_need_the_host_leave_the_others_in_the_graph(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, step = engine_ahead(monkeypatch, tiny_model_dir, 60, SchedulerConfig())
    recorded = len(step.rows)
    outputs = drive(engine, {0: [request("a", 30), request("b", 30, grammar=LETTERS)]}, {})
    assert [len(outputs[name]) for name in "ab"] == [30, 30]
    assert step.rows[recorded:] == [1] * 29


def test_logits_that_are_not_finite_are_an_error_of_those_who_want_the_token(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engine_ahead(monkeypatch, tiny_model_dir, 60, SchedulerConfig())
    engine.add(request("a", 30))
    engine.add(request("b", 30))
    engine.step()  # and the next one runs
    engine.abort("a")
    runner = engine._runner
    assert isinstance(runner, GraphRunner)

    def arrive(*tokens: int) -> None:
        lines = torch.tensor(tokens, dtype=torch.int32)[:, None]
        monkeypatch.setattr(runner, "_running", Download.start(lines))

    arrive(-1, 5)
    assert [(o.request_id, o.token_id) for o in engine.step()] == [("b", 5)]
    arrive(5, -1)
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.step()


def test_the_journal_names_what_runs_ahead(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step"

    def left() -> tuple[dict[str, int], list[str]]:
        with StepJournal(path) as dead:
            return dead.suspects, dead.poisoned

    with StepJournal(path) as journal:
        engine, _ = engine_ahead(monkeypatch, tiny_model_dir, 60, SchedulerConfig(), journal)
        engine.add(request("a", 30))
        engine.step()
        assert left() == ({"a": 1}, [])  # between two steps, which die together
        engine.add(AddRequest(**_fields(request("s", 30)) | {"suspect_at": 0}))
        seen: list[tuple[dict[str, int], list[str]]] = []
        execute = engine._runner.execute
        monkeypatch.setattr(
            engine._runner, "execute", lambda step: (seen.append(left()), execute(step))[1]
        )
        journal.begin({"a": 1}, alone=False)
        engine.step()
        # The suspect's step, but a's is still running.
        assert seen == [({"a": 1, "s": 0}, [])]
        assert left() == ({"s": 1}, [])  # it came further, and its next token is computed
        journal.begin({"s": 1}, alone=True)
        engine.step()
        assert seen[1] == ({"a": 1, "s": 1}, [])


def _fields(message: AddRequest) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__struct_fields__}
