"""One account, end to end, against the sandbox on real sockets."""

import asyncio
import gc
import json
import logging
import math
import ssl as tls
import traceback
import warnings
import weakref
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import aiohttp
import aioresponses
import pytest
from conftest import EMPTY_ANSWER, RawConnection

from audiences_async import (
    Account,
    AttemptTimeoutError,
    AudiencesClient,
    AudiencesError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    Event,
    NotFoundError,
    RateLimit,
    RetryPolicy,
    ServerError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
)
from audiences_async.clock import Clock
from audiences_async.events import AccountPaused, AttemptFinished, AttemptStarted, CallFinished, CallStarted
from audiences_async.sandbox import Answer, Sandbox, SteppedTime, many_audiences

KEY = "s3cr3t-k3y"


def statuses(error: AudiencesError) -> list[int | None]:
    """Return the status of each attempt."""
    return [attempt.status for attempt in error.attempts]


# --- the answer


async def test_every_audience_of_the_account(sandbox: Sandbox) -> None:
    """Return every audience of the account, in order and unchanged."""
    rows = list(many_audiences("north", 500))
    account = sandbox.add_account("north", audiences=rows)
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        response = await client.get_audiences(account)
    assert [audience.to_dict() for audience in response] == rows
    assert (response.status, response.description, len(response)) == (200, "Audiences retrieved", 500)


async def test_many_accounts_share_one_client(sandbox: Sandbox) -> None:
    """Calls for different accounts at the same time each get their own audiences."""
    accounts = [sandbox.add_account(f"a{n}", audiences=many_audiences(f"a{n}", 3)) for n in range(20)]
    async with AudiencesClient(base_url=sandbox.base_url, max_connections=5) as client:
        responses = await asyncio.gather(*map(client.get_audiences, accounts))
    for account, response in zip(accounts, responses, strict=True):
        assert [audience.id for audience in response] == [f"{account.name}-{n}" for n in range(3)]


async def test_the_default_account(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the client's own key, or the environment's, for the default account."""
    sandbox.add_account(api_key=KEY)
    async with AudiencesClient(KEY, base_url=sandbox.base_url) as client:
        assert len(await client.get_audiences()) == 2
    monkeypatch.setenv("AUDIENCES_API_KEY", KEY)
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    async with AudiencesClient() as client:
        assert len(await client.get_audiences()) == 2


def test_production_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send requests to production without a base URL, and with an empty one in the environment."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", "")
    assert repr(AudiencesClient(KEY)) == "<AudiencesClient https://api.commbox.io/audiences open>"


# --- retries


@pytest.mark.parametrize("failure", ["reset", "reset-in-body", "cut-body"])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_failures_that_pass_are_absorbed(
    sandbox: Sandbox, north: Account, at_once: RetryPolicy, status: int, failure: Any
) -> None:
    """Retried statuses with any body, and broken connections, are retried until the answer arrives."""
    sandbox.script("north", Answer(status, "<html>"), Answer(failure=failure), Answer(status, b""))
    async with AudiencesClient(base_url=sandbox.base_url, retry=at_once) as client:
        assert len(await client.get_audiences(north)) == 2
    assert [request.answer for request in sandbox.seen("north")] == [status, None, status, 200]


@pytest.mark.parametrize(
    ("status", "kind"), [(400, BadRequestError), (401, UnauthorizedError), (404, NotFoundError), (501, ServerError)]
)
async def test_a_refusal_is_final(sandbox: Sandbox, north: Account, status: int, kind: type[StatusError]) -> None:
    """Other statuses are raised at once, after one request."""
    sandbox.script("north", Answer(status))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(kind) as caught:
            await client.get_audiences(north)
    error = caught.value
    assert (error.stop_reason, error.account, statuses(error)) == ("final", "north", [status])
    assert len(sandbox.requests) == 1


async def test_attempts_are_bounded(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """After max_attempts requests the last error is raised, with a record of each attempt."""
    sandbox.script("north", Answer(500), Answer(429), Answer(failure="cut-body"), *[Answer(503)] * 9)
    policy = RetryPolicy(max_attempts=4)
    async with AudiencesClient(base_url=sandbox.base_url, retry=policy, clock=time.clock) as client:
        with pytest.raises(ServerError, match="gave up after 4 attempts in 4.5 s") as caught:
            await client.get_audiences(north)
    error = caught.value
    assert (error.status, error.stop_reason, error.elapsed) == (503, "attempts", 4.5)
    assert [attempt.number for attempt in error.attempts] == [1, 2, 3, 4]
    assert statuses(error) == [500, 429, None, 503]
    assert [attempt.wait for attempt in error.attempts] == [0.5, 2.0, 2.0, 0.0] == [*time.slept, 0.0]
    assert [attempt.reason for attempt in error.attempts] == ["backoff", "backoff", "backoff", "attempts"]
    assert len(sandbox.requests) == 4


async def test_no_retries(sandbox: Sandbox, north: Account) -> None:
    """Send one request with max_attempts=1."""
    sandbox.script("north", Answer(500))
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(ServerError) as caught:
            await client.get_audiences(north)
    assert caught.value.stop_reason == "attempts"
    assert len(sandbox.requests) == 1


async def test_retry_after_is_waited(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """Wait for a 429's Retry-After in full, plus jitter."""
    sandbox.script("north", Answer(429, retry_after=30), Answer(503, retry_after="soon"))
    time.draw = 0.5
    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock) as client:
        await client.get_audiences(north)
    assert time.slept == [30.5, 0.5]


