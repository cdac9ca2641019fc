"""A GET on aiohttp's pool without aiohttp's session, which works out anew for each request what never changes.

The pool, the parser and the reply stay aiohttp's own, and the request's head is what aiohttp would write. Left out are
proxies, cookies, redirects, timeouts and middlewares, none of which an attempt uses: together with them a call costs a
third more (``benchmarks/call.py``).
"""

import asyncio
import inspect
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp import hdrs
from yarl import URL

if TYPE_CHECKING:
    from aiohttp.connector import Connection

NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
"""Our own deadlines rule: aiohttp's round up to whole seconds above 5 s, and count the wait for a connection."""

DISCONNECTED: Final = "the connection was closed or reset before a reply came"


class NotAgainError(Exception):
    """The request may have been sent, and to send it again is for the client to decide, not for aiohttp."""


_WRITTEN: Final[Any] = SimpleNamespace(output_size=0)  # a request without a body is written when its head is

# Mocks and tracers put their own in the place of one of these, before this import or after it.
_REQUEST: Final = getattr(aiohttp.ClientSession, "request", None)
_REQUEST_BEHIND: Final = getattr(aiohttp.ClientSession, "_request", None)


def direct_requests(session: aiohttp.ClientSession, url: URL) -> "DirectRequests | None":
    """Return what sends requests directly; ``None`` if this aiohttp has not the members and signatures it takes.

    How a session uses its pool is no promise of aiohttp's. One that does it in another way is asked in public.
    """
    try:
        return DirectRequests(session, url) if _is_known() else None
    except Exception:  # noqa: BLE001 - whatever an aiohttp of the future raises, it is not known
        return None


def _is_known() -> bool:
    """Look when a client starts and not at import: the first time takes a while, and what is mocked may change."""
    try:
        return _has_members() and all(_takes(*call) for call in _calls()) and all(map(_is_original, _passed_by()))
    except Exception:  # noqa: BLE001 - a member that is gone, or is no function
        return False


def _has_members() -> bool:
    from aiohttp.client_proto import ResponseHandler  # noqa: PLC0415 - no promise of aiohttp's, so not at import
    from aiohttp.connector import Connection  # noqa: PLC0415

    members = (
        (aiohttp.ClientRequest, "request_info"),
        (aiohttp.ClientRequest, "url"),
        (aiohttp.ClientResponse, "close"),
        (aiohttp.ClientSession, "trace_configs"),
        (Connection, "protocol"),
        (Connection, "close"),
        (ResponseHandler, "transport"),
    )
    return all(hasattr(owner, name) for owner, name in members)


def _calls() -> tuple[tuple[Any, ...], ...]:
    """All that is called here: the number of positional arguments, and the names of the others."""
    from aiohttp.client_proto import ResponseHandler  # noqa: PLC0415

    response = ("writer", "continue100", "timer", "request_info", "traces", "loop", "session", "stream_writer")
    return (
        (aiohttp.ClientRequest.__init__, 3, "headers", "loop", "session", "traces"),
        (aiohttp.ClientResponse.__init__, 3, *response),
        (aiohttp.ClientResponse.start, 2),
        (aiohttp.TCPConnector.connect, 4),
        (ResponseHandler.set_response_params, 1, "read_until_eof", "auto_decompress"),
    )


def _passed_by() -> tuple[object, ...]:
    """What a session calls and this does not: nobody may have put his own in its place."""
    return _REQUEST, _REQUEST_BEHIND, aiohttp.ClientRequest.send


@lru_cache(16)  # of functions, not of their names: another in the place of one is looked at anew
def _takes(function: Callable[..., object], positional: int, *keywords: str) -> bool:
    """Return whether aiohttp's own *function* takes these arguments by these names, and needs no others."""
    if not _is_original(function):
        return False
    signature = inspect.signature(function)
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return signature.parameters.keys() >= set(keywords)  # and does not merely swallow them


def _is_original(function: object) -> bool:
    """Return whether it is a function of aiohttp's: one that wraps it has the name, but not the module's variables."""
    return type(function) is FunctionType and function.__globals__["__name__"].startswith("aiohttp.")


class DirectRequests:
    """Requests of one session to one URL, which differ in the key alone."""

    def __init__(self, session: aiohttp.ClientSession, url: URL) -> None:
        """Must run inside the event loop that will use it."""
        from aiohttp.helpers import TimerNoop  # noqa: PLC0415 - no promise of aiohttp's, so not at import

        assert session.connector is not None
        self._session = session
        self._timer = TimerNoop()
        self._connector = session.connector
        self._loop = asyncio.get_running_loop()
        self._request = aiohttp.ClientRequest(
            hdrs.METH_GET, url, headers=session.headers, loop=self._loop, session=session, traces=[]
        )
        self._info = self._request.request_info
        self._response()  # which a changed aiohttp refuses here, where it can still be asked in public
        fields = [f"{name}: {value}" for name, value in self._request.headers.items()]
        self._head = "\r\n".join([f"GET {url.raw_path_qs} HTTP/1.1", *fields, "Authorization: "])

    @property
    def usable(self) -> bool:
        """Whether nobody would miss the session: no tracer and no mock stands in the way of its requests."""
        session = aiohttp.ClientSession
        is_untouched = session.request is _REQUEST and getattr(session, "_request", None) is _REQUEST_BEHIND
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

    async def _exchange(self, connection: "Connection", head: bytes) -> aiohttp.ClientResponse:
        protocol = connection.protocol
        assert protocol is not None
        assert protocol.transport is not None
        protocol.set_response_params(read_until_eof=True, auto_decompress=False)
        protocol.transport.write(head)
        response = self._response()
        try:
            return await response.start(connection)
        except BaseException:
            response.close()
            raise

    def _response(self) -> aiohttp.ClientResponse:
        return aiohttp.ClientResponse(
            hdrs.METH_GET,
            self._request.url,
            writer=None,
            continue100=None,
            timer=self._timer,
            request_info=self._info,
            traces=[],
            loop=self._loop,
            session=self._session,
            stream_writer=_WRITTEN,
        )
