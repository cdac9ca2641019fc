"""One request and its response, and the mapping of every failure to one of our errors."""

import asyncio
import errno
import re
import ssl as tls
import zlib
from typing import Final

import aiohttp

from audiences_async._http.bodies import ReplyReader
from audiences_async._http.connections import Lease, Trust, current_lease
from audiences_async._http.direct import ResendError
from audiences_async._http.wire import MAX_ERROR_BODY, Reply
from audiences_async.credentials import ApiKey
from audiences_async.errors import AttemptTimeoutError, ConnectionFailedError, TransportError, printable

_ERROR_BODY_TIMEOUT: Final = 1.0  # s; the status alone decides
_NO_SOCKETS: Final = {errno.EMFILE, errno.ENFILE}


class Exchange:
    """One request, and what has been read of its response."""

    __slots__ = ("_reader", "_started", "lease")

    def __init__(self, trust: Trust) -> None:
        """Create it in the task that sends the request."""
        self.lease: Lease = Lease(trust)
        current_lease.set(self.lease)
        self._started = trust.now()
        self._reader: ReplyReader | None = None

    def begin(self, response: aiohttp.ClientResponse, cap: int) -> Reply | None:
        """Take over a response whose head has come; return it if it has arrived whole, and is a 200."""
        self._reader = reader = ReplyReader(response)
        self.lease.phase, self.lease.content = "reading the body", response.content
        if response.version is not None and response.version.major != 1:
            raise aiohttp.ClientError("not HTTP/1")
        return reader.whole(cap) if response.status == 200 else None

    async def read(self, cap: int) -> Reply:
        """Return the whole response; of a 200 at most *cap* bytes."""
        reader = self._reader
        assert reader is not None
        if reader.response.status != 200:
            async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
                await reader.read(MAX_ERROR_BODY)
            return reader.reply()
        is_below = await reader.read(cap)
        if self.lease.lost_by is not None and not reader.has_end:
            raise aiohttp.ClientPayloadError("the connection was reset before the end of the body")
        return reader.reply(exceeded=None if is_below else cap)

    def outcome(self, error: Exception, key: ApiKey, *, out_of_time: float | None) -> Reply | TransportError:
        """Return what a failure means: an error, or the incomplete response if its status alone decides.

        Args:
            error: The exception.
            key: The key that was sent, to be masked.
            out_of_time: Seconds that the attempt had; ``None`` if it did not time out.
        """
        if self._reader is not None and self._reader.response.status != 200:
            return self._reader.reply()
        self.lease.trust.withdraw(self.lease)
        if out_of_time is None:
            return _failure(error, self.lease.lost_by, key, reused=self.lease.reused)
        if (elapsed := self.lease.trust.now() - self._started) < out_of_time:
            limit = f"{elapsed:.3g} s, nor to any other request"
        else:
            limit = f"attempt_timeout={out_of_time:g} s"
        return AttemptTimeoutError(f"no complete reply within {limit}, {self.lease.phase}")

    def close(self) -> None:
        """Drop the connection, unless the response was read to its end."""
        response = None if self._reader is None else self._reader.response
        # aiohttp treats a 101 without Upgrade as a response, and reuses the connection for the next request.
        reusable = response is not None and response.connection is None and response.status >= 200
        if response is not None:
            response.close()
        if reusable:
            self.lease.phase = "decoding the reply"
        self.lease.release(reusable=reusable)
        self._reader = None


def _failure(error: Exception, lost_by: BaseException | None, key: ApiKey, *, reused: bool) -> ConnectionFailedError:
    """Return our error for a failure that left no readable response.

    Args:
        error: aiohttp's exception.
        lost_by: Exception that ended the connection, if any; aiohttp's own exception does not have it.
        key: The key that was sent, to be masked.
        reused: Whether the connection had been used before.
    """
    alert = _alert(error.os_error if isinstance(error, aiohttp.ClientConnectorSSLError) else lost_by)
    if alert is not None:
        hint = "; a client certificate goes into ssl=" if "CERT" in alert or "UNKNOWN_CA" in alert else ""
        return ConnectionFailedError(f"the server refused the TLS connection: {alert}{hint}", transient=False)
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = f"the server's certificate is not trusted: {_describe(error.certificate_error, key)}"
            return ConnectionFailedError(reason, transient=False)
        case aiohttp.ClientConnectorError() if error.os_error.errno in _NO_SOCKETS:
            hint = "raise the limit (ulimit -n), or lower max_connections"
            reason = f"this process cannot open another socket: {error.os_error.strerror}; {hint}"
            return ConnectionFailedError(reason, unsent=True)
        case ResendError():
            return ConnectionFailedError(str(error), stale_connection=reused)
        case aiohttp.ClientConnectorError():
            reason = f"cannot connect to {error.host}:{error.port}: {error.os_error}"
        case aiohttp.ClientHttpProxyError():
            # Without aiohttp's message, which may contain the proxy's password.
            reason = f"the proxy refused the connection with status {error.status}"
        case aiohttp.ClientResponseError():
            # `status` is aiohttp's code for what it could not parse, not the server's.
            reason = f"the reply is not HTTP: {_unquoted(error.message, key)}"
        case zlib.error() | aiohttp.ClientPayloadError():
            reason = f"the body is cut short or corrupt: {_describe(error, key)}"
        case _:
            reason = f"the exchange failed: {_describe(error, key)}"
    return ConnectionFailedError(reason)


def _alert(error: BaseException | None) -> str | None:
    """Return the TLS alert that refused the connection, if any; ``None`` for a transient one."""
    reason = error.reason if isinstance(error, tls.SSLError) else None
    return reason if reason and "ALERT" in reason and "INTERNAL_ERROR" not in reason else None


def _describe(error: Exception, key: ApiKey) -> str:
    text = _unquoted(str(error), key)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _unquoted(text: str, key: ApiKey) -> str:
    """Return aiohttp's message without the bytes that it quotes: it truncates them, perhaps inside an echoed key."""
    return printable(key.redact(re.split(r"\bb['\"]", text)[0].strip(" :\n")))