async def test_a_wait_that_does_not_fit_raises_at_once(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """Raise at once, instead of beginning a wait beyond the timeout: the error has the time to come back."""
    sandbox.script("north", Answer(500), Answer(429, retry_after=59.5))
    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock) as client:
        with pytest.raises(TooManyRequestsError, match="retry after 59.5 s") as caught:
            await client.get_audiences(north)
    error = caught.value
    assert (error.stop_reason, error.retry_after) == ("deadline", 59.5)
    assert time.slept == [0.5]


async def test_a_backoff_that_does_not_fit_raises_at_once(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """Raise at once for the client's own wait too, which is then the error's retry_after."""
    sandbox.script("north", Answer(500))
    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock) as client:
        with pytest.raises(ServerError) as caught:
            await client.get_audiences(north, timeout=0.5)
    assert (caught.value.stop_reason, caught.value.retry_after, time.slept) == ("deadline", 0.5, [])


async def test_the_envelope_of_a_200_decides(sandbox: Sandbox, north: Account, at_once: RetryPolicy) -> None:
    """Retry a 200 whose envelope says 500 as a 500."""
    sandbox.script("north", Answer(200, {"status": 500, "description": "Server Error"}))
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, retry=at_once, on_event=events.append) as client:
        assert len(await client.get_audiences(north)) == 2
    assert [event.attempt.status for event in events if isinstance(event, AttemptFinished)] == [500, 200]


