"""The conventions of clients that people know: variants of a client, the User-Agent, and the reply's headers."""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from types import FunctionType
from typing import Any

import aiohttp
import pytest
from conftest import RawConnection, RawServer

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesResponse,
    CachePolicy,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    RetryPolicy,
    ServerError,
)
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox

StartRaw = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]


async def test_a_variant_has_its_own_timeout_and_policy(sandbox: Sandbox, north: Account) -> None:
    """Use the variant's settings for its calls and jobs only; what is not given stays as it was."""
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=1)) as client:
        twice = client.with_options(retry=RetryPolicy(max_attempts=2, base_delay=0))
        hasty = twice.with_options(timeout=0.05)
        sandbox.script("north", Answer(500), Answer(500), Answer(500), Answer(delay=60))
        with pytest.raises(ServerError) as once:
            await client.get_audiences(north)
        (outcome,) = await twice.fetch_all([north])
        assert (len(once.value.attempts), outcome.ok) == (1, False)
        with pytest.raises(DeadlineExceededError, match=r"timeout=0\.05 s"):
            await hasty.get_audiences(north)
    assert len(sandbox.requests) == 4


async def test_a_variant_shares_pool_pace_and_cache(sandbox: Sandbox, north: Account) -> None:
    """Send one request for a client and its variant, made before the first use, and close both at once."""
    client = AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(ttl=60.0))
    variant = client.with_options(timeout=5.0)
    assert await variant.get_audiences(north) == await client.get_audiences(north)
    assert len(sandbox.requests) == 1
    assert client.snapshot() == variant.snapshot()
    await variant.aclose()
    with pytest.raises(ClientClosedError):
        await client.get_audiences(north)


async def test_a_variants_policy_counts_behind_a_cache(sandbox: Sandbox, north: Account) -> None:
    """Make the attempts of the variant's policy if its call sends the request."""
    sandbox.script("north", Answer(500), Answer(500))
    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(ttl=60.0)) as client:
        with pytest.raises(ServerError):
            await client.with_options(retry=RetryPolicy(max_attempts=1)).get_audiences(north)
    assert len(sandbox.requests) == 1


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": "3"}, {"retry": 3}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    """Refuse an invalid option when the variant is made."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        AudiencesClient("key").with_options(**options)


@pytest.mark.parametrize("own", [True, False], ids=["own session", "caller's session"])
async def test_app_info_extends_the_user_agent(raw: StartRaw, *, own: bool) -> None:
    """Send the application's name after the package's, on either kind of session."""
    heads: list[bytes] = []

    async def serve(connection: RawConnection) -> None:
        heads.append(await connection.request())
        await connection.answer()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        given = None if own else session
        client = AudiencesClient("key", base_url=server.base_url, app_info="my-app/1.2 (nightly)", session=given)
        async with client:
            await client.get_audiences()
    (agent,) = [line for line in heads[0].splitlines() if line.startswith(b"User-Agent")]
    assert agent.startswith(b"User-Agent: audiences_async/")
    assert agent.endswith(b" my-app/1.2 (nightly)")


@pytest.mark.parametrize("app_info", ["", " a", "a\r\nX: y", "é", 5, b"a"])
def test_app_info_is_one_line_of_text(app_info: Any) -> None:
    """Refuse what would break the header."""
    with pytest.raises(ConfigurationError, match="app_info must be visible ASCII"):
        AudiencesClient("key", app_info=app_info)


@pytest.mark.parametrize("extra", [{}, {"new": 1}], ids=["plain", "by the reference"])
async def test_an_answer_has_the_replys_headers(sandbox: Sandbox, extra: dict[str, Any]) -> None:
    """Return the headers by names in any case, without the key, also from a pickle; they do not count for `==`."""
    account = sandbox.add_account("north", api_key="key-of-north-4711")
    body = {"status": "200", "data": [{**EXAMPLE_AUDIENCES[0], **extra}]}
    for served in ("a", "b"):
        sandbox.script("north", Answer(200, body, headers={"X-Served-By": served, "X-Echo": "key-of-north-4711"}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        first, second = await client.get_audiences(account), await client.get_audiences(account)
    assert (first.headers["x-served-by"], second.headers["X-SERVED-BY"], first.headers["x-echo"]) == ("a", "b", "***")
    assert first == second
    restored: AudiencesResponse = pickle.loads(pickle.dumps(first))
    assert restored.headers["x-echo"] == "***"
    assert dict(restored.headers) == dict(first.headers)
    assert len(first.headers) == len(restored.headers)
    assert "key-of-north-4711" not in repr(first.headers)


def test_a_response_of_ones_own_has_no_headers() -> None:
    """Need no headers to build a response in a test."""
    assert dict(AudiencesResponse(200, "", None, ()).headers) == {}


async def test_a_mocks_programming_error_is_raised(
    north: Account, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    """Raise a mock's `TypeError` as it is after one attempt, with its place and no frame that has the key."""
    calls: list[object] = []

    async def request(self: object, method: str, wrong: object) -> None:
        raise AssertionError

    async def broken(self: object, *arguments: object, **named: object) -> None:
        calls.append(arguments)
        raise TypeError(f"no such method, {named}")

    async with AudiencesClient(base_url=sandbox.base_url) as client:
        monkeypatch.setattr(aiohttp.ClientSession, "request", request)
        with pytest.raises(TypeError, match="unexpected keyword"):
            await client.get_audiences(north)
        monkeypatch.setattr(aiohttp.ClientSession, "request", broken)
        with pytest.raises(TypeError) as caught:
            await client.get_audiences(north)
        assert client.snapshot().accounts[0].in_flight == 0
    assert len(calls) == 1
    assert str(north.api_key) not in str(caught.value)
    (note,) = caught.value.__notes__
    assert note.startswith(f"raised in {__file__}:")
    frames = [frame.name for frame in caught.traceback]
    assert "broken" not in frames


async def test_a_jobs_mistake_is_that_accounts_outcome(
    north: Account, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    """End no job by a mock's programming error: it is the cause of the account's error."""

    async def broken(self: object, *arguments: object, **named: object) -> None:
        raise NameError("oops")

    monkeypatch.setattr(aiohttp.ClientSession, "request", broken)
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        (outcome,) = await client.fetch_all([north])
    assert not outcome.ok
    assert isinstance(outcome.error.__cause__, NameError)
    assert outcome.error.call_id is not None
    assert outcome.error.call_id == outcome.error.__cause__.call_id  # type: ignore[attr-defined]


async def test_a_mistake_of_aiohttps_own_is_a_failed_connection(
    north: Account, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    """Retry what aiohttp itself raises when a connection is lost at a bad moment."""
    monkeypatch.setattr(aiohttp.ClientResponse, "start", _lost_at_a_bad_moment)
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=2, base_delay=0)) as client:
        with pytest.raises(Exception, match="AttributeError") as caught:
            await client.get_audiences(north)
    assert len(caught.value.attempts) == 2  # type: ignore[attr-defined]


async def _start(self: Any, connection: Any) -> Any:
    await asyncio.sleep(0)
    return None.transport  # type: ignore[attr-defined]


_lost_at_a_bad_moment = FunctionType(_start.__code__, {"__name__": "aiohttp.client_reqrep", "asyncio": asyncio})
