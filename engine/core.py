"""EngineCore: a model, its pages, a scheduler; step() after step(). And its process's loop."""

from __future__ import annotations

import signal
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import msgspec
import torch
import zmq

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError, RopewayError
from engine.execution.inputs import InputBatch
from engine.execution.journal import StepJournal
from engine.execution.masks import GrammarMasks
from engine.execution.matcher import Vocabulary
from engine.execution.sampler import Sampler
from engine.execution.select import select_runner
from engine.frontend.tokenizer import Tokenizer
from engine.grammar import INSTALLED as GRAMMARS
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineOutput,
    EngineReady,
    EngineStats,
    FromCore,
    Hello,
    SchedulerOutput,
    StepOutput,
    StepResult,
    ToCore,
)
from engine.model.attention.base import KVCache
from engine.model.attention.select import select_backend
from engine.model.loader import load_model, read_config, stored_dtypes
from engine.model.on_cuda import prepare_for_cuda
from engine.model.profiles import ProfileTables
from engine.model.serving import prepare
from engine.request import Request
from engine.resources import (
    allocate_cache,
    give_back_memory,
    num_cache_blocks,
    resolve_device,
    resolve_dtype,
)
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.profiles import OWN, ProfileRows
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.shared import SharedPrefixes

MISCONFIGURED = 2
"""Exit status of the process where a setting is at fault."""


def unsampled_ids(model: ModelConfig, config: EngineConfig) -> list[int]:
    """Ids below vocab_size that no token has. ConfigError where model and tokenizer disagree."""
    known = model.vocab_size if config.num_token_ids is None else config.num_token_ids
    if known > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {known - 1}; vocab_size of config.json is "
            f"{model.vocab_size}"
        )
    unused = [*config.unused_token_ids, *range(known, model.vocab_size)]
    if model.eos_token_id in unused:
        raise ConfigError(f"eos_token_id is {model.eos_token_id}, which the tokenizer has not")
    return unused


def _check(config: EngineConfig, model: ModelConfig, device: torch.device) -> None:
    """Raises ConfigError for settings that this model, or this device, cannot be served with."""
    if model.rope.type == "dynamic" and config.scheduler.max_profiles < 2:
        raise ConfigError(
            "max_profiles must be at least 2 for a model whose rope.type is dynamic, got "
            f"{config.scheduler.max_profiles}"
        )
    if device.type != "cpu" and config.quantize != "none":
        raise ConfigError(f"quantize {config.quantize} is for the CPU, device is {device.type}")
    for prefix in config.cache.shared_prefixes:
        context = model.rope.context(model.max_position)
        prefix.check(config.cache.block_size, context, model.vocab_size)


def _notes(directory: Path, dtype: torch.dtype, obstacle: str | None) -> list[str]:
    """What a user should know of the way the model is served."""
    notes = []
    stored = stored_dtypes(directory)
    if stored != {dtype}:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in stored))
        notes.append(f"the weights are stored in {names} and were converted")
    if obstacle is not None:
        notes.append(f"the last bits of an answer may depend on the batch: {obstacle}")
    return notes


def grammar_vocabulary(directory: Path, eos_token_id: int | None) -> Vocabulary:
    """A model directory's tokens, as grammars need them. Raises TokenizerError."""
    tokenizer = Tokenizer.from_directory(directory)
    special_ids = tokenizer.special_tokens.values()
    tokens = [
        tokenizer.token_bytes(token_id) if token_id in tokenizer else b""
        for token_id in range(len(tokenizer))
    ]
    for name, token_id in tokenizer.special_tokens.items():
        tokens[token_id] = name.encode()
    del tokenizer
    vocabulary = Vocabulary(tokens, list(special_ids), eos_token_id)
    give_back_memory()
    return vocabulary