async def test_redirects_are_not_followed(sandbox: Sandbox, north: Account) -> None:
    """Raise an error for a redirect, so that the key stays at its origin."""
    sandbox.script("north", Answer(307, headers={"Location": sandbox.base_url + "elsewhere"}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(StatusError) as caught:
            await client.get_audiences(north)
    assert (caught.value.status, len(sandbox.requests)) == (307, 1)


# aioresponses 0.7.9 builds its streams on an incomplete event loop, which complains when it is collected.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function BaseEventLoop.__del__")
@pytest.mark.parametrize("status", [500, 503])
async def test_decisions_need_no_wire(mocked: aioresponses.aioresponses, at_once: RetryPolicy, status: int) -> None:
    """Make the same decisions with a mocked aiohttp, as in users' own tests."""
    mocked.get("https://api.commbox.io/audiences", status=status)
    mocked.get("https://api.commbox.io/audiences", body=EMPTY_ANSWER)
    async with AudiencesClient(KEY, retry=at_once) as client:
        assert len(await client.get_audiences()) == 0
    (sent,) = mocked.requests.values()
    assert len(sent) == 2
    assert sent[0].kwargs["allow_redirects"] is False


# --- time


async def test_an_attempt_out_of_time_is_retried(sandbox: Sandbox, north: Account, at_once: RetryPolicy) -> None:
    """Cut off an attempt beyond attempt_timeout, and retry it."""
    sandbox.script("north", Answer(delay=30))
    async with AudiencesClient(base_url=sandbox.base_url, retry=at_once, attempt_timeout=0.05) as client:
        assert len(await client.get_audiences(north)) == 2
    assert len(sandbox.requests) == 2


async def test_every_attempt_out_of_time(sandbox: Sandbox, north: Account) -> None:
    """Raise AttemptTimeoutError if no attempt ends in time."""
    sandbox.script("north", Answer(delay=30), Answer(delay=30))
    policy = RetryPolicy(max_attempts=2, base_delay=0)
    async with AudiencesClient(base_url=sandbox.base_url, retry=policy, attempt_timeout=0.05) as client:
        with pytest.raises(AttemptTimeoutError, match="attempt_timeout=0.05 s") as caught:
            await client.get_audiences(north)
    assert (caught.value.stop_reason, statuses(caught.value)) == ("attempts", [None, None])


async def test_the_whole_call_is_bounded_inside_an_attempt(sandbox: Sandbox, north: Account) -> None:
    """Cut off an attempt in flight at the call's timeout, and count it as one."""
    sandbox.script("north", Answer(delay=30))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(DeadlineExceededError, match="timeout=0.05 s") as caught:
            await client.get_audiences(north, timeout=0.05)
    error = caught.value
    assert (error.stop_reason, [attempt.error for attempt in error.attempts]) == ("deadline", ["cut off"])


async def test_the_whole_call_is_bounded_while_queueing(sandbox: Sandbox, north: Account) -> None:
    """End a call that never gets a connection in time, without an attempt."""
    sandbox.script("north", Answer(delay=30))
    async with AudiencesClient(base_url=sandbox.base_url, max_connections=1) as client:
        first = asyncio.create_task(client.get_audiences(north))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        with pytest.raises(DeadlineExceededError) as caught:
            await client.get_audiences(north, timeout=0.05)
        first.cancel()
        await asyncio.wait([first])
    assert caught.value.attempts == ()
    assert len(sandbox.requests) == 1


async def test_queueing_is_no_part_of_an_attempt(sandbox: Sandbox, north: Account) -> None:
    """Exclude the wait for a connection from attempt_timeout."""
    sandbox.script("north", *[Answer(delay=0.2)] * 3)
    settings: dict[str, Any] = {"max_connections": 1, "attempt_timeout": 0.5, "retry": RetryPolicy(max_attempts=1)}
    async with AudiencesClient(base_url=sandbox.base_url, **settings) as client:
        responses = await asyncio.gather(*(client.get_audiences(north) for _ in range(3)))
    assert [len(response) for response in responses] == [2, 2, 2]


async def test_a_key_function_is_bounded_too(sandbox: Sandbox) -> None:
    """End a key function that never returns at the call's timeout."""

    async def provider() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(DeadlineExceededError) as caught:
            await client.get_audiences(Account("north", provider), timeout=0.05)
    assert caught.value.attempts == ()


# --- keys


async def test_a_rotated_key_is_fetched_afresh(sandbox: Sandbox) -> None:
    """Call a key function once more on a 401, and repeat the request at once."""
    keys = iter(["old", "new"])
    sandbox.add_account("north", api_key="new")
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, on_event=events.append) as client:
        assert len(await client.get_audiences(Account("north", lambda: next(keys)))) == 2
    made = [event.attempt for event in events if isinstance(event, AttemptFinished)]
    assert [(attempt.status, attempt.wait, attempt.reason) for attempt in made] == [
        (401, 0.0, "fresh-key"),
        (200, 0.0, "success"),
    ]


async def test_a_fresh_key_is_fetched_only_once(sandbox: Sandbox) -> None:
    """Treat a second 401 as final."""
    asked: list[int] = []

    def provider() -> str:
        asked.append(1)
        return "revoked"

    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(UnauthorizedError) as caught:
            await client.get_audiences(Account("north", provider))
    assert (len(asked), statuses(caught.value), caught.value.stop_reason) == (2, [401, 401], "final")


async def test_a_replay_counts_as_an_attempt(sandbox: Sandbox) -> None:
    """Skip the replay with max_attempts=1."""
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(UnauthorizedError):
            await client.get_audiences(Account("north", lambda: "revoked"))
    assert len(sandbox.requests) == 1


async def test_one_refresh_for_many_waiting_tasks(sandbox: Sandbox) -> None:
    """If a key is revoked during many calls, its function is called once for all of them."""
    asked = 0

    async def provider() -> str:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return f"key-{asked}"

    sandbox.add_account("north", api_key="key-2")
    account = Account("north", provider)
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        responses = await asyncio.gather(*(client.get_audiences(account) for _ in range(20)))
    assert [len(response) for response in responses] == [2] * 20
    assert asked == 2


async def test_accounts_that_share_a_function_do_not_share_its_keys(sandbox: Sandbox) -> None:
    """Call a function that serves several accounts, for example by a context variable, for each of them."""
    tenant: ContextVar[str] = ContextVar("tenant")
    for name in ("north", "south"):
        sandbox.add_account(name, api_key=f"key-{name}", audiences=many_audiences(name, 1))

    def provider() -> str:
        return f"key-{tenant.get()}"

    async with AudiencesClient(base_url=sandbox.base_url) as client:

        async def fetch(name: str) -> str | None:
            tenant.set(name)
            return (await client.get_audiences(Account(name, provider))).data[0].id

        tasks = [asyncio.create_task(fetch(name)) for name in ("north", "south")]
        assert await asyncio.gather(*tasks) == ["north-0", "south-0"]


async def test_a_key_function_that_holds_on_does_not_lift_the_bound(sandbox: Sandbox) -> None:
    """Raise an error for an answer that arrives too late because a key function swallowed the cancellation."""
    sandbox.add_account("north", api_key=KEY)

    async def provider() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return KEY

    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, on_event=events.append) as client:
        with pytest.raises(DeadlineExceededError, match="timeout=0.05 s"):
            await client.get_audiences(Account("north", provider), timeout=0.05)
    ended = [event.error for event in events if isinstance(event, CallFinished)]
    assert ended == ["DeadlineExceededError"], "the end is told once"
    assert sandbox.requests == [], "nothing is sent after the time is up"


