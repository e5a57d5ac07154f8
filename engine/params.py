"""What a request asks for: how its tokens are chosen, and how it is treated. Checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from engine.errors import ConfigError, InvalidRequest
from engine.scaling import RopeScaling

Overflow = Literal["error", "truncate", "shift"]

MAX_INT = 2**31 - 1
SEED_BITS = 64
MIN_TEMPERATURE = 1e-6
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_GRAMMAR = 65_536
MAX_PRIORITY = 100
MAX_TIMEOUT_S = 86_400.0
MAX_SALT = 256
OPTIONAL = ("seed", "max_tokens", "logprobs", "timeout_s")
"""Numbers that may be None."""


class Grammar(msgspec.Struct, frozen=True):
    """What an output must obey.

    text: a JSON schema; a regular expression for the whole output; or a JSON list of texts, of
    which the output is one.
    """

    kind: Literal["json_schema", "regex", "choice"]
    text: str

    @property
    def field(self) -> str:
        """What requests call it."""
        return "response_format" if self.kind == "json_schema" else self.kind


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next token. Checked when made; the defaults leave the model as it is.

    temperature         0 is greedy; otherwise, from 1e-6 on, logits are divided by it
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the smallest set of likeliest tokens whose mass reaches p (nucleus)
    min_p               keep tokens at least min_p times as likely as the likeliest
    repetition_penalty  divide positive logits of seen tokens by it, multiply negative ones (CTRL,
                        arXiv 1909.05858); prompt and output count
    presence_penalty    subtracted once from tokens that the output has
    frequency_penalty   subtracted per occurrence in the output
    seed                random numbers depend on it and the stream index; None: drawn at admission
    stop                strings that end the output; they are not part of it
    stop_token_ids      ids that end the output; they are not part of its text
    max_tokens          None: as many as the context has room for
    ignore_eos          go on after the model's end token
    logprobs            None: none; k: the token's log-probability and the k likeliest (0 to 20)
    logit_bias          token id -> added to its logit, -100 to 100
    grammar             what the output must obey; it ends where nothing can follow
    rope                the rotation profile, instead of the model's own; the context follows its
                        factor. A RopeScaling, or what RopeScaling.from_dict reads

    Biases come first; then penalties, temperature, top_k, top_p, min_p. Log-probabilities are the
    model's own, before any of them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    grammar: Grammar | None = None
    rope: RopeScaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # one text is meant, not its characters
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        _check_number(self, "temperature", 0.0, 100.0)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise InvalidRequest(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, "
                f"got {self.temperature}",
                "temperature",
            )
        _check_integer(self, "top_k", 0, MAX_INT)
        _check_number(self, "top_p", 0.0, 1.0, open_low=True)
        _check_number(self, "min_p", 0.0, 1.0)
        _check_number(self, "repetition_penalty", 0.01, 100.0)
        _check_number(self, "presence_penalty", -100.0, 100.0)
        _check_number(self, "frequency_penalty", -100.0, 100.0)
        _check_integer(self, "seed", 0, 2**SEED_BITS - 1)
        _check_integer(self, "max_tokens", 1, MAX_INT)
        _check_integer(self, "logprobs", 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(
                f"ignore_eos must be true or false, got {self.ignore_eos!r}", "ignore_eos"
            )
        self._check_stop_strings()
        self._check_stop_token_ids()
        self._check_logit_bias()
        self._check_grammar()
        self._check_rope()

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, dict):
            raise InvalidRequest(
                f"logit_bias must map token ids to numbers, got {self.logit_bias!r}", "logit_bias"
            )
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(
                f"logit_bias takes at most {MAX_BIASES} tokens, got {len(self.logit_bias)}",
                "logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequest(
                    f"logit_bias must have token ids as keys, got {token_id!r}", "logit_bias"
                )
            if isinstance(bias, bool) or not isinstance(bias, int | float):
                raise InvalidRequest(
                    f"logit_bias[{token_id}] must be a number, got {bias!r}", "logit_bias"
                )
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise InvalidRequest(
                    f"logit_bias[{token_id}] must be at least {-MAX_BIAS} and at most {MAX_BIAS}, "
                    f"got {bias}",
                    "logit_bias",
                )

    def _check_grammar(self) -> None:
        if self.grammar is None:
            return
        if not isinstance(self.grammar, Grammar):
            raise InvalidRequest(f"grammar must be a Grammar, got {self.grammar!r}", "grammar")
        field, length = self.grammar.field, len(self.grammar.text)
        if length > MAX_GRAMMAR:
            raise InvalidRequest(
                f"{field} can have at most {MAX_GRAMMAR} characters, got {length}", field
            )
        if self.ignore_eos:
            raise InvalidRequest(
                f"ignore_eos cannot go with {field}, whose end is the output's", "ignore_eos"
            )

    def _check_rope(self) -> None:
        if isinstance(self.rope, Mapping):
            try:
                rope = RopeScaling.from_dict(self.rope)
            except ConfigError as error:
                raise no_such_rotation(error) from error
            msgspec.structs.force_setattr(self, "rope", rope)
        elif self.rope is not None and not isinstance(self.rope, RopeScaling):
            raise InvalidRequest(f"rope must be a RopeScaling, got {self.rope!r}", "rope")

    def _check_stop_token_ids(self) -> None:
        if not isinstance(self.stop_token_ids, tuple | list):
            raise InvalidRequest(
                f"stop_token_ids must be a list, got {self.stop_token_ids!r}", "stop_token_ids"
            )
        for token_id in self.stop_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequest(
                    f"stop_token_ids must hold integers, got {token_id!r}", "stop_token_ids"
                )
            within("stop_token_ids", token_id, 0, MAX_INT)

    def _check_stop_strings(self) -> None:
        if not isinstance(self.stop, tuple | list):
            raise InvalidRequest(f"stop must be a list of strings, got {self.stop!r}", "stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop"
            )
        for text in self.stop:
            if not isinstance(text, str):
                raise InvalidRequest(f"stop must hold strings, got {text!r}", "stop")
            if not text:
                raise InvalidRequest("stop must not hold an empty string", "stop")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InvalidRequest("stop must be valid Unicode, got a lone surrogate", "stop")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the random numbers say."""
        return self.temperature == 0.0


