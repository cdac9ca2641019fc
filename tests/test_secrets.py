"""No key in any text, log, error, pickle or event, even if the server echoes it."""

import asyncio
import base64
import gc
import html
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote, quote_plus

import pytest
from command import COMMAND
from conftest import EMPTY_ANSWER, RawConnection, RawServer
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async import (
    Account,
    AttemptTimeoutError,
    AudiencesClient,
    AudiencesError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    DeadlineExceededError,
    Event,
    Failed,
    ForbiddenError,
    InvalidResponseError,
    NotFoundError,
    RateLimit,
    ResponseTooLargeError,
    RetryBudget,
    RetryPolicy,
    ServerError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
    errors,
)
from audiences_async._call import attempts
from audiences_async._http.wire import Reply, read
from audiences_async._jobs.outcome_files import line
from audiences_async.accounts import AccountFile
from audiences_async.credentials import ApiKey
from audiences_async.events import AttemptFinished
from audiences_async.sandbox import Answer, Sandbox, many_audiences
from audiences_async.structuring import run_to_completion

StartRaw: TypeAlias = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]

# By name, so that no frame of a test has a key among its locals: tracebacks are rendered with them.
KEYS: Final = {
    "plain": "Zq7Lw3RtB9fK2mXv",
    "escaped": "Zq7/L+w3\"R<t>B9&f=K2'm%X v",
    "backslash": "Zq7Lw3Rt\\B9fK2mXv\"'uV5",
    "unicode": "Zq7Lw3Rt-ключ-é'\"B9fK2mXv",
}
KEY: Final = KEYS["plain"]
ONCE: Final = RetryPolicy(max_attempts=1)
THRICE: Final = RetryPolicy(max_attempts=3, base_delay=0, throttle_base_delay=0)
EVERY_ERROR: Final = {
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AudiencesError)
}


def json_text(key: str) -> str:
    """Escape as Python's JSON does."""
    return json.dumps(key)[1:-1]


def dotnet_json(key: str) -> str:
    """Escape as .NET's JSON does, every punctuation mark included."""
    return "".join(c if c.isalnum() and c.isascii() else f"\\u{ord(c):04X}" for c in key)


def percent(key: str) -> str:
    """Escape for a URL."""
    return quote(key, safe="")


def lower_percent(key: str) -> str:
    """Escape for a URL, in lower-case hexadecimal."""
    return "".join(part.lower() if part[:1] == "%" else part for part in percent_parts(key))


def percent_parts(key: str) -> list[str]:
    """Escape each character for a URL."""
    return [quote(c, safe="") for c in key]


def html_decimal(key: str) -> str:
    """Escape as decimal character references of HTML."""
    return "".join(c if c.isalnum() and c.isascii() else f"&#{ord(c)};" for c in key)


SPELLINGS: Final[dict[str, Callable[[str], str]]] = {
    "plain": str,
    "json": json_text,
    "json-utf8": lambda key: json.dumps(key, ensure_ascii=False)[1:-1],
    "dotnet-json": dotnet_json,
    "percent": percent,
    "lower-percent": lower_percent,
    "plus": quote_plus,
    "html": html.escape,
    "html-decimal": html_decimal,
    "php": lambda key: html.escape(key).replace("&#x27;", "&#039;"),
}
"""Spellings in which a server may echo the key of a request."""


def forms(key: str) -> dict[str, str]:
    """Return the forms that must not appear: the key in each spelling, as base64, and its halves."""
    encoded = base64.b64encode(key.encode()).decode().rstrip("=")
    half = len(key) // 2
    assert half >= 8
    return {
        **{name: spell(key) for name, spell in SPELLINGS.items()},
        "base64": encoded,
        "base64-url": encoded.replace("+", "-").replace("/", "_"),
        "bytes": str(key.encode())[2:-1],
        "repr": repr(key)[1:-1],
        "latin-1": key.encode().decode("latin-1"),
        "first half": key[:half],
        "second half": key[half:],
    }


def assert_no_key(shown: str | bytes, name: str = "plain") -> None:
    """Check that the text has no form of the key; the failure names the form without the rest of the text."""
    text = shown.decode(errors="replace") if isinstance(shown, bytes) else shown
    for form, secret in forms(KEYS[name]).items():
        at = text.lower().find(secret.lower())
        around = text[max(0, at - 120) : at + len(secret) + 40]
        assert at < 0, f"the key shows, {form}: ...{around!r}..."


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Return an exception with all its causes and contexts."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]


