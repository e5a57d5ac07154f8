"""The sockets that the HTTP processes listen on."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from engine.errors import ConfigError
from server.terminal.outcome import FAILED, fail

BACKLOG = 2048


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket: clients can connect before anything else is there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        fail(f"cannot listen on {host}:{port}: {reason}", FAILED)
    except UnicodeError as error:  # no name of a host
        fail(f"cannot listen on {host}:{port}: {error}", FAILED)


def listen_all(host: str, port: int, count: int) -> list[socket.socket]:
    """One socket for each HTTP process; the kernel spreads the connections over them.

    Over one socket that all share, whichever process wakes first would take most of them.
    """
    alone = listen(host, port)  # refuses a port that somebody else has, which sharing would not
    if count == 1:
        return [alone]
    port = alone.getsockname()[1]
    alone.close()
    return [listen(host, port, shared=True) for _ in range(count)]


def _no_passphrase() -> str:
    """Instead of OpenSSL's question at the terminal, which each HTTP process would ask."""
    raise ConfigError("ssl_keyfile must have no passphrase")


def check_certificate(certfile: Path | None, keyfile: Path | None) -> None:
    """Raises ConfigError for files that HTTPS could not be spoken with."""
    if certfile is None:
        if keyfile is not None:
            raise ConfigError("ssl_keyfile needs ssl_certfile as well")
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certfile, keyfile, password=_no_passphrase)
    except (OSError, ssl.SSLError) as error:
        where = certfile if keyfile is None else f"{certfile} with the key {keyfile}"
        raise ConfigError(f"ssl_certfile {where} cannot be used: {error}") from error