async def test_an_answer_that_takes_too_long_to_decode(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """Raise an error for an answer complete after the call's deadline, whatever has delayed the event loop."""

    def hook(event: Event) -> None:
        if isinstance(event, AttemptStarted):
            time.now += 100.0

    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock, on_event=hook) as client:
        with pytest.raises(DeadlineExceededError, match="timeout=60 s") as caught:
            await client.get_audiences(north)
    assert (len(caught.value.attempts), caught.value.elapsed) == (1, 100.0)


async def test_a_session_that_is_closed_while_a_name_is_looked_up() -> None:
    """If the session's owner closes it during a call, the call raises that, and is not cancelled."""
    asked = asyncio.Event()

    class Hangs(aiohttp.abc.AbstractResolver):
        async def resolve(self, *_: Any, **__: Any) -> list[Any]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None:
            pass

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Hangs())) as session:
        client = AudiencesClient(KEY, base_url="https://api.example/", session=session)
        call = asyncio.create_task(client.get_audiences())
        await asked.wait()
    with pytest.raises(ClientClosedError, match="the session given to the client was closed"):
        await call


async def test_a_key_function_that_holds_on_while_the_client_is_closed(sandbox: Sandbox) -> None:
    """Send nothing for a call whose key comes after the client was closed."""
    sandbox.add_account("north", api_key=KEY)
    asked = asyncio.Event()

    async def provider() -> str:
        asked.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return KEY

    async with AudiencesClient(base_url=sandbox.base_url) as client:
        call = asyncio.create_task(client.get_audiences(Account("north", provider)))
        await asked.wait()
    with pytest.raises(ClientClosedError, match="closed while the call ran"):
        await call
    assert sandbox.requests == []


async def test_an_error_that_is_kept_does_not_keep_the_key(sandbox: Sandbox) -> None:
    """While a program keeps the error of an earlier call, the next call still asks the key function."""
    sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(429, retry_after=30))
    asked: list[str] = []

    def provider() -> str:
        asked.append(KEY)
        return KEY

    account = Account("north", provider)
    errors: list[AudiencesError] = []
    gc.collect()
    gc.disable()
    try:
        async with AudiencesClient(base_url=sandbox.base_url, rate_limit=RateLimit(10)) as client:
            for _ in range(4):
                with pytest.raises(AudiencesError) as caught:
                    await client.get_audiences(account, timeout=5.0)
                errors.append(caught.value)
    finally:
        gc.enable()
    assert len(asked) == 4
    assert [type(error).__name__ for error in errors] == ["TooManyRequestsError"] + ["DeadlineExceededError"] * 3


async def test_an_error_is_freed_without_the_garbage_collector(sandbox: Sandbox, north: Account) -> None:
    """Free an error without references at once, with the body it quotes."""
    sandbox.script("north", Answer(400))
    gc.collect()
    gc.disable()
    try:
        async with AudiencesClient(base_url=sandbox.base_url) as client:
            try:
                await client.get_audiences(north)
            except AudiencesError as error:
                gone = weakref.ref(error)
        assert gone() is None
    finally:
        gc.enable()