def everything_of(error: BaseException) -> str:
    """Return all text of an exception and its chain, rendered with the locals of every frame."""
    shown = ["".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())]
    shown += [everything_about(one) for one in chain(error)]
    return "\n".join(shown)


def everything_about(value: Any) -> str:
    """Return the text of a value, and of its fields and pickles."""
    shown = [repr(value), str(value), f"{value}", f"{value!s:>5}", repr(getattr(value, "args", None))]
    for name, of in getattr(value, "__dict__", {}).items():
        shown += [name, repr(of), str(of), of.decode(errors="replace") if isinstance(of, bytes) else ""]
    if isinstance(getattr(value, "headers", None), object) and hasattr(value, "headers"):
        shown += [f"{one}: {two}" for one, two in value.headers.items()]
    return "\n".join([*shown, pickled(value)])


def pickled(value: Any) -> str:
    """Return the pickles of a value; empty if it cannot be pickled."""
    try:
        return "\n".join(pickle.dumps(value, protocol).decode("latin-1") for protocol in range(2, 6))
    except (TypeError, pickle.PicklingError, AttributeError):
        return ""


async def failure(client: AudiencesClient, account: Account, **settings: Any) -> AudiencesError:
    """Return the error of a call, raised and caught as callers do."""
    with pytest.raises(AudiencesError) as caught:
        await client.get_audiences(account, **settings)
    return caught.value


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Log everything from every logger."""
    for name in (None, "asyncio", "aiohttp", "aiohttp.client", "audiences_async"):
        caplog.set_level(logging.DEBUG, logger=name)


@pytest.fixture
async def debug() -> None:
    """Run the event loop in debug mode, which logs each callback with its arguments."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0


# --- what a server echoes


