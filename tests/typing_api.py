"""Checked by mypy, never run: right calls pass, and each wrong call is refused (an unused ignore fails)."""

import ssl
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any, assert_type

from audiences_async import (
    Account,
    Attempt,
    Audience,
    AudiencesClient,
    AudiencesError,
    AudiencesResponse,
    DynamicAudience,
    Event,
    Failed,
    Fetched,
    Outcome,
    RetryPolicy,
    StaticAudience,
    StatusError,
    UnknownAudience,
)
from audiences_async.web import Receive, until_disconnect


async def key() -> str:
    """Return a key, as a key function does."""
    return "key"


def hook(event: Event) -> None:
    """Take an event, as ``on_event`` does."""


async def right() -> None:
    """Use the client with the right types."""
    async with AudiencesClient("key", retry=RetryPolicy(max_attempts=3), on_event=hook) as client:
        assert_type(client, AudiencesClient)
        response = await client.get_audiences()
        assert_type(response, AudiencesResponse)
        assert_type(response.data, tuple[Audience, ...])
        assert_type(response.response_time, datetime | None)
        for audience in response:
            assert_type(audience, StaticAudience | DynamicAudience | UnknownAudience)
            match audience:
                case StaticAudience():
                    assert_type(audience.user_count, int)
                case DynamicAudience():
                    assert_type(audience.created_time, datetime)
                case UnknownAudience():
                    assert_type(audience.id, str | None)
        assert_type(response[0], Audience)
        assert_type(response[1:], tuple[Audience, ...])
        assert_type(response[0].to_dict(), dict[str, Any])
        assert_type(response.to_dicts(), list[dict[str, Any]])
        assert_type(response.to_json(), str)
        assert_type(response.headers, Mapping[str, str])
        assert_type(client.snapshot().to_dict(), dict[str, Any])
        await client.get_audiences(Account("north", "key"), timeout=3)
        await client.get_audiences(Account("north", key))
        await client.get_audiences(Account("north", lambda: "key"))
    AudiencesClient(ssl=ssl.create_default_context(), session=None, proxy="http://proxy")


async def others(client: AudiencesClient, receive: Receive, account: Account) -> None:
    """Use variants, other calls and web helpers with the right types."""
    assert_type(client.with_options(timeout=3, retry=RetryPolicy()), AudiencesClient)
    assert_type(await client.get_json("campaigns/7", account, params={"page": 2, "q": "x"}, timeout=3), Any)
    assert_type(await until_disconnect(receive, client.get_audiences()), AudiencesResponse)


async def jobs(client: AudiencesClient, accounts: list[Account], later: AsyncIterator[Account]) -> None:
    """Use jobs with the right types."""
    assert_type(await client.fetch_all(iter(accounts), concurrency=5, timeout=3), list[Outcome])
    async with client.stream(later) as outcomes:
        async for outcome in outcomes:
            assert_type(outcome, Fetched | Failed)
            if outcome.ok:
                assert_type(outcome, Fetched)
                assert_type(outcome.response, AudiencesResponse)
            else:
                assert_type(outcome, Failed)
                assert_type(outcome.error, AudiencesError)


def errors(error: AudiencesError, status: StatusError) -> None:
    """Read errors with the right types."""
    assert_type(error.attempts, tuple[Attempt, ...])
    assert_type(error.retry_after, float | None)
    assert_type(status.headers, Mapping[str, str])
    assert_type((error.call_id, status.request_id), tuple[str | None, str | None])
    assert_type((error.gateway_status, error.gateway_headers), tuple[int, dict[str, str]])


async def wrong(client: AudiencesClient, audience: Audience, account: Account) -> None:
    """Misuse the client; each ``type: ignore`` is an error that a type checker must report."""
    AudiencesClient(5)  # type: ignore[arg-type]
    AudiencesClient("key", "https://api.commbox.io/")  # type: ignore[call-arg]
    AudiencesClient(ssl=False)  # type: ignore[arg-type]
    AudiencesClient(retries=3)  # type: ignore[call-arg]
    RetryPolicy(max_attempts="3")  # type: ignore[arg-type]
    Account("north")  # type: ignore[call-arg]
    Account("north", lambda: 5)  # type: ignore[arg-type, return-value]
    await client.get_audiences("north")  # type: ignore[arg-type]
    await client.get_audiences(account, 3)  # type: ignore[call-arg]
    await client.get_json()  # type: ignore[call-arg]
    await client.get_json("campaigns", params={"a": None})  # type: ignore[dict-item]
    client.with_options(3)  # type: ignore[call-arg]
    audience.user_count  # type: ignore[union-attr]
    account.name = "south"  # type: ignore[misc]
    client.get_audiences().data  # type: ignore[attr-defined]
