"""Exceptions raised by this package.

AudiencesError
├── ConfigurationError (ValueError)        invalid arguments; raised before any I/O
├── ClientClosedError (RuntimeError)       used after close, or from another event loop
├── DeadlineExceededError (TimeoutError)   the whole call ran out of time
├── TransportError                         no answer: try later
│   ├── ConnectionFailedError              DNS, refused, TLS, reset, cut short
│   └── AttemptTimeoutError
├── InvalidResponseError                   an unreadable answer: the service changed
│   └── ResponseTooLargeError
└── StatusError                            an error status (any status from 300 up)
    ├── BadRequestError 400, UnauthorizedError 401, ForbiddenError 403, NotFoundError 404
    ├── TooManyRequestsError 429
    └── ServerError 5xx
"""

import math
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any, ClassVar, Final, TypeVar

from audiences_async.events import Attempt, StopReason

_E = TypeVar("_E", bound="AudiencesError")

_SHOWN_PROBLEMS: Final = 3


def printable(text: str, limit: int = 200) -> str:
    """Return *text* on one line: control characters are escaped, and it is cut after *limit* characters."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


class AudiencesError(Exception):
    """Base class of this package's errors. Picklable; never holds an API key.

    Attributes:
        message: The failure of the last attempt, or the problem with the arguments.
        account: The account's name; ``None`` if the error does not concern one account.
        attempts: One record per request sent, the first included, and per failure of a key function or a limiter.
        elapsed: Seconds since the call began.
        retry_after: Seconds to wait before the next call: the wait that the service asked for, else the wait that did
            not fit into ``timeout``; ``None`` if neither is known.
        stop_reason: Why no further attempt was made: ``"final"`` (a retry would not help), ``"attempts"`` (all used),
            ``"deadline"`` (the next wait, or the attempt, did not fit into ``timeout``), ``"budget"`` (the client's
            `RetryBudget` was exhausted), ``"patience"`` (in a job: no account had an answer for *patience* seconds).
        call_id: Identifies the call, and is also on its events; ``None`` if no call was made.
    """

    hint: ClassVar[str] = ""
    """Suggested action for the user; may be empty."""
    call_id: str | None = None  # of an error that 0.2 pickled

    def __init__(
        self,
        message: str,
        *,
        account: str | None = None,
        attempts: tuple[Attempt, ...] = (),
        elapsed: float = 0.0,
        retry_after: float | None = None,
        stop_reason: StopReason = "final",
        call_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.account = account
        self.attempts = attempts
        self.elapsed = elapsed
        self.retry_after = retry_after
        self.stop_reason: StopReason = stop_reason
        self.call_id = call_id

    @property
    def summary(self) -> str:
        """One line with the account, the failure and the number of attempts, without the hint."""
        where = f"account '{printable(self.account)}': " if self.account is not None else ""
        return f"{where}{self.message}{self._details()}{self._effort()}"

    @property
    def gateway_status(self) -> int:
        """HTTP status for a web app to return if its own request failed because of this error: 429, 500, 502 or 504.

        A call whose turn comes after its deadline is a 429: the client may come back after ``retry_after``.
        """
        return 502

    @property
    def gateway_headers(self) -> dict[str, str]:
        """Headers to send with `gateway_status`: ``Retry-After`` in whole seconds from 1 up, if known."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}

    def __str__(self) -> str:
        return f"{self.summary} ({self.hint})" if self.hint else self.summary

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)

    def _details(self) -> str:
        return ""

    def _effort(self) -> str:
        """Return the number of attempts and why they ended; empty if there were none."""
        if not self.attempts:
            return ""
        count = f"{len(self.attempts)} attempt{'s' if len(self.attempts) > 1 else ''}"
        parts = [f"; gave up after {count} in {self.elapsed:.1f} s"]
        if self.stop_reason == "deadline":
            parts.append("out of time (a larger timeout allows more)")
        if self.stop_reason == "budget":
            parts.append("the client's retry budget is used up")
        if self.retry_after is not None:
            parts.append(f"retry after {self.retry_after:.3g} s")
        return ", ".join(parts)


def _restore(cls: type[_E], args: tuple[Any, ...], state: dict[str, Any]) -> _E:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(AudiencesError, ValueError):
    """An argument, an environment variable or a key is invalid. Raised before anything is sent.

    Only the bug of a key function that is asked again after a 401, or of a limiter, can come later.
    """

    @property
    def gateway_status(self) -> int:
        """500: the web app itself is misconfigured."""
        return 500


class ClientClosedError(AudiencesError, RuntimeError):
    """The client was used after it was closed or on another event loop, or it was closed during the call."""

    @property
    def gateway_status(self) -> int:
        """500: the web app is shutting down, or misuses the client."""
        return 500


class DeadlineExceededError(AudiencesError, TimeoutError):
    """The call exceeded its ``timeout`` while it was queued or during an attempt.

    Raised at once if the account's next turn comes after the deadline; ``retry_after`` is then the time until that
    turn.
    """

    @property
    def gateway_status(self) -> int:
        """429 if ``retry_after`` is known, else 504."""
        return 504 if self.retry_after is None else 429


class TransportError(AudiencesError):
    """No answer arrived. The service may or may not have seen the request; a GET is safe to send again.

    Attributes:
        transient: Whether a retry may help; ``False`` for an untrusted certificate.
    """

    hint = "try again later"

    def __init__(self, message: str, *, transient: bool = True, **context: Any) -> None:
        super().__init__(message, **context)
        self.transient = transient


