"""The engine without its process, tokenizer and HTTP: its scheduler, runner, cache and network.

For machines with a GPU and little else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from engine.config import ModelConfig, SchedulerConfig
from engine.execution.cuda_graphs import DecodeGraphs, DecodeState, DecodeStep, Recorder
from engine.execution.device_sampler import DeviceSampler
from engine.execution.graph_runner import GraphRunner
from engine.execution.inputs import InputBatch
from engine.execution.runner import ModelRunner, Runner
from engine.execution.sampler import Sampler
from engine.messages import EngineOutput
from engine.model.attention.base import KVCache
from engine.model.attention.triton import Tile, TritonBackend
from engine.model.gpt2 import GPT2
from engine.model.profiles import ProfileTables
from engine.params import RequestOptions, SamplingParams
from engine.request import Request
from engine.scaling import UNSCALED
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.profiles import OWN
from engine.scheduling.scheduler import Scheduler

GREEDY = SamplingParams(temperature=0.0)


def random_model(config: ModelConfig, dtype: torch.dtype, device: str, std: float = 0.3) -> GPT2:
    """Weights from a fixed seed, made on the CPU."""
    generator = torch.Generator().manual_seed(0)
    model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(device, dtype).eval().requires_grad_(False)


class Again:
    """A recorder that does the work again: without CUDA."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        return work

    def free_memory(self) -> int:
        """See Recorder."""
        return 0


@dataclass
class Generated:
    """Tokens [num_seqs][num_tokens]; seconds until each had its first, and until all were done.

    steps_s: of each step that decoded all sequences and nothing else, what it took.
    """

    tokens: list[list[int]]
    first_s: float = 0.0
    whole_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)


class BareEngine:
    """What EngineCore puts together, around a network that is here already."""

    def __init__(
        self,
        model: GPT2,
        *,
        scheduler: SchedulerConfig,
        num_blocks: int,
        block_size: int,
        recorder: Recorder | None,
        wide: Tile | None = None,
        num_processors: int | None = None,
    ) -> None:
        """recorder: None: no graphs, and the host samples. wide, num_processors: see
        TritonBackend."""
        config, weight = model.config, model.embedding.weight
        self.block_size, device = block_size, weight.device
        cache = KVCache.allocate(
            config, num_blocks, block_size, weight.dtype, device, dimensions_last=True
        )
        tables = ProfileTables(config, block_size, device=device)
        self.backend = TritonBackend(
            config, tables, cache, wide=wide, num_processors=num_processors
        )
        self.backend.put_profile(OWN, UNSCALED, block_size)
        rows, pages = scheduler.max_num_seqs, -(-config.max_position // block_size)
        sampler = Sampler(config.vocab_size)
        self.eager = ModelRunner(model, self.backend, sampler, InputBatch(rows, pages))
        self.runner: Runner = self.eager
        if recorder is not None:
            self.state = DecodeState(rows, pages, block_size, config.vocab_size, device)
            on_device = DeviceSampler(config.vocab_size, device=device)
            step = DecodeStep(model, self.backend, on_device, self.state)
            self.graphs = DecodeGraphs(step, self.state, recorder)
            self.runner = GraphRunner(self.eager, self.state, self.graphs, on_device)
        pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(scheduler, pool, look_ahead=self.runner.looks_ahead)
        self._count = 0

    def add(self, prompt: Sequence[int], num_tokens: int, params: SamplingParams = GREEDY) -> str:
        """Queue a request that nothing but its length ends, and whose pages nobody shares."""
        self._count += 1
        name = str(self._count)
        self.scheduler.add(
            Request(
                name,
                list(prompt),
                params,
                seed=params.seed or 0,
                max_tokens=num_tokens,
                stop_token_ids=frozenset(),
                options=RequestOptions(cache_salt=name),
            )
        )
        return name

    def step(self) -> tuple[int, list[EngineOutput]]:
        """EngineCore.step, and how many tokens it computed."""
        step = self.scheduler.schedule()
        return step.num_tokens, self.scheduler.update(step, self.runner.execute(step))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        params: SamplingParams = GREEDY,
    ) -> Generated:
        """All at once."""
        begun = before = time.perf_counter()
        names = [self.add(prompt, num_tokens, params) for prompt in prompts]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        done = Generated(list(tokens.values()))
        while self.scheduler.has_unfinished:
            count, outputs = self.step()
            now = time.perf_counter()
            for output in outputs:
                assert output.token_id is not None
                tokens[output.request_id].append(output.token_id)
            if not done.first_s and all(done.tokens):
                done.first_s = now - begun
            elif count == len(prompts):
                done.steps_s.append(now - before)
            before = now
        done.whole_s = time.perf_counter() - begun
        return done