class EngineCore:
    """The engine without its process: add, abort, step."""

    def __init__(self, config: EngineConfig, journal: StepJournal | None = None) -> None:
        """Load the model and take the memory. Raises CheckpointError or ConfigError.

        journal: where each step says what it computes, for the process after this one.
        """
        self._journal = journal
        self._ahead: dict[str, int] = {}  # what runs already, and which token of it
        directory = Path(config.model_dir)
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model_config = read_config(directory)
        _check(config, model_config, device)
        unsampled = unsampled_ids(model_config, config)
        block_size = config.cache.block_size
        context, rope = model_config.max_position, model_config.rope
        model = load_model(directory, dtype, device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if device.type == "cpu":
            kept = config.scheduler.max_num_seqs
            products, obstacle = prepare(model, config.quantize, kept), None
        else:
            obstacle = prepare_for_cuda(model)
            products = "triton" if obstacle is None else f"torch ({obstacle})"
        give_back_memory()
        num_blocks = num_cache_blocks(model_config, config.cache, config.scheduler, dtype, device)
        cache = allocate_cache(model.config, num_blocks, block_size, dtype, device)
        tables = ProfileTables(
            model.config,
            block_size,
            num_rows=config.scheduler.max_profiles,
            learned=model.inv_freq,
            device=device,
        )
        backend = select_backend(model.config, tables, cache)
        backend.put_profile(OWN, rope.in_force(1, context), block_size)
        self._pool = BlockPool(num_blocks, block_size)
        max_blocks = self._pool.blocks_for(rope.context(context))
        batch = InputBatch(config.scheduler.max_num_seqs, min(max_blocks, num_blocks))
        masks = None
        if GRAMMARS:
            masks = GrammarMasks(partial(grammar_vocabulary, directory, model_config.eos_token_id))
        sampler = Sampler(model_config.vocab_size, unsampled, masks)
        self._runner = select_runner(model, backend, sampler, batch, unsampled)
        self._runner.warm_up((1, 2, 8, 32))
        self._scheduler = Scheduler(
            config.scheduler,
            self._pool,
            profiles=ProfileRows(rope, context, config.scheduler.max_profiles),
            shared=SharedPrefixes(
                [each.token_ids for each in config.cache.shared_prefixes], block_size
            ),
            look_ahead=self._runner.looks_ahead,
        )
        self.ready = EngineReady(
            model=directory.resolve().name,
            num_parameters=num_parameters,
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            attention=backend.name,
            products=products,
            graphs=self._runner.name,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_bytes=num_blocks * KVCache.bytes_per_block(model_config, block_size, dtype),
            max_position=context,
            rope=rope,
            rotary_dim=model_config.rotary_dim,
            learned_frequencies=model_config.learned_frequencies != "none",
            max_profiles=config.scheduler.max_profiles,
            eos_token_id=model_config.eos_token_id,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            threads=torch.get_num_threads(),
            notes=_notes(directory, dtype, obstacle),
            suspects={} if journal is None else journal.suspects,
            poisoned=[] if journal is None else journal.poisoned,
        )

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would have work."""
        return self._scheduler.has_unfinished

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters as they stand."""
        return self._scheduler.stats

    def add(self, message: AddRequest) -> None:
        """Queue a request that admission has let in."""
        self._scheduler.add(
            Request(
                message.request_id,
                message.prompt_token_ids,
                message.params,
                seed=message.seed,
                max_tokens=message.max_tokens,
                stop_token_ids=frozenset(message.stop_token_ids),
                options=message.options,
                window=message.window,
                targets=message.targets,
                output_token_ids=message.output_token_ids,
                choice=message.choice,
                suspect_at=message.suspect_at,
            ),
            message.elapsed_s,
        )

    def abort(self, request_id: str) -> None:
        """Free a request's pages now; unknown ids are no error."""
        self._scheduler.abort(request_id)

    def step(self) -> list[EngineOutput]:
        """Schedule, execute, update."""
        step = self._scheduler.schedule()
        if self._journal is None:
            result = self._runner.execute(step)
        else:
            result = self._execute(step, self._journal)
        return self._scheduler.update(step, result)

    def _execute(self, step: SchedulerOutput, journal: StepJournal) -> StepResult:
        """The journal knows all the while what is being computed, ahead of its step too."""
        asked = {item.request.request_id: item.request.num_output_tokens for item in step.scheduled}
        if asked:
            computed = self._ahead | asked
            journal.begin(computed, alone=step.alone and len(computed) == len(asked))
        result = self._runner.execute(step)
        self._ahead = {request_id: asked[request_id] + 1 for request_id in self._runner.ahead}
        journal.begin(self._ahead, alone=False)
        return result


class EngineLoop:
    """Serves an EngineCore to frontends over ZeroMQ, one message per step and frontend."""

    def __init__(self, core: EngineCore, socket: zmq.Socket[bytes]) -> None:
        """socket: a bound ROUTER."""
        self._core = core
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._workers: set[bytes] = set()
        self._owner: dict[str, bytes] = {}  # request id -> the frontend that asked

    def run(self, parent: int) -> None:
        """Until the file descriptor `parent` reaches its end: then whoever started us is gone."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(parent, zmq.POLLIN)
        while True:
            events = dict(poller.poll(0 if self._core.has_unfinished else None))
            if parent in events:
                return
            changed = self._socket in events and self._receive()
            if self._core.has_unfinished:
                self._publish(self._core.step())
            elif changed:
                self._publish([])

    def _receive(self) -> bool:
        """Take every message that waits."""
        while True:
            try:
                worker, content = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            match self._decoder.decode(content):
                case AddRequest() as message:
                    self._owner[message.request_id] = worker
                    self._core.add(message)
                case AbortRequest(request_id):
                    self._owner.pop(request_id, None)
                    self._core.abort(request_id)
                case Hello():
                    self._workers.add(worker)
                    self._send(worker, self._core.ready)

    def _publish(self, outputs: list[EngineOutput]) -> None:
        by_worker: dict[bytes, list[EngineOutput]] = defaultdict(list)
        for output in outputs:
            by_worker[self._owner[output.request_id]].append(output)
            if output.last:
                del self._owner[output.request_id]
        stats = self._core.stats
        for worker in list(self._workers):
            self._send(worker, StepOutput(by_worker[worker], stats))

    def _send(self, worker: bytes, message: FromCore) -> None:
        try:
            self._socket.send_multipart([worker, self._encoder.encode(message)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._lose(worker)

    def _lose(self, worker: bytes) -> None:
        """A frontend is gone: nobody wants its requests any more."""
        self._workers.discard(worker)
        for request_id in [key for key, owner in self._owner.items() if owner == worker]:
            del self._owner[request_id]
            self._core.abort(request_id)


def main() -> int:
    """The engine process: configuration on standard input, requests at the address in argv[1], its
    journal in the file argv[2]."""
    # The server drains on Ctrl-C and then closes our standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    with (
        StepJournal(Path(sys.argv[2])) as journal,
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as socket,
    ):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            core = EngineCore(config, journal)
        except RopewayError as error:
            print(f"error: {error}", file=sys.stderr)
            return MISCONFIGURED if isinstance(error, ConfigError) else 1
        socket.bind(sys.argv[1])
        EngineLoop(core, socket).run(sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
