"""Every exception that Ropeway raises on purpose.

RopewayError
├── ConfigError            a setting that cannot work; names the field, the limit and the value
├── CheckpointError        a model directory that cannot be loaded; names the file and the tensor
├── TokenizerError         a tokenizer file that cannot be used
├── RequestError           the request is at fault; answered with a 4xx
│   ├── InvalidRequest     a field has a value that no engine could serve
│   └── ContextOverflow    prompt and output cannot fit the context or the cache
├── QueueFull              too many requests wait; answered with a 429
└── EngineError            the server is at fault; answered with a 5xx
    ├── EngineStarting     the model is still being loaded, or loaded again after a crash
    ├── EngineStartError   the engine process could not start
    ├── EngineDead         the engine process is gone
    ├── PoisonedRequest    the request killed the engine process, and did so again alone
    ├── GrammarFailed      the output cannot go on as its grammar demands
    └── Draining           the server is shutting down and takes, or finishes, no more requests

`code` is stable: clients may compare it. The message is for people and may change.
"""

from __future__ import annotations


class RopewayError(Exception):
    """Root of the tree; `code` names the kind of error for programs."""

    code = "error"


class ConfigError(RopewayError):
    """A setting that cannot work."""

    code = "bad_config"


class CheckpointError(RopewayError):
    """A model directory that cannot be loaded."""

    code = "bad_checkpoint"


class TokenizerError(RopewayError):
    """A tokenizer file that cannot be used."""

    code = "bad_tokenizer"


class RequestError(RopewayError):
    """The request is at fault; `field` names its guilty field."""

    code = "bad_request"

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class InvalidRequest(RequestError):
    """A field of the request has a value that no engine could serve."""

    code = "invalid_request"


class ContextOverflow(RequestError):
    """Prompt and output together cannot fit the context, or the whole cache."""

    code = "context_overflow"


class QueueFull(RopewayError):
    """Too many requests wait already; try again later."""

    code = "queue_full"


class EngineError(RopewayError):
    """The server is at fault, not the request."""

    code = "engine_error"


class EngineStarting(EngineError):
    """The model is still being loaded, or loaded again after a crash; try again soon."""

    code = "engine_starting"


class EngineStartError(EngineError):
    """The engine process could not start, or ended before it was ready."""

    code = "engine_start"


class EngineDead(EngineError):
    """The engine process is gone; what it was generating is lost."""

    code = "engine_dead"


class PoisonedRequest(EngineError):
    """The engine process died of this request, and again when it computed nothing else."""

    code = "poisoned_request"


class GrammarFailed(EngineError):
    """An output cannot go on: its grammar is too complex here, or no token of the model fits."""

    code = "grammar_failed"


class Draining(EngineError):
    """The server is shutting down."""

    code = "draining"