def no_such_rotation(error: ConfigError) -> InvalidRequest:
    """What is wrong with a request's `rope`; the message begins with the field's name."""
    message = str(error)
    return InvalidRequest(message, message.split(" ", 1)[0])


def _check_number(
    owner: object, field: str, low: float, high: float, open_low: bool = False
) -> None:
    value = getattr(owner, field)
    if value is None and field in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{field} must be a number, got {value!r}", field)
    within(field, value, low, high, open_low)


def _check_integer(owner: object, field: str, low: int, high: int) -> None:
    value = getattr(owner, field)
    if value is None and field in OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{field} must be an integer, got {value!r}", field)
    within(field, value, low, high)


def within(field: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    """Raises InvalidRequest unless low <= value <= high, or low < value where low is open."""
    # Comparisons with NaN are false, so it is never within.
    if (low < value if open_low else low <= value) and value <= high:
        return
    least = f"greater than {low}" if open_low else f"at least {low}"
    raise InvalidRequest(f"{field} must be {least} and at most {high}, got {value}", field)


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is treated, whatever its tokens are. Checked when made.

    priority    the greater, the sooner it starts, as if it had come some seconds earlier for each
                point (SchedulerConfig.priority_seconds); and the later it is preempted
    timeout_s   seconds that it may wait and run; then it ends as it is. None: no limit
    overflow    where prompt and max_tokens do not fit the context: `error` refuses, `truncate`
                keeps the end of the prompt, `shift` goes on without end by dropping the oldest
                pages but the first; the others keep what they knew of them, so that is an
                approximation
    cache_salt  opaque; pages are shared among requests of the same salt only, so that nobody can
                tell by time what others asked; but for those that lie wholly in a prefix that is
                declared to be shared (CacheConfig.shared_prefixes)
    """

    priority: int = 0
    timeout_s: float | None = None
    overflow: Overflow = "error"
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _check_integer(self, "priority", -MAX_PRIORITY, MAX_PRIORITY)
        _check_number(self, "timeout_s", 0.0, MAX_TIMEOUT_S, open_low=True)
        if self.overflow not in get_args(Overflow):
            raise InvalidRequest(
                f"overflow must be one of {', '.join(get_args(Overflow))}; got {self.overflow!r}",
                "overflow",
            )
        if not isinstance(self.cache_salt, str):
            raise InvalidRequest(
                f"cache_salt must be a text, got {self.cache_salt!r}", "cache_salt"
            )
        if len(self.cache_salt) > MAX_SALT:
            raise InvalidRequest(
                f"cache_salt can have at most {MAX_SALT} characters, got {len(self.cache_salt)}",
                "cache_salt",
            )
