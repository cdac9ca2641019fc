"""A GET on aiohttp's pool without aiohttp's session, which works out anew for each request what never changes.

The request, its head on the wire, the pool, the parser and the reply stay aiohttp's own. What is left out are proxies,
cookies, redirects, timeouts and middlewares, none of which an attempt uses; it is a fifth of the cost of a call
(``benchmarks/call.py``).
"""

import asyncio
from types import FunctionType
from typing import Final

import aiohttp
import aiohttp.client
from aiohttp import hdrs
from yarl import URL

NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
"""Our own deadlines rule: aiohttp's round up to whole seconds above 5 s, and count the wait for a connection."""

DISCONNECTED: Final = "the connection was closed or reset before a reply came"


class NotAgainError(Exception):
    """The request may have been sent, and to send it again is for the client to decide, not for aiohttp."""


def _is_aiohttps(function: object) -> bool:
    return type(function) is FunctionType and function.__globals__ is vars(aiohttp.client)


# Mocks and tracers put their own in the place of one of these.
_REQUEST: Final = aiohttp.ClientSession.request
_REQUEST_BEHIND: Final = aiohttp.ClientSession._request  # noqa: SLF001 - what mocks replace
# How a session uses its pool is no promise of aiohttp's: any other version is asked in public.
_IS_KNOWN: Final = aiohttp.__version__.startswith("3.14.") and _is_aiohttps(_REQUEST) and _is_aiohttps(_REQUEST_BEHIND)


class DirectRequests:
    """Requests of one session to one URL, which differ in the key alone."""

    def __init__(self, session: aiohttp.ClientSession, url: URL) -> None:
        """Must run inside the event loop that will use it."""
        request = aiohttp.ClientRequest(
            hdrs.METH_GET, url, headers=session.headers, loop=asyncio.get_running_loop(), session=session, traces=[]
        )
        assert session.connector is not None
        self._session = session
        self._connector = session.connector
        self._headers = request.headers
        self._prepared = vars(request)

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
        request = object.__new__(aiohttp.ClientRequest)
        request.__dict__.update(self._prepared)
        request.headers = self._headers.copy()
        request.headers[hdrs.AUTHORIZATION] = authorization
        connection = await self._connector.connect(request, [], NO_TIMEOUT)
        try:
            assert connection.protocol is not None
            connection.protocol.set_response_params(read_until_eof=True, auto_decompress=False)
            response = await request.send(connection)
            try:
                return await response.start(connection)
            except BaseException:
                response.close()
                raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            connection.close()
            raise NotAgainError(DISCONNECTED) from None
        except BaseException:
            connection.close()
            raise