async def test_a_key_function_that_closes_the_client(sandbox: Sandbox) -> None:
    """Close the client in a key function at its deadline without a wait for that same function."""
    client = AudiencesClient(base_url=sandbox.base_url)

    async def provider() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            await client.aclose()
        raise AssertionError

    with pytest.raises(AudiencesError):
        await client.get_audiences(Account("north", provider), timeout=0.05)


async def test_a_key_function_that_fails_is_an_error_of_the_call(sandbox: Sandbox) -> None:
    """End the call on a programming error in a key function, before anything is sent."""

    def provider() -> str:
        raise KeyError("north")

    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(ConfigurationError, match="account 'north': .* raised KeyError") as caught:
            await client.get_audiences(Account("north", provider))
    assert (caught.value.attempts, caught.value.stop_reason, sandbox.requests) == ((), "final", [])


async def test_the_key_is_nowhere_to_be_seen(sandbox: Sandbox) -> None:
    """Mask a key that the service echoes in every text, field and traceback with locals of the error."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(400, {"description": f"bad {KEY}"}, headers={"X-Echo": KEY}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(BadRequestError) as caught:
            await client.get_audiences(account)
    error = caught.value
    del account
    rendered = traceback.TracebackException.from_exception(error, capture_locals=True)
    shown = "".join(rendered.format()) + repr(vars(error)) + repr(client)
    assert KEY not in shown
    assert "bad ***" in shown
    assert (error.__cause__, error.__context__) == (None, None)


# --- bad input: an error, and nothing sent


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"api_key": ""}, "API key is empty"),
        ({"api_key": "a\nb"}, "line break"),
        ({"api_key": 5}, "must be text"),
        ({"base_url": "http://api.commbox.io/"}, "allow_http"),
        ({"base_url": "commbox"}, "https://"),
        ({"timeout": -1}, "timeout must be a finite number of seconds above 0, got -1"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.inf}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
        ({"timeout": 10**400}, "timeout"),
        ({"timeout": None}, "timeout"),
        ({"attempt_timeout": 0}, "attempt_timeout"),
        ({"retry": 5}, "retry must be RetryPolicy, got int"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"ssl": False}, "ssl must be SSLContext or None, got bool"),
        ({"ssl": tls._create_unverified_context()}, "verify"),
        ({"ssl": tls.create_default_context(tls.Purpose.CLIENT_AUTH)}, "verify"),
        ({"proxy": "socks5://proxy"}, "proxy"),
        ({"session": 5}, "session must be ClientSession, got int"),
        ({"on_event": 5}, "on_event must be callable"),
        ({"clock": 5}, "clock must be Clock"),
    ],
)
def test_bad_settings_are_refused_when_the_client_is_made(arguments: dict[str, Any], told: str) -> None:
    """Reject each invalid argument by name; no traceback shows the key."""
    with pytest.raises(ConfigurationError, match=told) as caught:
        AudiencesClient(**{"api_key": KEY} | arguments)
    del arguments
    rendered = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    ours = [str(frame.locals) for frame in rendered.stack if "audiences_async/" in frame.filename]
    assert KEY not in "".join(ours)


def test_max_attempts_0_is_refused() -> None:
    """Reject a policy without an attempt."""
    with pytest.raises(ConfigurationError, match="max_attempts must be a whole number of 1 or more, got 0"):
        RetryPolicy(max_attempts=0)


@pytest.mark.parametrize(
    ("account", "timeout", "told"),
    [
        (None, None, "no account"),
        ("north", None, "account must be Account, got str"),
        (Account("n", KEY), -1, "timeout"),
        (Account("n", KEY), 0, "timeout"),
    ],
)
async def test_bad_arguments_of_a_call(sandbox: Sandbox, account: Any, timeout: Any, told: str) -> None:
    """Send nothing for a call without an account, or with an invalid timeout."""
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(ConfigurationError, match=told):
            await client.get_audiences(account, timeout=timeout)
    assert sandbox.requests == []


# --- lifecycle


async def test_a_client_needs_no_block(sandbox: Sandbox, north: Account) -> None:
    """Open a client on first use; aclose() closes it, and may be called again."""
    client = AudiencesClient(base_url=sandbox.base_url)
    assert len(await client.get_audiences(north)) == 2
    await asyncio.gather(client.aclose(), client.aclose())
    await client.aclose()
    assert repr(client).endswith("closed>")


async def test_use_after_close(sandbox: Sandbox, north: Account) -> None:
    """Raise an error for a call on a closed client, and send nothing."""
    client = AudiencesClient(base_url=sandbox.base_url)
    await client.aclose()
    with pytest.raises(ClientClosedError, match="closed"):
        await client.get_audiences(north)
    with pytest.raises(ClientClosedError, match="closed"):
        await client.__aenter__()
    assert sandbox.requests == []


def test_use_from_another_event_loop(sandbox: Sandbox, north: Account) -> None:
    """Raise an error for a client used on another loop than its first."""
    client = AudiencesClient(base_url=sandbox.base_url)

    with asyncio.Runner() as one, asyncio.Runner() as other:
        one.run(client.get_audiences(north))
        with pytest.raises(ClientClosedError, match="another event loop"):
            other.run(client.get_audiences(north))
        one.run(client.aclose())
    assert len(sandbox.requests) == 1


async def test_closing_ends_running_calls(sandbox: Sandbox, north: Account) -> None:
    """Calls in flight at aclose(), in an attempt or in a wait, end with ClientClosedError."""
    sandbox.script("north", Answer(delay=30), Answer(500))
    policy = RetryPolicy(base_delay=20)
    client = AudiencesClient(base_url=sandbox.base_url, retry=policy, clock=Clock(random=lambda: 1.0))
    calls = [asyncio.create_task(client.get_audiences(north)) for _ in range(2)]
    await asyncio.to_thread(sandbox.wait_for_requests, 2)
    await client.aclose()
    for call in calls:
        with pytest.raises(ClientClosedError, match="while the call ran"):
            await call


async def test_a_given_session_stays_its_owners(sandbox: Sandbox, north: Account) -> None:
    """Use a caller's session without closing it."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        async with AudiencesClient(base_url=sandbox.base_url, session=session) as client:
            assert len(await client.get_audiences(north)) == 2
        assert not session.closed


