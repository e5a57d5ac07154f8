"""API keys: who may ask, and how much. A file holds their hashes, never the keys."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

PREFIX = "rw-"
SECRET_BYTES = 32
MAX_LIMIT = 1_000_000
_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._@-]{1,64})\s+sha256:(?P<digest>[0-9a-f]{64})(?P<limits>(?:\s+\S+)*)"
)
_LIMIT = re.compile(r"(rate|concurrency)=([1-9][0-9]{0,6})")


@dataclass(frozen=True)
class ApiKey:
    """One line of the file.

    digest: SHA-256 of the key, which is random and long, so that no slower hash is needed. rate:
    requests a minute; concurrency: requests at once; None: no limit.
    """

    name: str
    digest: bytes
    rate: int | None = None
    concurrency: int | None = None

    @property
    def line(self) -> str:
        """As the file has it."""
        limits = {"rate": self.rate, "concurrency": self.concurrency}
        said = "".join(f" {name}={limit}" for name, limit in limits.items() if limit is not None)
        return f"{self.name} sha256:{self.digest.hex()}{said}"

    def salt(self, cache_salt: str) -> str:
        """What keeps this key's cached prompts apart from those of others."""
        return hashlib.sha256(f"{self.name}\0{cache_salt}".encode()).hexdigest()


class KeyRing:
    """The keys of a file, in its order."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self.keys = keys

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """Lines of `name sha256:hex [rate=N] [concurrency=N]`; # begins a comment.

        Raises ConfigError, naming the line.
        """
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
        keys: list[ApiKey] = []
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            key = _parsed(text, f"api_key_file {path}:{number}")
            if any(key.name == other.name or key.digest == other.digest for other in keys):
                raise ConfigError(f"api_key_file {path}:{number} repeats the key {key.name}")
            keys.append(key)
        if not keys:
            raise ConfigError(f"api_key_file {path} holds no key; `ropeway key NAME` makes one")
        return cls(tuple(keys))

    def find(self, secret: str) -> int | None:
        """The number of a key; every one is compared, in constant time."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for number, key in enumerate(self.keys):
            if hmac.compare_digest(digest, key.digest):
                found = number
        return found


def _parsed(text: str, where: str) -> ApiKey:
    match = _LINE.fullmatch(text)
    if match is None:
        # The line is not quoted: it may hold a key by mistake.
        raise ConfigError(f"{where} must be `name sha256:hex [rate=N] [concurrency=N]`")
    limits: dict[str, int] = {}
    for word in match["limits"].split():
        limit = _LIMIT.fullmatch(word)
        if limit is None or limit[1] in limits or int(limit[2]) > MAX_LIMIT:
            raise ConfigError(
                f"{where}: {word!r} must be rate=N or concurrency=N, each once, with N from 1 to "
                f"{MAX_LIMIT}"
            )
        limits[limit[1]] = int(limit[2])
    return ApiKey(match["name"], bytes.fromhex(match["digest"]), **limits)


def new_key(name: str, rate: int | None, concurrency: int | None) -> tuple[str, ApiKey]:
    """A random key, and what the file says of it. Raises ConfigError for what it cannot hold."""
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    key = ApiKey(name, hashlib.sha256(secret.encode()).digest(), rate, concurrency)
    if _LINE.fullmatch(key.line) is None:
        raise ConfigError(f"name must have 1 to 64 letters, digits or ._@-, got {name!r}")
    return secret, _parsed(key.line, "the key")
