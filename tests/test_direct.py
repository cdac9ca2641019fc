"""Requests on aiohttp's pool without its session: the same bytes, and a fallback for any other aiohttp."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from conftest import EMPTY_ANSWER, RawConnection, RawServer
from yarl import URL

from audiences_async import AudiencesClient
from audiences_async._http import direct
from audiences_async.sandbox import Sandbox

StartRaw: TypeAlias = Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]]
TARGET = URL("http://localhost/audiences")


# --- what is sent


async def test_either_way_sends_the_same(raw: StartRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the same head to the byte, whether aiohttp's session writes it or not."""
    heads: list[bytes] = []

    async def serve(connection: RawConnection) -> None:
        while True:
            heads.append(await connection.request())
            await connection.answer()

    server = await raw(serve)
    for known in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(direct, "_is_known", lambda known=known: known)
            async with AudiencesClient("clé %s", base_url=f"{server.base_url}a%20b/") as client:
                await client.get_audiences()
    assert heads[0] == heads[1]
    assert heads[0].startswith(b"GET /a%20b/audiences HTTP/1.1\r\nHost: 127.0.0.1:")
    assert heads[0].endswith("\r\nAuthorization: Bearer clé %s\r\n\r\n".encode())


# --- single requests


async def test_a_request_has_its_own_authorization(raw: StartRaw) -> None:
    """Send each request with the authorization given, on one connection, and return its response."""
    heads: list[bytes] = []

    async def serve(connection: RawConnection) -> None:
        while True:
            heads.append(await connection.request())
            await connection.answer()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        requests = direct.DirectRequests(session, URL(server.base_url))
        for key in ("first", "second"):
            response = await requests.send(f"Bearer {key}")
            assert (response.status, await response.read()) == (200, EMPTY_ANSWER)
    assert [head.split(b"Authorization: ")[1] for head in heads] == [b"Bearer first\r\n\r\n", b"Bearer second\r\n\r\n"]
    assert server.connections == 1


async def test_a_connection_that_closes_before_a_reply_is_the_clients_to_judge(raw: StartRaw) -> None:
    """Raise `ResendError` if no head arrived, and leave it to the client whether to send again."""

    async def serve(connection: RawConnection) -> None:
        await connection.request()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(direct.ResendError, match="before a reply came"):
            await direct.DirectRequests(session, URL(server.base_url)).send("Bearer key")
    assert server.requests == 1


async def test_a_cancelled_request_closes_its_connection(raw: StartRaw) -> None:
    """Return no connection to the pool on which a reply may still come."""
    asked, closed = asyncio.Event(), asyncio.Event()

    async def serve(connection: RawConnection) -> None:
        await connection.request()
        asked.set()
        await connection.reader.read()
        closed.set()

    server = await raw(serve)
    async with aiohttp.ClientSession() as session:
        call = asyncio.create_task(direct.DirectRequests(session, URL(server.base_url)).send("Bearer key"))
        await asyncio.wait_for(asked.wait(), 5)
        call.cancel()
        await asyncio.wait_for(closed.wait(), 5)
        assert call.cancelled()


async def test_a_traced_session_is_not_bypassed() -> None:
    """Be unusable while the session has trace configs, which would see nothing."""
    async with aiohttp.ClientSession() as session:
        requests = direct.DirectRequests(session, TARGET)
        assert requests.usable
        session.trace_configs.append(aiohttp.TraceConfig())
        assert requests.usable is False


# --- other versions of aiohttp


async def test_this_aiohttp_is_known() -> None:
    """Use the installed aiohttp's pool directly. If a new version fails, review its changes first."""
    async with aiohttp.ClientSession() as session:
        requests = direct.direct_requests(session, TARGET)
        assert requests is not None
        assert requests.usable


def _without(owner: object, name: str, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(owner, name)


def _wrapped(owner: object, name: str, patch: pytest.MonkeyPatch) -> None:
    original: Any = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return original(*arguments, **named)

    patch.setattr(owner, name, wrapper)


@pytest.mark.parametrize("change", [_without, _wrapped])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (aiohttp.ClientRequest, "send"),
        (aiohttp.ClientRequest, "__init__"),
        (aiohttp.ClientResponse, "__init__"),
        (aiohttp.ClientResponse, "start"),
        (aiohttp.BaseConnector, "connect"),
        (ResponseHandler, "set_response_params"),
        (aiohttp.ClientSession, "_request"),
    ],
)
async def test_a_changed_aiohttp_is_asked_in_public(
    owner: object,
    name: str,
    change: Callable[[object, str, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Detect a member that is missing or wrapped when a client starts, and raise nothing."""
    async with aiohttp.ClientSession() as session:
        with monkeypatch.context() as patch:
            change(owner, name, patch)
            requests = direct.direct_requests(session, TARGET)
            assert requests is None or not requests.usable
        assert direct.direct_requests(session, TARGET) is not None


async def test_an_aiohttp_that_refuses_is_asked_in_public(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fall back to the session if preparing the direct path fails in any way."""
    assert not direct._takes(aiohttp.ClientRequest.__init__, 1)

    def refuse(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(direct.DirectRequests, "__init__", refuse)
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        assert len(await client.get_audiences(sandbox.add_account("north"))) == 2