async def test_our_own_session_is_closed(raw: Any) -> None:
    """Leave no connection behind when the client is closed."""
    ended = asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer()
        await connection.reader.read()
        ended.set()

    server = await raw(serve)
    async with AudiencesClient("key", base_url=server.base_url) as client:
        await client.get_audiences()
        assert not ended.is_set()
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_session_with_cookies_serves_one_account(sandbox: Sandbox, north: Account) -> None:
    """Reject a second account on a session that keeps cookies, and send nothing for it."""
    south = sandbox.add_account("south")
    async with (
        aiohttp.ClientSession() as session,
        AudiencesClient(base_url=sandbox.base_url, session=session) as client,
    ):
        await client.get_audiences(north)
        await client.get_audiences(Account("north", north.api_key))
        with pytest.raises(ConfigurationError, match="DummyCookieJar"):
            await client.get_audiences(south)
    assert len(sandbox.requests) == 2


async def test_two_clients_on_a_session_with_cookies(sandbox: Sandbox, north: Account) -> None:
    """Apply the rule to the session: a second client does not open it to a second account."""
    south = sandbox.add_account("south")
    async with aiohttp.ClientSession() as session:
        await AudiencesClient(base_url=sandbox.base_url, session=session).get_audiences(north)
        with pytest.raises(ConfigurationError, match="one account only"):
            await AudiencesClient(base_url=sandbox.base_url, session=session).get_audiences(south)


async def test_a_given_session_that_is_closed_meanwhile(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """Raise ClientClosedError if a session's owner closes it, also between two attempts."""
    sandbox.script("north", Answer(500))
    session = aiohttp.ClientSession()

    async def sleep(seconds: float) -> None:
        await session.close()

    clock = Clock(sleep=sleep)
    client = AudiencesClient(base_url=sandbox.base_url, session=session, clock=clock)
    with pytest.raises(ClientClosedError, match="session"):
        await client.get_audiences(north)
    assert len(sandbox.requests) == 1


def test_a_given_session_of_another_loop(sandbox: Sandbox, north: Account) -> None:
    """Reject a session that belongs to another event loop."""

    async def make() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    with asyncio.Runner() as one, asyncio.Runner() as other:
        session = one.run(make())
        with pytest.raises(ClientClosedError, match="another event loop"):
            other.run(AudiencesClient(base_url=sandbox.base_url, session=session).get_audiences(north))
        one.run(session.close())
    assert sandbox.requests == []


async def test_a_session_that_would_send_other_credentials_is_refused() -> None:
    """Reject a session with trust_env, with auth set, or closed."""
    async with aiohttp.ClientSession(trust_env=True) as session:
        with pytest.raises(ConfigurationError, match="trust_env"):
            AudiencesClient(KEY, session=session)
    with pytest.raises(ClientClosedError, match="session"):
        AudiencesClient(KEY, session=session)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        session = aiohttp.ClientSession(auth=aiohttp.BasicAuth("somebody"))
    with pytest.raises(ConfigurationError, match="auth set"):
        AudiencesClient(KEY, session=session)
    await session.close()


@pytest.mark.parametrize(
    "own", [{"ssl": tls.create_default_context()}, {"proxy": "http://proxy"}, {"max_connections": 5}]
)
async def test_settings_of_our_own_session_do_not_go_with_a_given_one(own: dict[str, Any]) -> None:
    """Reject ssl, proxy and max_connections together with session."""
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigurationError, match=f"{next(iter(own))} cannot be combined with session"):
            AudiencesClient(KEY, session=session, **own)


