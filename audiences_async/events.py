"""What happened, as frozen values: for logs, metrics and the records on errors.

Every time is in seconds. Nothing here ever holds an API key.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, TypeAlias

from attrs import frozen

StopReason: TypeAlias = Literal["final", "attempts", "deadline", "budget", "patience"]
"""Why a call made no further attempt: it would not help, or the attempts, the time, the retry budget, or a job's
patience with a service that answers nobody were used up."""

_log: Final = logging.getLogger("audiences_async")
_log.addHandler(logging.NullHandler())  # where nobody has set up logging, nothing is printed


@frozen
class Attempt:
    """What one request on the wire came to.

    Attributes:
        number: 1 for the first attempt of the call.
        status: The status that decided: of HTTP, or of the envelope where a 200 carries an error. ``None`` where no
            readable reply came.
        error: What was wrong, in a few words; ``None`` where nothing was.
        elapsed: Seconds from sending to the last byte read.
        wait: Seconds waited before the next attempt; 0.0 where it followed at once or there was none.
        reason: Why that wait: ``"backoff"``, ``"retry-after"``, ``"pace"`` (it waits for its turn in the account's
            pace), ``"stale-connection"`` or ``"fresh-key"``, or ``"probe"`` (in a job, while the service is closed: it
            does not count for ``max_attempts``); or why there was no next attempt: ``"success"`` or the
            call's ``stop_reason``.
    """

    number: int
    status: int | None
    error: str | None
    elapsed: float
    wait: float
    reason: str


@frozen
class Event:
    """Something that happened to a call; the base of all events.

    Attributes:
        account: The account's name.
    """

    account: str


@frozen
class CallStarted(Event):
    """A call begins. Told, as all that follows of the call, inside the task that makes it.

    That task is its caller's own; with a `CachePolicy`, one of the client's, in the context of the first who asked.
    """


@frozen
class AttemptStarted(Event):
    """A request goes out.

    Attributes:
        number: 1 for the first attempt of the call.
        waited: Seconds that it has waited for its turn: for its account's pace, and for a connection to be free.
    """

    number: int
    waited: float


@frozen
class AttemptFinished(Event):
    """An attempt ended, and what follows is decided: an answer, a wait or an error.

    Attributes:
        attempt: The attempt's record, the wait that follows included.
    """

    attempt: Attempt


@frozen
class CallFinished(Event):
    """A call ended, well or with an error.

    Attributes:
        attempts: The number of requests on the wire, the first included.
        elapsed: Seconds for the whole call, every wait included.
        error: The error's class name, ``CancelledError`` where the caller cancelled; ``None`` for an answer.
    """

    attempts: int
    elapsed: float
    error: str | None


@frozen
class AccountPaused(Event):
    """The account's requests stop for a while, because the service said that it asked too often.

    Attributes:
        seconds: How long; one request then goes ahead, and the others follow if it is answered.
        asked: Whether the service named the time, by ``Retry-After`` or ``RateLimit`` headers.
    """

    seconds: float
    asked: bool


@frozen
class AccountResumed(Event):
    """After a pause a request was answered: the account's other requests follow."""


@frozen
class RateLearned(Event):
    """A new measure of what the service grants to the account.

    Attributes:
        rate: Requests per second.
    """

    rate: float


@frozen
class ServicePaused(Event):
    """The requests of all accounts stop for a while; ``account`` is empty.

    Attributes:
        seconds: How long; one request then goes ahead, and the others follow if it is answered.
        asked: Whether the service named the time.
        state: ``"limited"`` if it refused all accounts for going too fast, ``"out"`` if it answered none.
    """

    seconds: float
    asked: bool
    state: str


@frozen
class ServiceResumed(Event):
    """After a pause of the service a request was answered: the others follow; ``account`` is empty."""


@frozen
class ServiceRateLearned(Event):
    """A new measure of what the service grants to all accounts together; ``account`` is empty.

    Attributes:
        rate: Requests per second.
    """

    rate: float


EventHook: TypeAlias = Callable[[Event], None]


def log_unexpected(error: Exception, account: str) -> None:
    """Log the traceback of an error that is none of ours, and that a job goes on after."""
    with suppress(Exception):
        _log.error("account %r: the call raised %s", account, type(error).__name__, exc_info=error)


def is_watched(hook: EventHook | None) -> bool:
    """Whether anybody wants to know."""
    return hook is not None or _log.isEnabledFor(logging.DEBUG)


def emit(hook: EventHook | None, event: Event) -> None:
    """Log the event, and tell the hook; one that raises is logged too, and never hurts the call."""
    # Hooks and the log's filters are somebody else's code, on the path of a call that must go on.
    with suppress(Exception):
        _log.debug("%r", event)
    if hook is None:
        return
    try:
        hook(event)
    except Exception:  # noqa: BLE001
        with suppress(Exception):
            _log.warning("on_event raised on %r", event, exc_info=True)
