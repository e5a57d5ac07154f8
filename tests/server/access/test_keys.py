"""API keys: the file, the limits over several processes, and what the server lets in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from engine.messages import AddRequest
from engine.request import FinishReason
from server.access.keys import ApiKey, KeyRing, new_key
from server.access.quota import Quota
from server.cli import app
from tests.patience import PATIENCE
from tests.server.conftest import SETTINGS, Served, running


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_the_command_makes_what_the_file_holds(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["key", "alice", "--rate", "60", "--concurrency", "2"])
    assert result.exit_code == 0
    secret = result.stderr.split()[-1]
    assert secret not in result.stdout
    (tmp_path / "keys").write_text(f"# ours\n\n{result.stdout}  # since today\n")
    ring = KeyRing.from_file(tmp_path / "keys")
    assert ring.find(secret) == 0
    assert ring.find(secret[:-1]) is None
    assert (ring.keys[0].name, ring.keys[0].rate, ring.keys[0].concurrency) == ("alice", 60, 2)
    assert CliRunner().invoke(app, ["key", "a b"]).exit_code != 0


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no key"),
        ("alice secret", ":1 must be"),
        ("alice sha256:12", ":1 must be"),
        (f"alice sha256:{'0' * 64} rate=0", "'rate=0' must be"),
        (f"alice sha256:{'0' * 64} speed=1", "'speed=1' must be"),
        (f"alice sha256:{'0' * 64} rate=1 rate=2", "'rate=2' must be"),
        (f"alice sha256:{'0' * 64}\nbob sha256:{'0' * 64}", ":2 repeats"),
    ],
)
def test_broken_files_are_named_and_not_quoted(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "keys").write_text(lines)
    with pytest.raises(ConfigError, match=words) as caught:
        KeyRing.from_file(tmp_path / "keys")
    assert "secret" not in str(caught.value)


def test_a_rate_is_shared_by_processes_and_refills(tmp_path: Path) -> None:
    now = 100.0
    keys = [ApiKey("a", b"", rate=3), ApiKey("b", b"")]
    quotas = [
        Quota(keys, tmp_path / "quota", worker=worker, num_workers=2, clock=lambda: now)
        for worker in range(2)
    ]
    assert [quotas[at % 2].begin(0) for at in range(3)] == [None] * 3
    refusal = quotas[1].begin(0)
    assert refusal is not None
    assert refusal[0] == "rate_limited"
    assert refusal[2] == pytest.approx(20)
    assert quotas[0].begin(1) is None  # another key
    now += 20
    assert quotas[1].begin(0) is None
    assert quotas[0].begin(0) is not None
    for quota in quotas:
        quota.close()


def test_open_requests_are_counted_over_processes_and_die_with_them(tmp_path: Path) -> None:
    keys = [ApiKey("a", b"", concurrency=2)]
    first, second = (
        Quota(keys, tmp_path / "quota", worker=worker, num_workers=2) for worker in range(2)
    )
    assert first.begin(0) is None
    assert second.begin(0) is None
    refusal = first.begin(0)
    assert refusal is not None
    assert refusal[0] == "too_many_concurrent_requests"
    second.close()  # it died with its request open; another one takes its place
    second = Quota(keys, tmp_path / "quota", worker=1, num_workers=2)
    assert second.begin(0) is None
    assert second.begin(0) is not None
    first.end(0)
    assert second.begin(0) is None
    first.close()
    second.close()


ALICE, ALICE_KEY = new_key("alice", None, None)
BOB, BOB_KEY = new_key("bob", None, 1)
EVE, EVE_KEY = new_key("eve", 2, None)


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Served]:
    (tmp_path / "keys").write_text("\n".join(k.line for k in (ALICE_KEY, BOB_KEY, EVE_KEY)))
    settings = replace(
        SETTINGS, api_key_file=str(tmp_path / "keys"), cors_origins=("https://a.example",)
    )
    async with running(tmp_path, settings) as served:
        await served.until_ready()
        yield served


async def test_who_has_no_key_stays_out(guarded: Served) -> None:
    for path in ("/generate", "/v1/completions", "/tokenize", "/metrics", "/nowhere"):
        for headers, code in (
            ({}, "missing_api_key"),
            ({"Authorization": "Basic abc"}, "missing_api_key"),
            (bearer("wrong"), "invalid_api_key"),
            ({"Authorization": "Bearer \xff".encode("latin-1")}, "invalid_api_key"),
        ):
            answer = await guarded.http.post(path, headers=headers, json={"prompt": "a"})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert error["code"] == code
            assert ("type" in error) == path.startswith("/v1/")
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert (await guarded.http.get(path)).status_code == 200
    assert guarded.fake.quiet
    allowed = await guarded.http.get("/metrics", headers=bearer(ALICE))
    assert allowed.status_code == 200


async def test_each_key_has_a_cache_of_its_own(guarded: Served) -> None:
    salts = []
    for secret, salt in ((ALICE, ""), (BOB, ""), (ALICE, "x"), (ALICE, "")):
        body = {"prompt": "a", "stream": False, "cache_salt": salt}
        asking = asyncio.create_task(
            guarded.http.post("/generate", json=body, headers=bearer(secret))
        )
        request = await guarded.fake.expect(AddRequest)
        salts.append(request.options.cache_salt)
        await guarded.fake.say(request, b"x", end=FinishReason.LENGTH)
        assert (await asking).status_code == 200
    assert salts[0] == salts[3]
    assert len(set(salts)) == 3
    assert "" not in salts


async def test_an_operator_may_share_the_cache(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(ALICE_KEY.line)
    settings = replace(SETTINGS, api_key_file=str(tmp_path / "keys"), share_prefix_cache=True)
    async with running(tmp_path, settings) as served:
        await served.until_ready()
        async with served.http.stream(
            "POST", "/generate", json={"prompt": "a"}, headers=bearer(ALICE)
        ):
            assert (await served.fake.expect(AddRequest)).options.cache_salt == ""


async def test_concurrency_of_a_key(guarded: Served) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            guarded.http.stream("POST", "/generate", json={"prompt": "a"}, headers=bearer(BOB))
        )
        answer = await guarded.http.post("/generate", json={"prompt": "a"}, headers=bearer(BOB))
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "too_many_concurrent_requests"
        assert "1 requests at once" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert (await guarded.http.get("/v1/models", headers=bearer(ALICE))).status_code == 200
    async with asyncio.timeout(PATIENCE):
        while (await guarded.http.get("/v1/models", headers=bearer(BOB))).status_code != 200:
            await asyncio.sleep(0.01)


async def test_rate_of_a_key(guarded: Served) -> None:
    answers = [await guarded.http.get("/v1/models", headers=bearer(EVE)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["type"] == "rate_limit_error"
    assert answers[2].json()["error"]["code"] == "rate_limited"
    assert 0 < int(answers[2].headers["retry-after"]) <= 31


async def test_other_sites_need_the_operators_word(guarded: Served, tmp_path: Path) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    answer = await guarded.http.options("/generate", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = await guarded.http.options("/generate", headers=asked | {"Origin": "https://b.example"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


async def test_no_cors_by_default_and_security_headers(served: Served) -> None:
    answer = await served.http.get("/health", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    docs = await served.http.get("/docs")
    assert "cdn.jsdelivr.net" in docs.headers["content-security-policy"]
