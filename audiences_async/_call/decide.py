"""What follows a failed attempt: another one, or the end of the call. Pure decisions, which tenacity carries out."""

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from attrs import frozen

from audiences_async._http.quota import Quota
from audiences_async._http.wire import Result
from audiences_async._pace.pacing import REFUSALS, Report, Verdict
from audiences_async.errors import (
    AttemptTimeoutError,
    AudiencesError,
    ConnectionFailedError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
)
from audiences_async.events import StopReason
from audiences_async.policies import RetryPolicy

Reason: TypeAlias = Literal["fresh-key", "stale-connection", "pace", "retry-after", "backoff"]
"""Why the next attempt is made when it is."""

_AT_ONCE: Final = frozenset({"fresh-key", "stale-connection", "pace"})
_LIMITED: Final = frozenset({429, 503})


@frozen
class Again:
    """Another attempt.

    Attributes:
        wait: Seconds until it.
        reason: Why it is made after that time.
        is_free: Whether it takes no tokens of the retry budget.
    """

    wait: float
    reason: Reason
    is_free: bool


@frozen
class Stop:
    """The end of the call.

    Attributes:
        reason: Why there is no other attempt.
        needed: Seconds until the next attempt, if it does not fit into the call's timeout; else ``None``.
    """

    reason: StopReason
    needed: float | None = None


@frozen
class Facts:
    """The facts about a call that decide, beside the error of its last attempt.

    Attributes:
        number: Attempts so far.
        time_left: Seconds until the deadline.
        next_turn: Seconds until the account's next turn, as far as they count.
        can_refresh_key: Whether a key function can be asked for a fresh key.
        was_stale: Whether an attempt has failed on a stale connection before.
        is_paced: Whether waiting for the next turn is backoff enough.
        backoff: Draws the seconds of the backoff, ``Retry-After`` included.
    """

    number: int
    time_left: float
    next_turn: float
    can_refresh_key: bool
    was_stale: bool
    is_paced: bool
    backoff: Callable[[], float]


def decide(error: AudiencesError, facts: Facts, policy: RetryPolicy) -> Again | Stop:
    """Return the next attempt after *error*, or why the call ends."""
    if error.stop_reason == "patience":
        return Stop("patience")
    if not (policy.retries(error) or (facts.can_refresh_key and isinstance(error, UnauthorizedError))):
        return Stop("final")
    if facts.number >= policy.max_attempts:
        return Stop("attempts")
    reason = _reason(error, facts)
    wait = 0.0 if reason in _AT_ONCE else facts.backoff()
    needed = max(wait, facts.next_turn)
    if needed >= facts.time_left:
        return Stop("deadline", needed)
    return Again(wait, reason, is_free=reason in _AT_ONCE or isinstance(error, TooManyRequestsError))


def _reason(error: AudiencesError, facts: Facts) -> Reason:
    reason: Reason = "backoff"
    match error:
        case UnauthorizedError() if facts.can_refresh_key:
            reason = "fresh-key"
        # A peer that closes a pooled connection shows nothing about the service.
        case ConnectionFailedError(stale_connection=True) if not facts.was_stale:
            reason = "stale-connection"
        case _ if error.retry_after is not None:
            reason = "retry-after"
        case StatusError(status=status) if status in _LIMITED and facts.is_paced:
            reason = "pace"
    return reason


def report_of(result: Result, quota: Quota | None, policy: RetryPolicy) -> Report:
    """Return what the result of a request shows about the pace.

    Args:
        result: The result.
        quota: The quota that the reply announced, if it did.
        policy: Which failures are retried.
    """
    pause = quota.reset if quota is not None and quota.remaining == 0 else None
    if not isinstance(result, AudiencesError):
        return Report("answered", pause, quota)
    verdict = verdict_of(result, policy)
    return Report(verdict, result.retry_after if verdict in REFUSALS else pause, quota)


def verdict_of(error: AudiencesError, policy: RetryPolicy) -> Verdict:
    """Return what an error shows about the service. Unless it is a refusal, one that is not retried is an answer."""
    found: Verdict = "nothing"
    match error:
        case StatusError(status=429):
            found = "throttled"
        case StatusError(status=503):
            found = "unavailable"
        case _ if not policy.retries(error):
            found = "answered"
        case StatusError():
            found = "failed"
        case AttemptTimeoutError():
            found = "timed out"
        case ConnectionFailedError(stale_connection=True):
            found = "stale"
        case ConnectionFailedError(unsent=False):
            found = "lost"
    return found
