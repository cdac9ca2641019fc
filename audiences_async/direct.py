"""A GET on aiohttp's pool without aiohttp's session, which works out anew for each request what never changes.

The pool, the parser and the reply stay aiohttp's own, and the request's head is what aiohttp would write. Left out are
proxies, cookies, redirects, timeouts and middlewares, none of which an attempt uses: together with them a call costs a
third more (``benchmarks/call.py``).
"""

import asyncio
import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, Final

import aiohttp
import aiohttp.client
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.helpers import TimerNoop
from yarl import URL

NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
"""Our own deadlines rule: aiohttp's round up to whole seconds above 5 s, and count the wait for a connection."""

DISCONNECTED: Final = "the connection was closed or reset before a reply came"


class NotAgainError(Exception):
    """The request may have been sent, and to send it again is for the client to decide, not for aiohttp."""


_NO_TIMER: Final = TimerNoop()
_WRITTEN: Final[Any] = SimpleNamespace(output_size=0)  # a request without a body is written when its head is


def _is_original(function: object) -> bool:
    return type(function) is FunctionType and function.__globals__ is vars(aiohttp.client)


# Mocks and tracers put their own in the place of one of these.
_REQUEST: Final = aiohttp.ClientSession.request
_REQUEST_BEHIND: Final = aiohttp.ClientSession._request  # noqa: SLF001 - what mocks replace


def direct_requests(session: aiohttp.ClientSession, url: URL) -> "DirectRequests | None":
    """Return what sends requests directly; ``None`` if this aiohttp has not the members and signatures it takes.

    How a session uses its pool is no promise of aiohttp's. One that does it in another way is asked in public.
    """
    try:
        return DirectRequests(session, url) if _is_known() else None
    except Exception:  # noqa: BLE001 - whatever an aiohttp of the future raises, it is not known
        return None


@cache
def _is_known() -> bool:
    return _is_original(_REQUEST) and _is_original(_REQUEST_BEHIND) and all(_can_be_called(*call) for call in _CALLS)


def _can_be_called(function: Callable[..., object], positional: int, *keywords: str) -> bool:
    try:
        inspect.signature(function).bind(*[None] * positional, **dict.fromkeys(keywords))
    except (TypeError, ValueError):
        return False
    return True


# All that is called here, with the number of positional arguments and the names of the others.
_CALLS: Final[tuple[tuple[Any, ...], ...]] = (
    (aiohttp.ClientRequest, 2, "headers", "loop", "session", "traces"),
    (aiohttp.ClientResponse, 2, "writer", "continue100", "timer", "request_info", "traces", "loop", "session",
     "stream_writer"),
    (aiohttp.ClientResponse.start, 2),
    (aiohttp.BaseConnector.connect, 4),
    (ResponseHandler.set_response_params, 1, "read_until_eof", "auto_decompress"),
)  # fmt: skip


class DirectRequests:
    """Requests of one session to one URL, which differ in the key alone."""

    def __init__(self, session: aiohttp.ClientSession, url: URL) -> None:
        """Must run inside the event loop that will use it."""
        assert session.connector is not None
        self._session = session
        self._connector = session.connector
        self._loop = asyncio.get_running_loop()
        self._request = aiohttp.ClientRequest(
            hdrs.METH_GET, url, headers=session.headers, loop=self._loop, session=session, traces=[]
        )
        self._info = self._request.request_info
        fields = [f"{name}: {value}" for name, value in self._request.headers.items()]
        self._head = "\r\n".join([f"GET {url.raw_path_qs} HTTP/1.1", *fields, "Authorization: "])

    @property
    def usable(self) -> bool:
        """Whether nobody would miss the session: no tracer and no mock stands in the way of its requests."""
        session = aiohttp.ClientSession
        is_untouched = session.request is _REQUEST and session._request is _REQUEST_BEHIND  # noqa: SLF001
        return is_untouched and not self._session.trace_configs

    async def send(self, authorization: str) -> aiohttp.ClientResponse:
        """Send one, and give the reply when its head has come.

        Raises:
            NotAgainError: The connection was lost before that.
            aiohttp.ClientError: As a session does.
        """
        connection = await self._connector.connect(self._request, [], NO_TIMEOUT)
        try:
            return await self._exchange(connection, f"{self._head}{authorization}\r\n\r\n".encode())
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            connection.close()
            raise NotAgainError(DISCONNECTED) from None
        except BaseException:
            connection.close()
            raise

    async def _exchange(self, connection: Connection, head: bytes) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        assert protocol is not None
        assert protocol.transport is not None
        protocol.set_response_params(read_until_eof=True, auto_decompress=False)
        protocol.transport.write(head)
        response = aiohttp.ClientResponse(
            hdrs.METH_GET,
            self._request.url,
            writer=None,
            continue100=None,
            timer=_NO_TIMER,
            request_info=self._info,
            traces=[],
            loop=self._loop,
            session=self._session,
            stream_writer=_WRITTEN,
        )
        try:
            return await response.start(connection)
        except BaseException:
            response.close()
            raise
