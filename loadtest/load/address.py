"""Where a server is asked: HTTP or HTTPS, and with which key."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.errors import Unmeasurable

ANSWER_SECONDS = 30.0


class Address:
    """A server's, with what it takes to be let in."""

    def __init__(
        self, url: str, api_key: str | None = None, ssl_cafile: Path | None = None
    ) -> None:
        """url: http://HOST:PORT or https://HOST:PORT. ssl_cafile: certificates to trust in place of
        the system's. Raises ValueError on another url, OSError on a file that cannot be used.
        """
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname is not None
        if not named or parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise ValueError(f"the host must be http://NAME:PORT or https://NAME:PORT, got {url!r}")
        if ssl_cafile is not None and parts.scheme != "https":
            raise ValueError(f"certificates are for https://, got {url!r}")
        self.url, self.api_key, self.ssl_cafile = url.rstrip("/"), api_key, ssl_cafile
        self._host, self._port = str(parts.hostname), parts.port
        self._context: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._context = ssl.create_default_context(cafile=ssl_cafile)
            except OSError as error:
                raise OSError(f"the certificates {ssl_cafile} cannot be used: {error}") from error

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """One that is not open yet; no proxy is asked. timeout: seconds of silence."""
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=timeout, context=self._context
        )

    @property
    def headers(self) -> dict[str, str]:
        """What each request must carry."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def get(self, path: str) -> tuple[int, str]:
        """Status and body. Raises OSError where nobody answers, HTTPException if it is no HTTP."""
        connection = self.connection(ANSWER_SECONDS)
        try:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    def model(self) -> tuple[str, int]:
        """Name and context, in tokens, of what is served.

        Raises Unmeasurable unless a Ropeway server is ready there, and lets us in.
        """
        try:
            answers = [(path, *self.get(path)) for path in ("/ready", "/v1/models")]
        except (OSError, http.client.HTTPException) as error:
            raise Unmeasurable(f"no server can be reached at {self.url}: {error}") from error
        for path, status, body in answers:
            if status != 200:
                hint = "; --api-key sends a key" if status == 401 and not self.api_key else ""
                raise Unmeasurable(f"{self.url}{path}: {status}: {body[:500]}{hint}")
        try:
            (model,) = json.loads(body)["data"]
            return str(model["id"]), int(model["max_model_len"])
        except (ValueError, LookupError, TypeError) as error:
            raise Unmeasurable(
                f"{self.url} is no Ropeway server: /v1/models: {body[:200]}"
            ) from error
