"""HTTPS: a certificate of the test's own authority, and clients that check it."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from engine.errors import ConfigError
from server.processes.listener import check_certificate
from tests.patience import PATIENCE
from tests.server.conftest import parse_events
from tests.server.processes.test_serve import serve


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for this machine, and its key."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(chain), append=True)
    issued.private_key_pem.write_to_path(str(key))
    return chain, key


def test_streams_come_by_https_from_every_process(
    tiny_model_dir: Path, authority: trustme.CA, files: tuple[Path, Path]
) -> None:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    options = ["--ssl-certfile", str(files[0]), "--ssl-keyfile", str(files[1])]
    body = {"prompt": "the a", "max_tokens": 8, "ignore_eos": True, "seed": 1}
    with serve(tiny_model_dir, *options, "--api-workers", "2", verify=trusting) as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert f"curl -N {server.url}/generate" in server.shown
        said = []
        for _ in range(6):  # each connection picks a process
            answer = httpx.post(
                f"{server.url}/generate",
                json=body,
                verify=trusting,
                trust_env=False,
                timeout=PATIENCE,
            )
            events = parse_events(answer.raise_for_status().text)
            assert events[-1].event == "done"
            assert len(events) == 9
            said.append([event.data for event in events[:-1]])
        assert said == [said[0]] * 6
        with (
            httpx.Client(trust_env=False, timeout=PATIENCE) as stranger,
            pytest.raises(httpx.ConnectError) as caught,
        ):
            stranger.get(f"{server.url}/health")
        assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value)
        plain = server.url.replace("https", "http")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{plain}/health", trust_env=False, timeout=PATIENCE)


def test_files_that_cannot_be_used_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    chain, key = files
    check_certificate(chain, key)
    check_certificate(None, None)
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(str(other))
    for some, words in (
        ((chain, other), "ssl_certfile .* with the key .*other.pem cannot be used"),
        ((chain, None), "ssl_certfile .* cannot be used"),
        ((None, key), "ssl_keyfile needs ssl_certfile"),
        ((tmp_path / "none.pem", key), "No such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_certificate(*some)


def test_a_key_with_a_passphrase_is_refused_and_asks_nobody(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    chain, key = files
    locked = tmp_path / "locked.pem"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="passphrase"):
        check_certificate(chain, locked)
