"""GET requests on aiohttp's pool without its session, which recomputes for each request what never changes.

Pool, parser and response are aiohttp's own, and the request head is the one that aiohttp would write. Left out are
proxies, cookies, redirects, timeouts and middlewares, which an attempt does not use: with them, a call costs a third
more (``benchmarks/call.py``).
"""

import asyncio
import inspect
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, SimpleNamespace
from typing import Any, Final

import aiohttp
from aiohttp import hdrs
from yarl import URL

NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)
"""Our own deadlines apply: aiohttp's round up to whole seconds above 5 s, and include the wait for a connection."""

DISCONNECTED: Final = "the connection was closed or reset before a reply came"


class ResendError(Exception):
    """The request may have been sent; the client, not aiohttp, decides whether to send it again."""


_WRITTEN: Final[Any] = SimpleNamespace(output_size=0)  # without a body, a request ends with its head

# Mocks and tracers replace one of these, before this import or after it.
_REQUEST: Final = getattr(aiohttp.ClientSession, "request", None)
_REQUEST_BEHIND: Final = getattr(aiohttp.ClientSession, "_request", None)


def direct_requests(session: aiohttp.ClientSession, url: URL) -> "DirectRequests | None":
    """Return an object that sends requests directly; ``None`` if this aiohttp lacks the members or signatures it needs.

    How a session uses its pool is private to aiohttp. Other versions are used through the public session.
    """
    try:
        return DirectRequests(session, url) if _is_known() else None
    except Exception:  # noqa: BLE001 - any failure means an unknown version of aiohttp
        return None


def _is_known() -> bool:
    """Check at a client's start and not at import: the first check is slow, and mocks may come and go."""
    try:
        return _has_members() and all(_takes(*call) for call in _calls()) and all(map(_is_original, _bypassed()))
    except Exception:  # noqa: BLE001 - a member is missing or not a function
        return False


def _has_members() -> bool:
    from aiohttp.client_proto import ResponseHandler  # noqa: PLC0415 - private to aiohttp, so not at import
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
    """Return all calls made here: function, number of positional arguments, and names of the keyword arguments."""
    from aiohttp.client_proto import ResponseHandler  # noqa: PLC0415

    response = ("writer", "continue100", "timer", "request_info", "traces", "loop", "session", "stream_writer")
    return (
        (aiohttp.ClientRequest.__init__, 3, "headers", "loop", "session", "traces"),
        (aiohttp.ClientResponse.__init__, 3, *response),
        (aiohttp.ClientResponse.start, 2),
        (aiohttp.TCPConnector.connect, 4),
        (ResponseHandler.set_response_params, 1, "read_until_eof", "auto_decompress"),
    )


def _bypassed() -> tuple[object, ...]:
    """Return the functions of aiohttp's session that are bypassed here; a mock or a tracer may have replaced them."""
    return _REQUEST, _REQUEST_BEHIND, aiohttp.ClientRequest.send


@lru_cache(16)  # keyed by function, so that a replacement is checked again
def _takes(function: Callable[..., object], positional: int, *keywords: str) -> bool:
    """Return whether aiohttp's own *function* takes these arguments by these names, and needs no others."""
    if not _is_original(function):
        return False
    signature = inspect.signature(function)
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return signature.parameters.keys() >= set(keywords)  # and does not merely accept any keyword


def _is_original(function: object) -> bool:
    """Return whether *function* is aiohttp's own. A wrapper has its name, but not its module's globals."""
    return type(function) is FunctionType and function.__globals__["__name__"].startswith("aiohttp.")


class DirectRequests:
    """Requests of one session to one URL, which differ only in the key."""

    def __init__(self, session: aiohttp.ClientSession, url: URL) -> None:
        """Create it inside the event loop that will use it."""
        from aiohttp.helpers import TimerNoop  # noqa: PLC0415 - private to aiohttp, so not at import

        assert session.connector is not None
        self._session = session
        self._timer = TimerNoop()
        self._connector = session.connector
        self._loop = asyncio.get_running_loop()
        self._request = aiohttp.ClientRequest(
            hdrs.METH_GET, url, headers=session.headers, loop=self._loop, session=session, traces=[]
        )
        self._info = self._request.request_info
        self._response()  # raises here, in time to fall back to the public session, if aiohttp has changed
        fields = [f"{name}: {value}" for name, value in self._request.headers.items()]
        self._head = "\r\n".join([f"GET {url.raw_path_qs} HTTP/1.1", *fields, "Authorization: "])

    @property
    def usable(self) -> bool:
        """Whether the session can be bypassed: no trace configs, no patched methods."""
        session = aiohttp.ClientSession
        is_untouched = session.request is _REQUEST and getattr(session, "_request", None) is _REQUEST_BEHIND
        return is_untouched and not self._session.trace_configs

    async def send(self, authorization: str, header: tuple[str, str] | None = None) -> aiohttp.ClientResponse:
        """Send one request, with one more *header* if given, and return the response once its head has arrived.

        Raises:
            ResendError: The connection was lost before that.
            aiohttp.ClientError: As from a session.
        """
        more = "" if header is None else f"\r\n{header[0]}: {header[1]}"
        connection = await self._connector.connect(self._request, [], NO_TIMEOUT)
        response = self._response()
        try:
            protocol = connection.protocol
            assert protocol is not None
            assert protocol.transport is not None
            protocol.set_response_params(read_until_eof=True, auto_decompress=False)
            protocol.transport.write(f"{self._head}{authorization}{more}\r\n\r\n".encode())
            return await response.start(connection)
        except BaseException as error:
            response.close()
            connection.close()
            if isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError):
                raise ResendError(DISCONNECTED) from None
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
