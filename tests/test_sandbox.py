"""The sandbox: follows the service's page, and misbehaves on request."""

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from yarl import URL

from audiences_async import Account, AudiencesClient, NotFoundError, RetryPolicy
from audiences_async.sandbox import Answer, Sandbox, SteppedTime, many_audiences
from audiences_async.sandbox.accounts import SandboxAccount
from audiences_async.sandbox.throttling import admission


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Open an HTTP session."""
    async with aiohttp.ClientSession() as session:
        yield session


async def get(http: aiohttp.ClientSession, sandbox: Sandbox, key: str | None, path: str = "audiences") -> Any:
    """Send a GET; return the status, headers and body."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with http.get(sandbox.base_url + path, headers=headers) as response:
        return response.status, response.headers, await response.read()


async def test_it_answers_as_documented(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    """Return the documented envelope with a string status for an account's key, in either spelling of the path."""
    account = sandbox.add_account("north")
    for path in ("audiences", "Audiences"):
        status, headers, body = await get(http, sandbox, str(account.api_key), path)
        envelope = json.loads(body)
        assert (status, envelope["status"], envelope["description"]) == (200, "200", "Audiences retrieved")
        assert [row["type"] for row in envelope["data"]] == ["Static", "Dynamic"]
        assert headers["Content-Type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_it_wants_the_right_key(sandbox: Sandbox, http: aiohttp.ClientSession, key: str | None) -> None:
    """Return the documented 401, with an integer status, without a known key."""
    sandbox.add_account("north")
    status, headers, body = await get(http, sandbox, key)
    assert (status, json.loads(body)["status"], headers["WWW-Authenticate"]) == (401, 401, "Bearer")
    assert [request.account for request in sandbox.requests] == [None]


async def test_a_revoked_key_is_refused(sandbox: Sandbox, north: Account, http: aiohttp.ClientSession) -> None:
    """After a change of key only the new one opens the account."""
    sandbox.revoke("north", api_key="new")
    assert (await get(http, sandbox, str(north.api_key)))[0] == 401
    assert (await get(http, sandbox, "new"))[0] == 200


async def test_other_paths_and_methods(sandbox: Sandbox, north: Account, http: aiohttp.ClientSession) -> None:
    """Another path is a 404, another method a 405 that says what is allowed."""
    assert (await get(http, sandbox, str(north.api_key), "audience"))[0] == 404
    async with http.post(sandbox.base_url + "audiences") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET")


async def test_a_scripted_answer_is_for_any_path(sandbox: Sandbox, north: Account) -> None:
    """Answer another call of the API with what is scripted, and with 404 if nothing is."""
    sandbox.script("north", Answer(500), Answer(body={"status": "200", "data": {"id": 7}}))
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(base_delay=0)) as client:
        assert await client.get_json("campaigns/7", north) == {"id": 7}
        with pytest.raises(NotFoundError):
            await client.get_json("campaigns/7", north)


async def test_stepped_sleeps_overlap() -> None:
    """Let sleeps of several tasks end in order, at their times, and a cancelled one hold up no other."""
    time, ended = SteppedTime(now=0.0), []

    async def sleep(seconds: float) -> None:
        await time.sleep(seconds)
        ended.append((seconds, time.now))

    cancelled = asyncio.create_task(time.sleep(0.5))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(*map(sleep, (3.0, 1.0, 2.0, 1.0)))
    assert ended == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


@pytest.mark.parametrize("status", [400, 404, 429, 500, 502])
async def test_scripted_errors_have_the_documented_body(
    sandbox: Sandbox, north: Account, http: aiohttp.ClientSession, status: int
) -> None:
    """Send a scripted status with the error envelope, once; then the ordinary answer again."""
    sandbox.script("north", Answer(status, retry_after=3))
    answered, headers, body = await get(http, sandbox, str(north.api_key))
    assert (answered, json.loads(body)["status"], headers["Retry-After"]) == (status, status, "3")
    assert (await get(http, sandbox, str(north.api_key)))[0] == 200


async def test_it_records_what_it_saw(sandbox: Sandbox, north: Account) -> None:
    """Requests are recorded in order, without the key."""
    sandbox.script("north", Answer(failure="reset"))
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(base_delay=0)) as client:
        await client.get_audiences(north)
    first, second = sandbox.seen("north")
    assert (first.answer, second.answer) == (None, 200)
    assert (first.method, first.path, first.at <= second.at) == ("GET", "/audiences", True)
    assert str(north.api_key) not in repr(sandbox.requests)