# --- cancellation


@pytest.mark.parametrize("answer", [Answer(delay=30), Answer(500, retry_after=30)])
async def test_cancellation_is_immediate(sandbox: Sandbox, north: Account, answer: Answer) -> None:
    """End a call cancelled in an attempt or in a wait as cancelled: it retries nothing and leaves no task."""
    sandbox.script("north", answer)
    async with AudiencesClient(base_url=sandbox.base_url, max_connections=1) as client:
        call = asyncio.create_task(client.get_audiences(north))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        before = len(asyncio.all_tasks())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(asyncio.all_tasks()) < before
        assert len(await client.get_audiences(north)) == 2, "the slot was given back"
    assert len(sandbox.requests) == 2


async def test_cancellation_while_queueing(sandbox: Sandbox, north: Account) -> None:
    """Remove a call cancelled while it waits for a connection from the queue."""
    sandbox.script("north", Answer(delay=0.1))
    async with AudiencesClient(base_url=sandbox.base_url, max_connections=1) as client:
        first = asyncio.create_task(client.get_audiences(north))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        queued = asyncio.create_task(client.get_audiences(north))
        await asyncio.sleep(0)
        queued.cancel()
        assert len(await first) == 2
        assert len(await client.get_audiences(north)) == 2
    assert queued.cancelled()
    assert len(sandbox.requests) == 2


async def test_a_cancelled_attempt_shows_no_key(sandbox: Sandbox) -> None:
    """Render the traceback of a cancelled call, with locals, without the key."""
    sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(delay=30))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        call = asyncio.create_task(client.get_audiences(Account("north", KEY)))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        call.cancel()
        try:
            await call
        except asyncio.CancelledError as cancelled:
            shown = "".join(traceback.TracebackException.from_exception(cancelled, capture_locals=True).format())
    assert "aiohttp" not in shown
    assert KEY not in shown


# --- events


async def test_events_tell_what_happened(sandbox: Sandbox, north: Account, time: SteppedTime) -> None:
    """Report each attempt and the end of the call as they happen."""
    sandbox.script("north", Answer(500))
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, clock=time.clock, on_event=events.append) as client:
        await client.get_audiences(north)
    start, started, first, started_again, second, end = events
    assert (start, started) == (CallStarted("north"), AttemptStarted("north", 1, 0.0))
    assert started_again == AttemptStarted("north", 2, 0.0)
    assert isinstance(first, AttemptFinished)
    assert isinstance(second, AttemptFinished)
    assert (first.attempt.status, first.attempt.wait, first.attempt.reason) == (500, 0.5, "backoff")
    assert (second.attempt.number, second.attempt.error, second.attempt.reason) == (2, None, "success")
    assert end == CallFinished("north", attempts=2, elapsed=0.5, error=None)


async def test_events_tell_of_errors(sandbox: Sandbox, north: Account) -> None:
    """Name the error's class in the event for the end of a failed call."""
    sandbox.script("north", Answer(404))
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, on_event=events.append) as client:
        with pytest.raises(NotFoundError):
            await client.get_audiences(north)
    assert isinstance(events[-1], CallFinished)
    assert (events[-1].attempts, events[-1].error) == (1, "NotFoundError")


