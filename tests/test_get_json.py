"""`get_json`: another GET of the same API, on the terms of `get_audiences`."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from attrs import define, field
from conftest import RawConnection, RawServer

from audiences_async import (
    Account,
    AudiencesClient,
    CachePolicy,
    ConfigurationError,
    DeadlineExceededError,
    InvalidResponseError,
    NotFoundError,
    RateLimit,
    ResponseTooLargeError,
    RetryPolicy,
    TooManyRequestsError,
    UnauthorizedError,
)

StartRaw = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]


@define
class Service:
    """A service that sends these replies, the last one again and again."""

    replies: list[tuple[bytes, bytes]] = field(factory=list[tuple[bytes, bytes]])
    asked: list[tuple[str, str]] = field(factory=list[tuple[str, str]])
    base_url: str = ""

    def reply(self, body: Any, head: str = "200 OK") -> None:
        """Send this one next."""
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.replies.append((f"HTTP/1.1 {head}".encode(), text))

    async def serve(self, connection: RawConnection) -> None:
        """Answer the requests of one connection."""
        while True:
            first, *fields = (await connection.request()).decode().splitlines()
            key = next(line.partition(" Bearer ")[2] for line in fields if line.startswith("Authorization"))
            self.asked.append((first.split()[1], key))
            head, body = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            await connection.answer(body, head)


@pytest.fixture
async def service(raw: StartRaw) -> Service:
    """Return a running service."""
    service = Service()
    service.base_url = (await raw(service.serve)).base_url
    return service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AudiencesClient]:
    """Yield a client that does not wait between attempts."""
    async with AudiencesClient("key", base_url=service.base_url + "v1/", retry=RetryPolicy(base_delay=0)) as client:
        yield client


async def test_the_data_of_the_envelope(service: Service, client: AudiencesClient) -> None:
    """Return `data` as plain data, whatever it is, from the path and the query below the base URL."""
    for data in ({"id": 7, "big": 2**70}, [1, None], "text", None):
        service.replies.clear()
        service.reply({"status": 200, "data": data})
        assert await client.get_json("campaigns/7", params={"q": "a b&c", "page": 2}) == data
    assert service.asked[0] == ("/v1/campaigns/7?q=a+b%26c&page=2", "key")
    service.replies.clear()
    service.reply({"status": "200"})
    assert await client.get_json("/campaigns", Account("north", "key-of-north")) is None
    assert service.asked[-1] == ("/v1/campaigns", "key-of-north")


async def test_failures_are_retried_and_typed(service: Service, client: AudiencesClient) -> None:
    """Retry what `get_audiences` retries, and raise its errors, with the attempts."""
    service.reply(b"<html>busy", "503 Service Unavailable")
    service.reply({"status": 200, "data": 1})
    service.reply({"status": 404, "description": "no campaign 7"}, "404 Not Found")
    assert await client.get_json("campaigns/7") == 1
    with pytest.raises(NotFoundError, match="no campaign 7") as caught:
        await client.get_json("campaigns/7")
    assert ([attempt.status for attempt in caught.value.attempts], caught.value.account) == ([404], "default")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>", r"\$: not JSON"),
        (b"[1]", r"\$: expected an object, got an array"),
        (b'{"status": "odd"}', r"\$\.status: expected an HTTP status"),
        (b"", "the body is empty"),
    ],
)
async def test_what_is_no_envelope_is_refused(
    service: Service, client: AudiencesClient, body: bytes, problem: str
) -> None:
    """Raise `InvalidResponseError` with the place, and do not retry."""
    service.reply(body)
    with pytest.raises(InvalidResponseError, match=problem):
        await client.get_json("campaigns")
    assert len(service.asked) == 1


async def test_the_limits_of_an_audiences_call_hold(service: Service) -> None:
    """Read no larger body, and take an error in the envelope of a 200 for what it is."""
    async with AudiencesClient("key", base_url=service.base_url, max_body_bytes=100) as client:
        service.reply({"status": 200, "data": "x" * 200})
        with pytest.raises(ResponseTooLargeError):
            await client.get_json("campaigns")
        service.replies = []
        service.reply({"status": 401, "description": "key"}, "200 OK")
        with pytest.raises(UnauthorizedError) as caught:
            await client.get_json("campaigns")
    assert caught.value.description == "***"


async def test_the_pace_is_the_accounts(service: Service, client: AudiencesClient) -> None:
    """Wait for the pause that a 429 of another call began, and fail at once if that does not fit."""
    service.reply({"status": 429}, "429 Too Many Requests\r\nRetry-After: 60")
    with pytest.raises(TooManyRequestsError):
        await client.get_audiences(timeout=1.0)
    with pytest.raises(DeadlineExceededError) as caught:
        await client.get_json("campaigns", timeout=1.0)
    assert caught.value.gateway_status == 429
    assert len(service.asked) == 1


async def test_the_cache_is_not_used(service: Service) -> None:
    """Send a request for each call."""
    service.reply({"status": 200, "data": []})
    async with AudiencesClient("key", base_url=service.base_url, cache=CachePolicy(ttl=60.0)) as client:
        await client.get_audiences()
        assert await client.get_json("campaigns") == await client.get_json("campaigns") == []
    assert [path for path, _ in service.asked] == ["/audiences", "/campaigns", "/campaigns"]


_PATHS = [
    "", "/", "//evil.example/x", "https://evil.example/x", "a//b", "a/", "../x", "a/../../b", ".", "a/%2e%2e/b",
    "a/..;v=1/b", "a?b=c", "a#b", "a\\b", "\\\\evil.example\\x", "a b", "a\r\nHost: evil.example", "ä", None, 7, b"a",
]  # fmt: skip


@pytest.mark.parametrize("path", _PATHS)
async def test_a_path_never_changes_the_origin(service: Service, client: AudiencesClient, path: Any) -> None:
    """Refuse a path that is not one of plain segments before anything is sent."""
    with pytest.raises(ConfigurationError, match="path must be a relative path"):
        await client.get_json(path)
    assert service.asked == []


@pytest.mark.parametrize("path", ["@evil.example", ":80", "user:pw@evil.example", "https:evil.example", "a:b"])
async def test_a_plain_segment_is_only_a_segment(service: Service, client: AudiencesClient, path: str) -> None:
    """Send the key to the client's own origin, whatever characters a segment has."""
    service.reply({"status": 200, "data": 1})
    assert await client.get_json(path) == 1
    assert service.asked == [(f"/v1/{path}", "key")]


@pytest.mark.parametrize(
    "params", [[("a", "b")], {"a": None}, {"a": True}, {1: "b"}, {"a": ["b"]}, {"a": float("inf")}, {"a": "\ud800"}]
)
async def test_odd_params_are_refused(service: Service, client: AudiencesClient, params: Any) -> None:
    """Refuse what is no text and no number, without repeating it."""
    with pytest.raises(ConfigurationError, match="params"):
        await client.get_json("campaigns", params=params)
    assert service.asked == []


async def test_a_redirect_is_not_followed(service: Service, client: AudiencesClient) -> None:
    """Keep the key at its origin."""
    service.reply(b"", "302 Found\r\nLocation: https://evil.example/")
    with pytest.raises(Exception, match="HTTP 302"):
        await client.get_json("campaigns")


async def test_a_known_rate_paces_both_calls(service: Service) -> None:
    """Ask one limit for both calls."""
    service.reply({"status": 200, "data": []})
    async with AudiencesClient("key", base_url=service.base_url, rate_limit=RateLimit(rate=0.01)) as client:
        await client.get_audiences()
        with pytest.raises(DeadlineExceededError):
            await client.get_json("campaigns", timeout=1.0)
    assert len(service.asked) == 1
