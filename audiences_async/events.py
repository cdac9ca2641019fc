"""Events and attempt records as frozen values, for logs, metrics and errors.

Every time is in seconds. No event ever holds an API key.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Final, Literal, TypeAlias

from attrs import field, frozen

StopReason: TypeAlias = Literal["final", "attempts", "deadline", "budget", "patience"]
"""Why a call made no further attempt.

A retry would not help; all attempts were used; the deadline came first; the retry budget was used up; or an outage
outlasted a job's patience.
"""

CacheResult: TypeAlias = Literal["fresh", "stale", "shared", "wire"]
"""Where an answer of a client with a cache comes from."""

_log: Final = logging.getLogger("audiences_async")
_log.addHandler(logging.NullHandler())  # without logging configured, print nothing


@frozen
class Attempt:
    """The record of one request; or of a failure of a key function or a limiter, after which none was sent.

    Attributes:
        number: 1 for the first attempt of the call.
        status: The HTTP status, or the envelope's if a 200 carries an error. ``None`` if no readable response arrived.
        error: A short description of the failure; ``None`` on success.
        elapsed: Seconds from sending to the last byte read.
        wait: Seconds waited before the next attempt; 0.0 if it followed at once or was the last one.
        reason: Why it waited: ``"backoff"``, ``"retry-after"``, ``"pace"`` (for its turn in the account's pace; in a
            job also in the service's, and then it does not count towards ``max_attempts``), ``"stale-connection"`` or
            ``"fresh-key"``, or ``"probe"`` (in a job, while the service is paused; it does not count either). After
            the last attempt: ``"success"`` or the call's ``stop_reason``.
    """

    number: int
    status: int | None
    error: str | None
    elapsed: float
    wait: float
    reason: str


@frozen
class Event:
    """Base class of all events.

    Attributes:
        account: The account's name.
        call_id: Identifies the call, and is also on its error; ``None`` for an event of no single call. It does not
            count for ``==``.
    """

    account: str
    call_id: str | None = field(default=None, kw_only=True, eq=False)


@frozen
class CallStarted(Event):
    """A call begins. This and the call's later events are emitted inside the task that makes the call.

    That task is the caller's own; with a `CachePolicy`, it is one of the client's, in the context of the first caller.

    Attributes:
        path: Path of a call of `get_json`, as it was passed; ``None`` means `get_audiences`.
    """

    path: str | None = None


@frozen
class AttemptStarted(Event):
    """A request is sent.

    Attributes:
        number: 1 for the first attempt of the call.
        waited: Seconds waited for the account's pace and for a free connection.
    """

    number: int
    waited: float


@frozen
class AttemptFinished(Event):
    """An attempt ended, and the next step is decided: an answer, a wait or an error.

    Attributes:
        attempt: The attempt's record, including the wait that follows.
    """

    attempt: Attempt


@frozen
class CallFinished(Event):
    """A call ended, with an answer or an error.

    Attributes:
        attempts: Number of attempts, the first included: requests, and failures of a key function or a limiter.
        elapsed: Seconds for the whole call, every wait included.
        error: The error's class name; ``CancelledError`` if the caller cancelled; ``None`` for an answer.
        stale: Whether a cached answer stands in for the error, as `CachePolicy` allows: no caller gets the error.
    """

    attempts: int
    elapsed: float
    error: str | None
    stale: bool = False


@frozen
class CacheLookup(Event):
    """A caller of a client with a `CachePolicy` gets an answer; ``call_id`` is that of the call which fetched it.

    Attributes:
        result: Where the answer comes from: ``"fresh"`` (the cache), ``"stale"`` (the cache, after its ``ttl``),
            ``"shared"`` (the request of another caller) or ``"wire"`` (a request of its own).
        age: Seconds since the answer arrived; 0.0 unless it comes from the cache.
    """

    result: CacheResult
    age: float


@frozen
class ServiceDeprecated(Event):
    """The service announces its end, by ``Deprecation`` (RFC 9745) or ``Sunset`` (RFC 8594); once for each client.

    Attributes:
        deprecation: Since when it is deprecated, or will be; ``None`` if the reply has no readable time.
        sunset: When it is expected to end; ``None`` if the reply has no readable time.
        link: URL of more information; ``None`` if the reply has none.
    """

    deprecation: datetime | None
    sunset: datetime | None
    link: str | None


@frozen
class AccountPaused(Event):
    """The account's requests pause because the service reported that it sent too many.

    Attributes:
        seconds: Length of the pause; then one probe is sent, and the other requests follow if it is answered.
        asked: Whether the service gave the time, by ``Retry-After`` or ``RateLimit`` headers.
    """

    seconds: float
    asked: bool


@frozen
class AccountResumed(Event):
    """A probe was answered after a pause; the account's other requests follow."""


@frozen
class RateLearned(Event):
    """A new estimate of the rate that the service grants to the account.

    Attributes:
        rate: Requests per second.
        per: Seconds of a window in which ``rate * per`` requests are granted at once; ``None`` if the limit has none.
    """

    rate: float
    per: float | None = None


@frozen
class ServicePaused(Event):
    """The requests of all accounts pause; ``account`` is empty.

    Attributes:
        seconds: Length of the pause; then one probe is sent, and the other requests follow if it is answered.
        asked: Whether the service gave the time.
        state: ``"limited"`` if all accounts together sent too many requests, ``"out"`` if no account was answered.
    """

    seconds: float
    asked: bool
    state: str


@frozen
class ServiceResumed(Event):
    """A probe was answered after a pause of the service; the other requests follow. ``account`` is empty."""


@frozen
class ServiceRateLearned(Event):
    """A new estimate of the rate that the service grants to all accounts together; ``account`` is empty.

    Attributes:
        rate: Requests per second.
        per: Seconds of a window in which ``rate * per`` requests are granted at once; ``None`` if the limit has none.
    """

    rate: float
    per: float | None = None


@frozen
class ServiceConcurrencyLearned(Event):
    """An estimate of how many requests of all accounts the service takes at the same time; ``account`` is empty.

    Attributes:
        limit: Requests in flight.
    """

    limit: int


EventHook: TypeAlias = Callable[[Event], None]


def log_unexpected(error: Exception, account: str) -> None:
    """Log the traceback of an unexpected exception, after which a job continues."""
    with suppress(Exception):
        fields = {"account": account, "call_id": getattr(error, "call_id", None)}
        _log.error("account %r: the call raised %s", account, type(error).__name__, exc_info=error, extra=fields)


def is_watched(hook: EventHook | None) -> bool:
    """Return whether a hook or the log at DEBUG receives events."""
    return hook is not None or _log.isEnabledFor(logging.DEBUG)


def emit(hook: EventHook | None, event: Event) -> None:
    """Log *event* and pass it to *hook*. Exceptions of either never reach the call."""
    # Hooks and log filters are foreign code on the path of a call.
    with suppress(Exception):
        _log.debug("%r", event, extra=_fields(event))
    if hook is None:
        return
    try:
        hook(event)
    except Exception:  # noqa: BLE001
        with suppress(Exception):
            _log.warning("on_event raised on %r", event, exc_info=True, extra=_fields(event))


def _fields(event: Event) -> dict[str, str | None]:
    """Return the attributes of a log record, for formatters that write each."""
    return {"account": event.account, "call_id": event.call_id}