async def test_events_tell_of_cancelled_calls(sandbox: Sandbox, north: Account) -> None:
    """Report the end of a cancelled call too, with the request in flight."""
    sandbox.script("north", Answer(delay=60))
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, on_event=events.append) as client:
        task = asyncio.create_task(client.get_audiences(north))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        task.cancel()
        await asyncio.wait({task})
    assert isinstance(events[-1], CallFinished)
    assert (events[-1].attempts, events[-1].error) == (1, "CancelledError")


async def test_logging_is_quiet_until_debug(sandbox: Sandbox, north: Account, caplog: pytest.LogCaptureFixture) -> None:
    """Log each attempt and the end of the call at DEBUG; above it, nothing."""
    sandbox.script("north", Answer(429, retry_after=0), Answer(200), Answer(404))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with caplog.at_level(logging.DEBUG, logger="audiences_async"):
            await client.get_audiences(north)
        told = [record.getMessage() for record in caplog.records if record.name == "audiences_async"]
        assert [one.split("(")[0] for one in told] == [
            "CallStarted", "AttemptStarted", "AccountPaused", "AttemptFinished", "AttemptStarted", "AccountResumed",
            "AttemptFinished", "CallFinished",
        ]  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="audiences_async"), pytest.raises(NotFoundError):
            await client.get_audiences(north)
        assert [record for record in caplog.records if record.name == "audiences_async"] == []


async def test_a_failing_hook_hurts_nobody(sandbox: Sandbox, north: Account, caplog: pytest.LogCaptureFixture) -> None:
    """Exceptions of on_event are logged, and the call continues."""

    def hook(event: Event) -> None:
        raise KeyError(event.account)

    async with AudiencesClient(base_url=sandbox.base_url, on_event=hook) as client:
        assert len(await client.get_audiences(north)) == 2
    assert "on_event raised" in caplog.text


async def test_a_log_that_raises_does_not_hurt_the_call(
    sandbox: Sandbox, north: Account, caplog: pytest.LogCaptureFixture
) -> None:
    """Keep a call's answer and a connection's slot when a log filter raises, on any record."""

    def fail(record: logging.LogRecord) -> bool:
        raise AttributeError("request_id")

    def hook(event: Event) -> None:
        raise LookupError

    caplog.set_level(logging.DEBUG, logger="audiences_async")
    caplog.handler.addFilter(fail)
    try:
        async with AudiencesClient(base_url=sandbox.base_url, max_connections=1, on_event=hook) as client:
            for _ in range(3):
                assert len(await client.get_audiences(north, timeout=10.0)) == 2
    finally:
        caplog.handler.removeFilter(fail)


@pytest.mark.parametrize("at", [CallStarted, AttemptStarted, AttemptFinished, CallFinished, AccountPaused])
async def test_a_hook_that_ends_the_program_leaves_nothing_taken(
    sandbox: Sandbox, north: Account, at: type[Event]
) -> None:
    """If a hook raises a BaseException, it propagates, and other calls continue."""

    class Ends(BaseException):
        pass

    def hook(event: Event) -> None:
        nonlocal at
        if isinstance(event, at):
            at = type(None)
            raise Ends

    if at is AccountPaused:
        sandbox.script("north", Answer(429, retry_after=0.01))
    async with AudiencesClient(base_url=sandbox.base_url, max_connections=1, on_event=hook) as client:
        with pytest.raises(Ends):
            await client.get_audiences(north)
        others = await asyncio.gather(*(client.get_audiences(north, timeout=10.0) for _ in range(3)))
        assert [len(answer) for answer in others] == [2, 2, 2]
        (pace,) = client.snapshot().accounts
        assert (pace.in_flight, pace.waiting) == (0, 0)


async def test_concurrent_calls_keep_their_own_attempts(sandbox: Sandbox) -> None:
    """Many calls that fail at the same time each have their own attempts, waits and errors."""
    accounts = [sandbox.add_account(f"a{n}") for n in range(30)]
    for number, account in enumerate(accounts):
        sandbox.script(
            account.name, *[Answer(500)] * (number % 3), Answer(404, json.dumps({"description": account.name}))
        )
    policy = RetryPolicy(base_delay=0.01, max_delay=0.01)
    async with AudiencesClient(base_url=sandbox.base_url, retry=policy) as client:
        results = await asyncio.gather(*map(client.get_audiences, accounts), return_exceptions=True)
    for number, (account, result) in enumerate(zip(accounts, results, strict=True)):
        assert isinstance(result, NotFoundError)
        assert (result.account, result.description) == (account.name, account.name)
        assert statuses(result) == [500] * (number % 3) + [404]