def test_waiting_for_a_request_that_never_comes(sandbox: Sandbox) -> None:
    """End the wait for requests with an error that states how many came."""
    with pytest.raises(TimeoutError, match="0 of 1 requests"):
        sandbox.wait_for_requests(1, timeout=0.01)


def account(**settings: Any) -> SandboxAccount:
    """Return the sandbox's own record of an account with these settings."""
    sandbox = Sandbox(seed=settings.pop("seed", 0))
    sandbox.add_account("north", **settings)
    return sandbox._accounts["north"]


def answers(north: SandboxAccount, *times: float) -> list[Answer]:
    """Return the answers to requests that come at these times."""
    assert north.throttle is not None
    given = []
    for now in times:
        with admission([north.throttle], now) as refusal:
            given.append(refusal or north.answer())
    return given


def test_the_rate_limit_is_a_real_one() -> None:
    """Requests above the rate are refused and not counted; after a pause a burst is granted."""
    north = account(rate=2.0, burst=3)
    given = answers(north, 0.0, 0.0, 0.0, 0.0, 0.4, 0.5, 0.6, 1.0, 9.0, 9.0, 9.0, 9.0)
    assert [answer.status for answer in given] == [200, 200, 200, 429, 429, 200, 429, 200, 200, 200, 200, 429]


def test_a_429_says_when_to_come_back_if_asked_to() -> None:
    """Send the limit's Retry-After in whole seconds, and long enough."""
    north = account(rate=0.5, retry_after=True)
    assert [answer.retry_after for answer in answers(north, 0.0, 0.0, 0.5, 2.0)] == [None, 2, 2, None]


def test_faults_come_from_the_seed() -> None:
    """Draw the same faults from the same seed, others from another; about the share asked for."""
    drawn = [[account(seed=seed, fault_rate=0.3).answer() for _ in range(1)] for seed in range(300)]
    north, twin, other = (account(seed=seed, fault_rate=0.3) for seed in (1, 1, 2))
    answers = [north.answer() for _ in range(100)]
    assert answers == [twin.answer() for _ in range(100)]
    assert answers != [other.answer() for _ in range(100)]
    assert 60 < sum(answer != Answer() for (answer,) in drawn) < 120


async def test_random_faults_are_absorbed(sandbox: Sandbox) -> None:
    """Get every answer of a service that fails three times out of ten."""
    accounts = [sandbox.add_account(f"a{n}", audiences=many_audiences(f"a{n}", 2), fault_rate=0.3) for n in range(50)]
    policy = RetryPolicy(max_attempts=20, base_delay=0, throttle_base_delay=0)
    async with AudiencesClient(base_url=sandbox.base_url, retry=policy) as client:
        responses = await asyncio.gather(*map(client.get_audiences, accounts))
    assert [response.data[0].id for response in responses] == [f"{account.name}-0" for account in accounts]
    assert len(sandbox.requests) > len(accounts)


def test_a_port_in_use_is_an_error(sandbox: Sandbox) -> None:
    """Raise the system's own error for a port that cannot be had."""
    port = int(sandbox.base_url.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(OSError, match="in use"), Sandbox(port=port):
        pass


def test_nothing_is_left_of_connections_that_it_had_no_time_for() -> None:
    """Connections made just before it ends are closed with it, and asyncio has nothing to warn of."""
    for connections in (1, 2, 3) * 5:
        with Sandbox() as sandbox:
            address = ("127.0.0.1", URL(sandbox.base_url).port or 0)
            peers = [socket.create_connection(address, timeout=10) for _ in range(connections)]
        for peer in peers:
            with peer:
                assert peer.recv(1) == b""
    gc.collect()  # what was left open warns now


@pytest.mark.slow
def test_the_fixture_is_there_for_users(pytester: pytest.Pytester) -> None:
    """Whoever installs the package has the fixture audiences_sandbox, in sync tests too."""
    pytester.makepyfile(
        """
        import urllib.error
        import urllib.request

        import pytest

        def test_it(audiences_sandbox):
            with pytest.raises(urllib.error.HTTPError, match="401") as caught:
                urllib.request.urlopen(audiences_sandbox.base_url + "audiences")
            caught.value.close()
            assert len(audiences_sandbox.requests) == 1
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)


def test_a_failure_that_does_not_exist() -> None:
    """Refuse a failure that the sandbox does not know, before it answers with it."""
    with pytest.raises(ValueError, match="'failure' must be in"):
        Answer(failure="slow")  # type: ignore[arg-type]
