"""A GET on aiohttp's pool without aiohttp's session, which works out anew for each request what never changes.

The pool, the parser and the reply stay aiohttp's own, and the request's head is what aiohttp would write. Left out are
proxies, cookies, redirects, timeouts and middlewares, none of which an attempt uses: together with them a call costs a
third more (``benchmarks/call.py``).
"""

import asyncio
from types import FunctionType, SimpleNamespace
from typing import Any, Final

import aiohttp
import aiohttp.client
from aiohttp import hdrs
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
# How a session uses its pool is no promise of aiohttp's: any other version is asked in public.
_IS_KNOWN: Final = aiohttp.__version__.startswith("3.14.") and _is_original(_REQUEST) and _is_original(_REQUEST_BEHIND)


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
        return _IS_KNOWN and is_untouched and not self._session.trace_configs

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