class ConnectionFailedError(TransportError):
    """No readable HTTP response: name not found, refused, TLS, reset, malformed, cut short, or a corrupt encoding.

    Attributes:
        stale_connection: Whether the peer had closed a pooled connection before it saw the request.
        unsent: Whether this machine could not open a socket, so that the request never left it.
    """

    hint = "check base_url, the network and any proxy in between, or try again later"

    def __init__(self, message: str, *, stale_connection: bool = False, unsent: bool = False, **context: Any) -> None:
        super().__init__(message, **context)
        self.stale_connection = stale_connection
        self.unsent = unsent


class AttemptTimeoutError(TransportError):
    """One attempt took longer than ``attempt_timeout``. The message names the phase that timed out."""

    @property
    def gateway_status(self) -> int:
        """504: the service did not answer in time."""
        return 504


class InvalidResponseError(AudiencesError):
    """The answer is unreadable: not JSON, or not of the documented shape.

    Attributes:
        problems: Each problem with its path, such as ``$.data[3].user_count: expected an integer, got 'abc'``.
        body: The first 64 KiB of the body, without the key.
        request_id: The reply's own identifier; see `StatusError`.
    """

    hint = "the service may have changed; see .problems and .body"
    request_id: str | None = None  # of an error that 0.2 pickled

    def __init__(
        self,
        message: str,
        *,
        problems: tuple[str, ...] = (),
        body: bytes = b"",
        request_id: str | None = None,
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.problems = problems
        self.body = body
        self.request_id = request_id

    def _details(self) -> str:
        more = len(self.problems) - _SHOWN_PROBLEMS
        shown = [printable(problem) for problem in self.problems[:_SHOWN_PROBLEMS]]
        problems = ": " + "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])]) if shown else ""
        return problems + _named(self.request_id)


class ResponseTooLargeError(InvalidResponseError):
    """The decompressed body exceeds ``max_body_bytes``; the rest was not read."""

    hint = "raise max_body_bytes if the account really has this many audiences"


class StatusError(AudiencesError):
    """The service answered with a status of 300 or more, in HTTP or in the envelope of a 200.

    Attributes:
        status: The status: the envelope's, if a 200 carries one from 300 up.
        description: The envelope's description, without the key; else the ``detail`` or the ``title`` of a problem by
            RFC 9457, else a ``message`` or an ``error``; empty if the service sent none of them.
        response_time: The service's clock when it answered, aware and in UTC; ``None`` if the service did not send it.
        headers: The response headers, without the key; names are case-insensitive.
        body: The first 64 KiB of the decompressed body, without the key.
        request_id: The reply's own identifier, for the service's support, without the key: from ``X-Request-Id`` or a
            similar header, or the body's ``traceId``; ``None`` if there is none.
    """

    request_id: str | None = None  # of an error that 0.2 pickled

    def __init__(
        self,
        message: str,
        *,
        status: int,
        description: str = "",
        response_time: datetime | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        request_id: str | None = None,
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.status = status
        self.description = description
        self.response_time = response_time
        self.headers: Mapping[str, str] = {} if headers is None else headers
        self.body = body
        self.request_id = request_id

    def _details(self) -> str:
        return _named(self.request_id)


def _named(request_id: str | None) -> str:
    return "" if request_id is None else f" (request id {request_id})"


class BadRequestError(StatusError):
    """400: the service did not understand the request."""


class UnauthorizedError(StatusError):
    """401: the API key is missing, wrong or revoked."""

    hint = "check the account's API key in the management console"


class ForbiddenError(StatusError):
    """403: the API key is known but not permitted to do this."""

    hint = "check what the account's API key may do in the management console"


class NotFoundError(StatusError):
    """404: there is no such resource."""

    hint = "check base_url"


class TooManyRequestsError(StatusError):
    """429: the account sent too many requests."""

    hint = "ask less often, or allow more time or attempts"

    @property
    def gateway_status(self) -> int:
        """429: the web app's client asked too often as well."""
        return 429


class ServerError(StatusError):
    """5xx: the service, or a proxy in front of it, failed."""

    hint = "try again later"


# Mistakes in the callback's own code, which a retry cannot fix. Any other exception of a callback may be transient.
_MISTAKES: Final = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    StopAsyncIteration, StopIteration, TypeError, ValueError,
)  # fmt: skip


def callback_error(what: str, error: BaseException) -> ConfigurationError | TransportError:
    """Return the error of a call whose key function or limiter raised *error*; the caller sets it as the cause.

    Args:
        what: The callback's name, for the message.
        error: The callback's exception. A programming error is final; any other exception is retried.
    """
    message = f"{what} raised {type(error).__name__}"
    return ConfigurationError(message) if isinstance(error, _MISTAKES) else TransportError(message)


_BY_STATUS: Final[Mapping[int, type[StatusError]]] = {
    400: BadRequestError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    429: TooManyRequestsError,
}


def status_error(status: int, description: str, **context: Any) -> StatusError:
    """Return the error for a status of 300 or more, with the service's *description* in its message."""
    cls = _BY_STATUS.get(status, ServerError if 500 <= status <= 599 else StatusError)
    detail = f": {printable(description)}" if description else ""
    return cls(f"HTTP {status} {phrase(status)}".rstrip() + detail, status=status, description=description, **context)


# Python before 3.13 has the names of RFC 2616 and RFC 4918: https://www.rfc-editor.org/rfc/rfc9110#section-15.5.
_RENAMED: Final[Mapping[int, str]] = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}


def phrase(status: int) -> str:
    """Return RFC 9110's reason phrase for *status*; empty for an unknown status."""
    try:
        return _RENAMED.get(status) or HTTPStatus(status).phrase
    except ValueError:
        return ""