def echoes(secret: str) -> dict[str, Answer]:
    """Return every way to echo a text in an error, or in an unreadable 200."""
    page = f"<html><a href='/?key={secret}'>{secret}</a></html>"
    envelope = {"status": 400, "description": f"the key {secret} is bad", "response_time": secret, secret: [secret]}
    row = {"type": "Static", "id": secret, "name": secret, "created_time": secret, "user_count": secret, secret: secret}
    return {
        "description": Answer(400, envelope),
        "description-escaped": Answer(400, json.dumps(envelope)),
        "html": Answer(403, page, headers={"Content-Type": "text/html"}),
        "unfinished json": Answer(404, '{"description": "' + secret),
        "retried": Answer(503, page),
        "throttled": Answer(429, {"description": secret}),
        "redirect": Answer(302, headers={"Location": f"/login?key={quote(secret)}"}),
        "envelope of a 200": Answer(200, {"status": "401", "description": f"Bearer {secret}", "data": []}),
        "no json": Answer(200, page),
        "records": Answer(200, {"status": "200", "data": [row, row | {"type": secret, "id": 1}, secret, [secret]]}),
        "status": Answer(200, {"status": secret, "description": [secret], "data": secret}),
        "no content": Answer(206, page),
        "large": Answer(200, page * 20_000),
        "utf-16": Answer(400, secret.encode("utf-16")),
        "gone after half": Answer(400, page * 100, failure="cut-body"),
        "encoding": Answer(200, page, headers={"Content-Encoding": "gzip"}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", KEYS)
@pytest.mark.once
async def test_no_echo_of_the_key_gets_through(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, debug: None, name: str, spelling: str
) -> None:
    """However a response echoes the key, in any spelling: the error, its events and the logs never show it."""
    account = sandbox.add_account("north", api_key=KEYS[name])
    events: list[Event] = []
    async with AudiencesClient(
        base_url=sandbox.base_url, retry=THRICE, max_body_bytes=500_000, on_event=events.append, budget=None
    ) as client:
        for place, answer in echoes(SPELLINGS[spelling](KEYS[name])).items():
            sandbox.script("north", *[answer] * 3)
            error = await failure(client, account)
            sandbox._accounts["north"].script.clear()
            told: list[str | bytes] = [
                everything_of(error),
                *map(everything_about, error.attempts),
                line(Failed(account, 0.1, error)),
            ]
            for shown in told:
                assert_no_key(shown, name)
            assert isinstance(error, StatusError | InvalidResponseError | ConnectionFailedError), place
    for event in events:
        assert_no_key(everything_about(event), name)
    assert_no_key(caplog.text, name)
    assert "Executing" in caplog.text, "the loop's debug mode logs"


@pytest.mark.parametrize("spelling", ["plain", "percent"])
async def test_no_echo_in_a_header_gets_through(sandbox: Sandbox, spelling: str) -> None:
    """A header whose value, or whose very name, echoes the key is masked in the error."""
    account = sandbox.add_account("north", api_key=KEY)
    secret = SPELLINGS[spelling](KEYS["plain"])
    headers = {"X-Echo": f"Bearer {secret}", "Set-Cookie": f"key={secret}", f"X-{secret}-Seen": "1"}
    sandbox.script("north", Answer(400, headers=headers))
    del headers, secret
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        error = await failure(client, account)
    assert isinstance(error, StatusError)
    assert error.headers["X-Echo"] == "Bearer ***"
    assert_no_key(everything_of(error))


async def test_no_echo_as_base64_gets_through(sandbox: Sandbox) -> None:
    """A server that echoes the key as base64, as a debugging proxy may, is masked like the others."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(400, {"description": base64.b64encode(KEY.encode()).decode()}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        error = await failure(client, account)
    assert_no_key(everything_of(error))


def test_the_key_before_this_one_at_the_cut_of_a_body() -> None:
    """If a response still echoes the replaced key, and is cut within it, the rest of the key is masked."""
    key = ApiKey("another key", before=ApiKey(KEY))
    assert key.redact_start(b"bad key " + KEY.encode(), 8 + len(KEY) - 2) == b"bad key ***"
    assert KEY.encode("utf-16-le") not in key.redact_start(KEY.encode("utf-16-le"), 1000)


@pytest.mark.parametrize("key", ["Zq7Lw3Rt\xa0B9fK2mXv", "Zq7Lw3Rt\u200bB9fK2mXv", "Zq7Lw3Rt\U000e0001B9fK2mXv"])
def test_a_key_that_our_own_words_escape(key: str) -> None:
    """A value in a problem is written as Python's ``repr``; a key in it is masked all the same."""
    record = {"type": "Dynamic", "id": "1", "name": "one", "created_time": key}
    body = json.dumps({"status": "200", "data": [record]}).encode()
    reply = Reply(200, CIMultiDictProxy(CIMultiDict()), body)
    error = run_to_completion(read(reply, ApiKey(key), now=0.0))
    assert isinstance(error, InvalidResponseError)
    assert any("***" in problem for problem in error.problems)
    assert "Zq7Lw3Rt" not in str(error.problems)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_key_that_the_service_encodes_in_its_own_way(encoding: str) -> None:
    """A key with characters beyond ASCII is masked if the service writes it in Latin-1, or with question marks."""
    echoed = "bad key Zq7Lw3Rt-é-B9fK2mXv".encode(encoding, "replace")
    assert ApiKey("Zq7Lw3Rt-é-B9fK2mXv").redact_start(echoed, 1000) == b"bad key ***"


async def test_a_key_at_the_cut_of_a_long_header(raw: StartRaw) -> None:
    """A partly quoted Content-Encoding never quotes a part of the key."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.answer(head=b"HTTP/1.1 200 OK\r\nContent-Encoding: " + b"x" * 140 + KEY.encode() * 4)

    server = await raw(serve)
    async with AudiencesClient(base_url=server.base_url, retry=ONCE) as client:
        error = await failure(client, Account("north", KEY * 4))
    assert "xxx" in str(error)
    assert KEY[:4].lower() not in str(error).lower()


HEADS: Final = {
    "status line": b"HTTP/1.1 200%s OK\r\n\r\n",
    "no status line": b"%s\r\n\r\n",
    "version": b"HTTP/%s 200 OK\r\n\r\n",
    "header value": b"HTTP/1.1 200 OK\r\nX: %s\x00\r\n\r\n",
    "header name": b"HTTP/1.1 200 OK\r\n%s \x00: 1\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n",
    "transfer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n",
    "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
    "chunk size of an error": b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",
    "content encoding": b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: 1\r\n\r\nx",
    "reason": b"HTTP/1.1 400 %s\r\nContent-Length: 0\r\n\r\n",
    "cut body": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n%s",
    "long value": b"HTTP/1.1 200 OK\r\nX: " + b"%s" * 700 + b"\r\n\r\n",
    "long line": b"%s" * 700 + b"\r\n\r\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
async def test_no_echo_in_a_broken_head_gets_through(
    raw: StartRaw, caplog: pytest.LogCaptureFixture, debug: None, head: str
) -> None:
    """A malformed response that quotes the key, wherever the transport cuts it, shows nothing of it."""
    padding = 0

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        secret = b"x" * padding + KEY.encode()
        await connection.send(HEADS[head] % ((secret,) * HEADS[head].count(b"%s")))

    server = await raw(serve)
    async with AudiencesClient(base_url=server.base_url, retry=ONCE) as client:
        for padding in range(0, 26, 3):  # noqa: B007 - read by the server
            error = await failure(client, Account("north", KEY))
            assert_no_key(everything_of(error))
    assert_no_key(caplog.text)


# --- every error class


async def reached(sandbox: Sandbox, account: Account, kind: type[AudiencesError]) -> AudiencesError:
    """Return an error of exactly this class, from a real server that echoes the key in it."""
    echo = KEYS["plain"]
    statuses: dict[type[AudiencesError], int] = {
        BadRequestError: 400,
        UnauthorizedError: 401,
        ForbiddenError: 403,
        NotFoundError: 404,
        TooManyRequestsError: 429,
        ServerError: 500,
        StatusError: 418,
    }
    page = Answer(200, f"<html>{echo}", headers={"X-Echo": echo})
    answers: dict[type[AudiencesError], Answer] = {
        InvalidResponseError: page,
        ResponseTooLargeError: Answer(200, echo * 200),
        ConnectionFailedError: Answer(200, echo * 9, failure="cut-body"),
        AttemptTimeoutError: Answer(200, echo, delay=30),
        DeadlineExceededError: Answer(200, echo, delay=30),
        ClientClosedError: Answer(200, echo, delay=30),
    }
    refusal = Answer(statuses.get(kind, 400), {"description": echo}, headers={"X-Echo": echo})
    sandbox.script("north", answers.get(kind, refusal))
    del echo, page, answers, refusal
    limits: dict[str, Any] = {"attempt_timeout": 0.1} if kind is AttemptTimeoutError else {}
    client = AudiencesClient(base_url=sandbox.base_url, retry=ONCE, max_body_bytes=1000, **limits)
    if kind is ClientClosedError:
        task = asyncio.create_task(failure(client, account))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        await client.aclose()
        return await task
    if kind is ConfigurationError:
        account = Account("north", padded)
    async with client:
        return await failure(client, account, timeout=0.1 if kind is DeadlineExceededError else 20.0)


async def padded() -> str:
    """Return a key that is refused."""
    await asyncio.sleep(0)
    return KEYS["plain"] + "\n"


REACHABLE: Final = sorted(EVERY_ERROR - {AudiencesError, errors.TransportError}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", REACHABLE)
async def test_no_error_shows_the_key(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, debug: None, kind: type[AudiencesError]
) -> None:
    """No error class shows the key in its text, fields, chain, pickles or traceback with locals."""
    account = sandbox.add_account("north", api_key=KEY)
    error = await reached(sandbox, account, kind)
    assert type(error) is kind
    for shown in (everything_of(error), line(Failed(account, 0.1, error)), repr(Failed(account, 0.1, error))):
        assert_no_key(shown)
    for protocol in range(2, 6):
        assert_no_key(everything_of(pickle.loads(pickle.dumps(error, protocol))))
    assert_no_key(caplog.text)


def test_no_refused_argument_shows_the_key() -> None:
    """Invalid keys, and settings beside a key, are refused without showing it."""
    for make in (
        lambda: AudiencesClient(KEYS["plain"] + "\n"),
        lambda: AudiencesClient([KEYS["plain"]]),  # type: ignore[arg-type]
        lambda: AudiencesClient(KEYS["plain"].encode()),  # type: ignore[arg-type]
        lambda: AudiencesClient(KEYS["plain"], timeout=-1),
        lambda: AudiencesClient(KEYS["plain"], base_url="http://example.org"),
        lambda: AudiencesClient(base_url=f"https://{KEYS['plain']}@example.org"),
        lambda: AudiencesClient(base_url=f"https://:{KEYS['plain']}@exam ple.org"),
        lambda: AudiencesClient(KEYS["plain"], proxy=f"socks5://me:{KEYS['plain']}@127.0.0.1"),
        lambda: Account("", KEYS["plain"]),
        lambda: Account("north", f" {KEYS['plain']}"),
        lambda: Account("north", KEYS["plain"].encode()),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError) as caught:
            make()
        # The test's own lambdas hold nothing; all frames of the package are shown.
        assert_no_key(everything_of(caught.value))


async def test_a_key_function_that_fails_after_a_refusal(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """If the fresh key is unavailable, or is refused too, neither key shows."""
    sandbox.add_account("other")
    sandbox.script("other", Answer(401))
    given = iter([KEYS["plain"], KEYS["plain"][::-1]])

    def provider() -> str:
        return next(given)

    async with AudiencesClient(base_url=sandbox.base_url) as client:
        for _ in range(2):
            error = await failure(client, Account("north", provider))
            shown = everything_of(error)
            assert_no_key(shown)
            assert KEYS["plain"][::-1] not in shown
    assert type(error) is ConfigurationError
    assert_no_key(caplog.text)


async def test_an_old_key_that_is_echoed_late(sandbox: Sandbox) -> None:
    """After a fresh key was fetched, a response that still echoes the old one shows neither."""
    old, new = KEYS["plain"], KEYS["escaped"]
    sandbox.add_account("north", api_key=new)
    sandbox.script("north", Answer(400, {"description": f"{old} was replaced by {new}"}))
    given = iter([old, new])
    del old, new
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        error = await failure(client, Account("north", lambda: next(given)))
    assert type(error) is BadRequestError
    for name in ("plain", "escaped"):
        assert_no_key(everything_of(error), name)


# --- cancelled calls


@pytest.mark.parametrize("answer", [Answer(delay=30), Answer(500, f"<html>{KEY}", retry_after=20)])
async def test_a_cancelled_call_shows_no_key(sandbox: Sandbox, answer: Answer) -> None:
    """A call that is cancelled in an attempt or in a wait has a traceback without the key, with locals."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", answer)
    del answer
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        task = asyncio.create_task(client.get_audiences(account))
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    assert_no_key(everything_of(caught.value))


async def test_a_call_cancelled_while_it_decodes_shows_no_key(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is cancelled while it decodes a large response that echoes the key does not show it."""
    decoding = asyncio.Event()

    def slowly(reply: Reply, *rest: Any, **settings: Any) -> Iterator[None]:
        decoding.set()
        yield from itertools.repeat(None)

    monkeypatch.setattr(attempts, "read_any", slowly)
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(200, f"<html>{KEYS['plain']}" + " " * 300_000, headers={"X-Echo": KEYS["plain"]}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        task = asyncio.create_task(client.get_audiences(account))
        await asyncio.wait_for(decoding.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
    assert_no_key(everything_of(caught.value))


# --- public objects


async def test_no_public_object_shows_the_key(sandbox: Sandbox) -> None:
    """The text of every public object is without the key."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(200, {"status": 200, "description": "", "data": []}), Answer(400), Answer(429))
    events: list[Event] = []
    client = AudiencesClient(KEY, base_url=sandbox.base_url, retry=ONCE, on_event=events.append)
    async with client:
        outcomes = await client.fetch_all([account] * 4, concurrency=1)
        values: list[Any] = [client, account, account.credential, *outcomes, *events, client.snapshot()]
        values += [outcome.error for outcome in outcomes if isinstance(outcome, Failed)]
        values += [ONCE, RetryBudget(), RateLimit(1.0), sandbox, *sandbox.requests, client.get_audiences]
        values += [one.attempt for one in events if isinstance(one, AttemptFinished)]
        for value in values:
            for shown in (repr(value), str(value), f"{value}", f"{value!r:>90}", "%s %r" % (value, value)):  # noqa: UP031
                assert_no_key(shown)
            assert_no_key(ascii([value, (value,)]))
    assert {outcome.ok for outcome in outcomes} == {True, False}
    assert_no_key(repr(client))
    assert_no_key(repr(vars(client)))


async def test_no_pickle_holds_the_key(sandbox: Sandbox) -> None:
    """Everything that pickles, outcomes included, does so without the key; other objects refuse to pickle."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(200), Answer(400, {"description": KEYS["plain"]}))
    events: list[Event] = []
    async with AudiencesClient(KEY, base_url=sandbox.base_url, on_event=events.append) as client:
        outcomes = await client.fetch_all([account] * 2, concurrency=1)
        for value in (client, account, account.credential, *outcomes, *events, client.snapshot()):
            assert_no_key(pickled(value))
    assert all(map(pickled, events))


async def test_a_good_reply_is_the_services_own(sandbox: Sandbox) -> None:
    """A good response is the service's data, unchanged, even if it contains the key."""
    row = {"type": "Dynamic", "id": KEY, "name": KEY, "created_time": "2025-10-01T09:10:00Z", "owner": KEY}
    account = sandbox.add_account("north", api_key=KEY, audiences=[row])
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        response = await client.get_audiences(account)
    (audience,) = response.data
    assert (audience.id, audience.name) == (KEY, KEY)
    assert getattr(audience, "extra", None) == {"owner": KEY}


# --- logs


async def test_a_failing_hook_logs_no_key(sandbox: Sandbox, caplog: pytest.LogCaptureFixture, debug: None) -> None:
    """The log of a failing on_event has no key, even with the traceback rendered with locals."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", *[Answer(500, {"description": f"\x1b[2J{KEYS['plain']}"})] * 2)

    def hook(event: Event) -> None:
        raise LookupError(repr(event))

    async with AudiencesClient(base_url=sandbox.base_url, retry=THRICE, on_event=hook) as client:
        await client.get_audiences(account)
    told = [record for record in caplog.records if record.name == "audiences_async"]
    assert told
    for record in told:
        assert_no_key(record.getMessage())
        assert "\x1b" not in record.getMessage()
    raised = [record.exc_info[1] for record in told if record.exc_info]
    assert len(raised) == sum(record.levelno == logging.WARNING for record in told) > 0
    for error in raised:
        assert isinstance(error, LookupError)
        assert_no_key(everything_of(error))
    assert_no_key(caplog.text)


@pytest.mark.slow
async def test_a_call_that_nobody_awaits_shows_no_key(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The log entry of a failed task that was never awaited has no key, even in its traceback."""
    account = sandbox.add_account("north", api_key=KEY)
    sandbox.script("north", Answer(400, {"description": KEYS["plain"]}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        asyncio.get_running_loop().set_debug(True)
        task = asyncio.create_task(client.get_audiences(account))
        await asyncio.wait([task])
        assert_no_key(repr(task))
        del task
        gc.collect()
    assert "never retrieved" in caplog.text
    assert "BadRequestError" in caplog.text
    assert_no_key(caplog.text)


# --- files of accounts


FILES: Final = {
    "cut.toml": '[[accounts]]\nname = "north"\napi_key = "{key}\n',
    "bare.toml": '[[accounts]]\nname = "north"\napi_key = {key}\n',
    "twice.toml": '[[accounts]]\nname = "north"\napi_key = "{key}"\napi_key = "{key}"\n',
    "escape.toml": '[[accounts]]\nname = "north"\napi_key = "\\q{key}"\n',
    "table.toml": '[accounts]\nname = "north"\napi_key = "{key}"\n',
    "both.toml": '[[accounts]]\nname = "north"\napi_key = "{key}"\napi_key_env = "{key}"\n',
    "unset.toml": '[[accounts]]\nname = "north"\napi_key_env = "{key}"\n',
    "list.toml": '[[accounts]]\nname = "north"\napi_key = ["{key}"]\n',
    "padded.toml": '[[accounts]]\nname = "north"\napi_key = " {key}"\n',
    "names.toml": '[[accounts]]\nname = "a"\napi_key = "{key}"\n[[accounts]]\nname = "a"\napi_key = "{key}"\n',
    "no-header.csv": "north,{key},\nsouth,{key},\n",
    "many.csv": "name,api_key\nnorth,{key},{key}\n",
    "quote.csv": 'name,api_key\nnorth,"{key}"x\n',
    "open.csv": 'name,api_key\nnorth,"{key}\n',
    "nul.csv": "name,api_key\nnorth,{key}\x00\n",
    "swapped.csv": "api_key,name\nnorth,\n{key},\n",
    "header.csv": "name,{key},{key}\nnorth,a,b\n",
    "cut.ndjson": '{{"name": "north", "api_key": "{key}"\n',
    "array.ndjson": '["north", "{key}"]\n',
    "text.ndjson": '"{key}"\n',
    "field.ndjson": '{{"name": "north", "api_key": {{"{key}": "{key}"}}}}\n',
    "bare.ndjson": '{{"name": "north", "api_key": {key}}}\n',
    "noname.jsonl": '{{"name": "", "api_key": "{key}"}}\n',
    "surrogate.jsonl": '{{"name": "north", "api_key": "{key}\\ud800"}}\n',
}


@pytest.mark.parametrize("file", FILES)
def test_no_broken_file_of_accounts_shows_its_keys(tmp_path: Path, file: str) -> None:
    """An invalid file is reported with its place, and without a key, even in the traceback's locals."""
    path = tmp_path / file
    path.write_text(FILES[file].format(key=KEYS["plain"]), encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        AccountFile(path)
    assert_no_key(everything_of(caught.value))


def test_a_file_of_accounts_that_breaks_later_shows_no_key(tmp_path: Path) -> None:
    """A file that becomes invalid after its check fails during iteration, without a key."""
    path = tmp_path / "accounts.csv"
    path.write_text(f"name,api_key\nnorth,{KEYS['plain']}\nsouth,{KEYS['plain']}\n", encoding="utf-8")
    accounts = iter(AccountFile(path))
    whole = AccountFile(path)
    path.write_text(f"name,api_key\nnorth,{KEYS['plain']}\nsouth,{KEYS['plain']}, \n", encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        list(accounts)
    for value in (caught.value, whole):
        assert_no_key(everything_about(value))
    assert_no_key(everything_of(caught.value))


# --- control characters

CONTROLS: Final = "\x1b[31mred\x1b]0;title\x07\r\x00\x08\x7f\x9b2J\u202eevil\u2066\u200b\u2028end"
HARMFUL: Final = frozenset(CONTROLS) - frozenset("[31mred]0;title2Jevilend")


@pytest.mark.parametrize("place", ["description", "status", "field", "type"])
async def test_control_characters_are_escaped_in_words(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture, debug: None, place: str
) -> None:
    """Control characters are escaped in the error's text, its attempts, its events and the log."""
    account = sandbox.add_account(f"north{CONTROLS}", api_key=KEY)
    answers = {
        "description": Answer(500, {"description": CONTROLS}),
        "status": Answer(200, {"status": CONTROLS, "data": []}),
        "field": Answer(200, {"status": 200, "data": [{"type": "Static", "id": "", "created_time": CONTROLS[:30]}]}),
        "type": Answer(200, {"status": 200, "data": [{"type": "Dynamic", "name": "x", "id": 1, CONTROLS: CONTROLS}]}),
    }
    sandbox.script(account.name, *[answers[place]] * 3)
    events: list[Event] = []

    def hook(event: Event) -> None:
        events.append(event)
        raise LookupError

    async with AudiencesClient(base_url=sandbox.base_url, retry=THRICE, on_event=hook) as client:
        error = await failure(client, account)
    shown = [str(error), repr(error), error.summary, *map(str, error.attempts), *map(repr, events)]
    shown += [record.getMessage() for record in caplog.records]
    shown += [text for attempt in error.attempts if (text := attempt.error)]
    shown += json.loads(line(Failed(account, 0.1, error)))["error"]["message"]
    for text in shown:
        assert not HARMFUL & set(text), repr(text)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x1b[2J\xc2\x9b31m\r\n\r\n",
        b"HTTP/1.1 200 \x1b[2J\r\nX\x1b: 1\r\n\r\n",
        b"HTTP/1.1 500 \x1b[2J\xe2\x80\xae\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: \xe2\x80\xae\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\x1b[2J\r\n",
    ],
)
async def test_control_characters_of_a_broken_reply_are_escaped(raw: StartRaw, sent: bytes) -> None:
    """The same holds for the transport's quotes of a malformed response."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        await connection.send(sent)

    server = await raw(serve)
    async with AudiencesClient(KEY, base_url=server.base_url, retry=ONCE) as client:
        error = await failure(client, Account("north", KEY))
    for text in (str(error), repr(error), *map(repr, error.attempts)):
        assert not HARMFUL & set(text), repr(text)


# --- as programs of their own


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with all of Python's warnings enabled."""
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "AUDIENCES_API_KEY": KEY, **environment}
    return subprocess.run(
        arguments, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=50, encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize("output", [(), ("--debug",)])
@pytest.mark.parametrize(
    "answer",
    [
        Answer(400, {"description": f"{CONTROLS} {KEY}"}, headers={"X-Echo": KEY}),
        Answer(200, f"<html>{CONTROLS} {KEY}"),
        Answer(200, {"status": "200", "data": [{"type": "Static", "id": 1, "name": KEY, "user_count": KEY}]}),
    ],
)
def test_the_command_line_shows_no_key_and_no_controls(sandbox: Sandbox, answer: Answer, output: tuple[str]) -> None:
    """The command line's stderr escapes control characters and masks the key, with --debug and -X dev too."""
    sandbox.add_account(api_key=KEY)
    sandbox.script("default", answer)
    done = run([sys.executable, "-X", "dev", *COMMAND[1:], "list", *output], AUDIENCES_BASE_URL=sandbox.base_url)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert done.stdout == ""
    assert not HARMFUL & set(done.stderr), repr(done.stderr)
    assert_no_key(done.stderr)


PROGRAM: Final = """
import asyncio, faulthandler, gc, logging, os, sys, traceback
from audiences_async import Account, AudiencesClient, AudiencesError, RetryPolicy

logging.basicConfig(level=logging.DEBUG)


def shout(error):
    print(error, repr(error), file=sys.stderr)
    traceback.print_exception(error)
    for line in traceback.TracebackException.from_exception(error, capture_locals=True).format():
        print(line)


async def main():
    asyncio.get_running_loop().slow_callback_duration = 0.0
    client = AudiencesClient(retry=RetryPolicy(max_attempts=2, base_delay=0), on_event=print, attempt_timeout=0.5)
    for _ in range(int(sys.argv[1])):
        try:
            print(await client.get_audiences())
        except AudiencesError as error:
            shout(error)
            logging.exception("failed")
    faulthandler.dump_traceback(all_threads=True)
    forgotten = asyncio.ensure_future(client.get_audiences())
    await asyncio.wait([forgotten])
    print(forgotten, client, client.snapshot())
    del forgotten
    gc.collect()
    await client.get_audiences()  # its error ends the program


asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("parser", ["compiled", "python"])
def test_a_whole_program_shows_no_key(sandbox: Sandbox, tmp_path: Path, parser: str) -> None:
    """A program under -X dev with faulthandler and all logs, ended by an error, writes no key anywhere."""
    sandbox.add_account(api_key=KEY, audiences=many_audiences("default", 3))
    answers = [answer for place, answer in echoes(KEY).items() if place not in {"large", "retried", "throttled"}]
    sandbox.script("default", *[one for answer in answers for one in ([answer] * 2 if answer.failure else [answer])])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    environment = {"AIOHTTP_NO_EXTENSIONS": "1"} if parser == "python" else {}
    done = run(
        [sys.executable, "-X", "dev", "-X", "faulthandler", "-W", "always", str(program), str(len(answers) - 4)],
        AUDIENCES_BASE_URL=sandbox.base_url,
        **environment,
    )
    assert "Traceback" in done.stderr
    assert "capture" not in done.stderr
    assert "audiences_async.errors" in done.stderr
    assert "AttemptFinished" in done.stdout
    for shown in (done.stdout, done.stderr):
        assert_no_key(shown)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["no status line", "header value", "long value", "long line", "chunk size", "length"])
@pytest.mark.measured
def test_a_broken_head_read_by_the_other_parser(tmp_path: Path, head: str) -> None:
    """With aiohttp's pure Python parser, a malformed response that quotes the key shows nothing of it."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import asyncio, os, sys, traceback
from audiences_async import AudiencesClient, AudiencesError, RetryPolicy

async def main():
    padding = 0

    async def serve(reader, writer):
        await reader.readuntil(b"\\r\\n\\r\\n")
        head = {HEADS[head]!r}
        writer.write(head % ((b"x" * padding + os.environ["AUDIENCES_API_KEY"].encode(),) * head.count(b"%s")))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{{server.sockets[0].getsockname()[1]}}/"
    async with AudiencesClient(base_url=url, retry=RetryPolicy(max_attempts=1)) as client:
        for padding in range(0, 26, 3):
            try:
                await client.get_audiences()
            except AudiencesError as error:
                print("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
            else:
                raise SystemExit("read as a value")
    server.close()

asyncio.run(main())
""",
        encoding="utf-8",
    )
    done = run([sys.executable, str(program)], AIOHTTP_NO_EXTENSIONS="1")
    assert done.returncode == 0, done.stderr
    assert "Error: " in done.stdout
    assert_no_key(done.stdout)
    assert_no_key(done.stderr)


def test_the_forms_find_a_key() -> None:
    """The check itself fails for each form that it knows."""
    for name, key in KEYS.items():
        for secret in forms(key).values():
            with pytest.raises(AssertionError, match="the key shows"):
                assert_no_key(f"so {secret} it is", name)
    assert_no_key(EMPTY_ANSWER)
