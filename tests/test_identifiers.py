"""Identifiers: of a call, on its events, logs, spans, error and requests; and of a reply, on its error."""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from conftest import EMPTY_ANSWER, RawConnection, RawServer

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesError,
    BadRequestError,
    CachePolicy,
    ConfigurationError,
    Event,
    InvalidResponseError,
    RetryPolicy,
    ServerError,
    StatusError,
)
from audiences_async.events import AccountPaused
from audiences_async.sandbox import Answer, Sandbox

StartRaw = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]
ONCE = RetryPolicy(max_attempts=1)


async def test_two_calls_of_one_account_can_be_told_apart(sandbox: Sandbox, north: Account) -> None:
    """Give each call's events their own identifier, which its error has too; a pause is of no single call."""
    sandbox.script("north", Answer(400), Answer(429, retry_after=0.0))
    events: list[Event] = []
    async with AudiencesClient(base_url=sandbox.base_url, on_event=events.append) as client:
        failed, answered = await asyncio.gather(
            client.get_audiences(north), client.get_audiences(north), return_exceptions=True
        )
    by_call: dict[str | None, list[str]] = defaultdict(list)
    for event in events:
        by_call[event.call_id].append(type(event).__name__)
    errors = [each for each in (failed, answered) if isinstance(each, AudiencesError)]
    assert errors[0].call_id in by_call
    assert len(by_call.keys() - {None}) == 2
    for call_id in by_call.keys() - {None}:
        assert (by_call[call_id][0], by_call[call_id][-1]) == ("CallStarted", "CallFinished")
        assert UUID(call_id).version == 4
    assert AccountPaused.__name__ in by_call[None]


async def test_log_records_have_account_and_call(
    sandbox: Sandbox, north: Account, caplog: pytest.LogCaptureFixture
) -> None:
    """Set attributes on each record, for formatters that write JSON."""
    caplog.set_level(logging.DEBUG, "audiences_async")

    def broken(event: Event) -> None:
        raise LookupError

    async with AudiencesClient(base_url=sandbox.base_url, on_event=broken) as client:
        await client.get_audiences(north)
    records = [vars(record) for record in caplog.records if record.name == "audiences_async"]
    assert {record["levelname"] for record in records} == {"DEBUG", "WARNING"}
    assert {record["account"] for record in records} == {"north"}
    assert len({record["call_id"] for record in records}) == 1


async def test_errors_without_a_listener_have_an_identifier(sandbox: Sandbox, north: Account) -> None:
    """Make an identifier for an error, whether the call is alone or shares a request; none without a call."""
    sandbox.script("north", Answer(400), Answer(400), Answer(400))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        one, other = await client.fetch_all([north, north])
        with pytest.raises(ConfigurationError) as wrong:
            await client.get_audiences()
    assert not one.ok
    assert not other.ok
    assert one.error.call_id != other.error.call_id
    assert wrong.value.call_id is None
    async with AudiencesClient(base_url=sandbox.base_url, cache=CachePolicy(ttl=1.0)) as client:
        shared = await asyncio.gather(*(client.get_audiences(north) for _ in range(2)), return_exceptions=True)
    assert len({error.call_id for error in shared if isinstance(error, AudiencesError)}) == 1


@pytest.mark.parametrize("own", [True, False], ids=["own session", "caller's session"])
async def test_one_identifier_is_sent_on_every_attempt(raw: StartRaw, *, own: bool) -> None:
    """Send the call's identifier under the given name, the same on each attempt, and another one for each call."""
    sent: list[str] = []

    async def serve(connection: RawConnection) -> None:
        while True:
            head = (await connection.request()).decode()
            sent.extend(line.partition(": ")[2] for line in head.splitlines() if line.startswith("X-Commbox-Request"))
            await connection.answer(EMPTY_ANSWER, b"HTTP/1.1 500 Oops" if len(sent) < 3 else b"HTTP/1.1 200 OK")

    server = await raw(serve)
    policy = RetryPolicy(max_attempts=2, base_delay=0)
    async with aiohttp.ClientSession() as session:
        client = AudiencesClient(
            "key",
            base_url=server.base_url,
            retry=policy,
            request_id_header="X-Commbox-Request",
            session=None if own else session,
        )
        async with client:
            with pytest.raises(ServerError) as caught:
                await client.get_audiences()
            await client.get_audiences()
            await client.get_json("campaigns")
    assert sent[:2] == [caught.value.call_id] * 2
    assert len(sent) == 4
    assert len(set(sent)) == 3


@pytest.mark.parametrize("name", ["", "X Id", "X-Id:", "X\r\nId", "é", 5, "Authorization", "host", "Content-Length"])
def test_a_header_for_the_identifier_is_a_free_name(name: Any) -> None:
    """Refuse what is no name, or has a meaning of its own."""
    with pytest.raises(ConfigurationError, match="request_id_header must"):
        AudiencesClient("key", request_id_header=name)


_KEY = "key-of-north-4711"


@pytest.mark.parametrize(
    ("headers", "body", "identifier"),
    [
        ({"x-request-id": "r-1", "CF-Ray": "ray"}, {"traceId": "t-1"}, "r-1"),
        ({"X-Correlation-ID": "c-1"}, {}, "c-1"),
        ({"cf-ray": "8f-FRA"}, "<html>", "8f-FRA"),
        ({}, {"traceId": "00-4bf92f-00"}, "00-4bf92f-00"),
        ({"X-Request-Id": f"for {_KEY} " + "x" * 200}, {}, "for *** " + "x" * 92 + "…"),
        ({}, {"traceId": 5}, None),
        ({}, "<html>", None),
    ],
)
@pytest.mark.parametrize("status", [400, 200, 204])
async def test_a_reply_is_named_by_its_own_identifier(
    sandbox: Sandbox, status: int, headers: dict[str, str], body: Any, identifier: str | None
) -> None:
    """Take it from the usual headers or the body's `traceId`, without the key, onto the error and into its message."""
    if status == 204:
        status = 202
    account = sandbox.add_account("north", api_key=_KEY)
    sandbox.script("north", Answer(status, body, headers=headers))
    async with AudiencesClient(base_url=sandbox.base_url, retry=ONCE) as client:
        with pytest.raises((StatusError, InvalidResponseError)) as caught:
            await client.get_audiences(account)
    assert isinstance(caught.value, StatusError | InvalidResponseError)
    assert caught.value.request_id == identifier
    assert (f"(request id {identifier})" in str(caught.value)) == (identifier is not None)


@pytest.mark.parametrize(
    ("body", "description"),
    [
        ({"description": "own", "detail": "d"}, "own"),
        ({"description": "", "title": "Bad Request", "detail": "name is too long"}, "name is too long"),
        ({"type": "about:blank", "title": "Bad Request", "status": 400}, "Bad Request"),
        ({"message": "m", "error": "e"}, "m"),
        ({"error": "invalid_request"}, "invalid_request"),
        ({"error": {"code": 7}, "detail": None}, ""),
        ([1], ""),
    ],
)
async def test_a_problem_of_rfc_9457_describes_the_error(
    sandbox: Sandbox, north: Account, body: Any, description: str
) -> None:
    """Describe an error by the service's description, or by the detail or title of a problem."""
    sandbox.script("north", Answer(400, json.dumps(body), headers={"Content-Type": "application/problem+json"}))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        with pytest.raises(BadRequestError) as caught:
            await client.get_audiences(north)
    assert caught.value.description == description
    assert caught.value.message.removeprefix("HTTP 400 Bad Request").removeprefix(": ") == description
