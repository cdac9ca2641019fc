"""The record of one call: its attempts and its time, as errors and events report them."""

from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias
from uuid import uuid4

from audiences_async._http.deprecation import Notice
from audiences_async._http.wire import Answer, JsonAnswer, Result
from audiences_async.clock import Clock
from audiences_async.errors import AudiencesError, StatusError, TransportError
from audiences_async.events import (
    Attempt,
    AttemptFinished,
    AttemptStarted,
    CallFinished,
    CallStarted,
    EventHook,
    ServiceDeprecated,
    StopReason,
    emit,
    is_watched,
)
from audiences_async.models import AudiencesResponse

StandsIn: TypeAlias = Callable[[BaseException], bool]
"""Tells whether a cached answer stands in for an error."""

_WITH_STATUS: Final = (AudiencesResponse, JsonAnswer, StatusError)


def new_call_id() -> str:
    """Return a new identifier for a call: a UUID, which most services take as a request's identifier."""
    return str(uuid4())


class CallRecord:
    """The attempts of one call so far, and when it and its latest attempt began.

    Args:
        account: Name of the account.
        started: When the call began, on the client's clock.
        clock: The client's clock.
        on_event: Called with what happens.
        call_id: Identifies the call; ``None`` means that an identifier is made when one is needed.
    """

    __slots__ = (
        "_account", "_call_id", "_clock", "_elapsed", "_on_event", "_started", "attempts", "is_watched", "sent_at",
        "stands_in",
    )  # fmt: skip

    def __init__(
        self, account: str, started: float, clock: Clock, on_event: EventHook | None, call_id: str | None = None
    ) -> None:
        self.attempts: tuple[Attempt, ...] = ()
        self.sent_at: float | None = None
        """When the attempt under way was sent; ``None`` if none is."""
        self.is_watched: bool = is_watched(on_event)
        """Whether the events are observed; otherwise a call that succeeds needs no records."""
        self.stands_in: StandsIn | None = None
        """Set by a cache that has an answer; ``None`` if there is none."""
        self._account = account
        self._call_id = call_id
        self._started = started
        self._clock = clock
        self._on_event = on_event
        self._elapsed = 0.0  # s; of the latest attempt

    @property
    def call_id(self) -> str:
        """What identifies the call in its events and its error."""
        if self._call_id is None:
            self._call_id = new_call_id()
        return self._call_id

    def call_started(self, path: str | None) -> None:
        """Emit `CallStarted`."""
        if self.is_watched:
            emit(self._on_event, CallStarted(self._account, path, call_id=self.call_id))

    def attempt_started(self, queued_at: float) -> None:
        """Note that a request goes now, which has waited for its turn since *queued_at*."""
        self.sent_at = sent_at = self._clock.monotonic()
        if self.is_watched:
            emit(
                self._on_event,
                AttemptStarted(self._account, self._next_number, sent_at - queued_at, call_id=self.call_id),
            )

    def attempt_returned(self) -> None:
        """Note that the request under way has a result, which the next `add` records."""
        assert self.sent_at is not None
        self._elapsed = self._clock.monotonic() - self.sent_at
        self.sent_at = None

    def add(self, result: Result, wait: float, reason: str, *, is_own: bool = True) -> None:
        """Record an attempt that is followed by another one after *wait* seconds, or by none, for *reason*.

        Without *is_own* it was a probe for another account, and the text of its reply is not for this one.
        """
        error = result.message if isinstance(result, AudiencesError) else None
        if error is not None and not is_own and not isinstance(result, TransportError):
            error = f"{type(result).__name__}, to a probe for all accounts"
        status = result.status if isinstance(result, _WITH_STATUS) else None
        self._append(Attempt(self._next_number, status, error, self._elapsed, wait, reason))
        self._elapsed = 0.0  # also of the next attempt, if nothing is sent because the key function fails

    def until_now(self, reason: StopReason) -> tuple[Attempt, ...]:
        """Return the attempts for a caller that leaves now, for *reason*: one under way may be on the wire."""
        if self.sent_at is None:
            return self.attempts
        elapsed = self._clock.monotonic() - self.sent_at
        return (*self.attempts, Attempt(self._next_number, None, "cut off", elapsed, 0.0, reason))

    def cut_off(self, reason: StopReason) -> None:
        """Record the attempt under way, if any, as cut off for *reason*."""
        if self.sent_at is not None:
            self._append(self.until_now(reason)[-1])
            self.sent_at = None

    def answered(self, result: Answer) -> None:
        """Record the last attempt of a call that is answered, and emit `CallFinished`."""
        if self.is_watched:
            self.add(result, 0.0, "success")
            self._finished(None)

    def failed(self, error: AudiencesError, reason: StopReason) -> AudiencesError:
        """Return the call's *error* with all that is known about the call, and emit `CallFinished`."""
        error.account = self._account
        error.attempts = self.attempts
        error.elapsed = self._clock.monotonic() - self._started
        error.stop_reason = reason
        error.call_id = self.call_id
        self._finished(error)
        return error.with_traceback(None)  # whose frames would hold the call for as long as the error is kept

    def abandoned(self, error: BaseException) -> None:
        """Emit `CallFinished` for a call that was cancelled, or that raised an unexpected exception; mark that one."""
        self._finished(error)
        if isinstance(error, Exception):
            with suppress(Exception):  # a class of exceptions may forbid it
                error.call_id = self.call_id  # type: ignore[attr-defined]

    def deprecated(self, notice: Notice) -> None:
        """Emit `ServiceDeprecated`."""
        emit(
            self._on_event,
            ServiceDeprecated(self._account, notice.deprecation, notice.sunset, notice.link, call_id=self.call_id),
        )

    def _finished(self, error: BaseException | None) -> None:
        if not self.is_watched:
            return
        elapsed = self._clock.monotonic() - self._started
        count = len(self.attempts) + (self.sent_at is not None)
        name = None if error is None else type(error).__name__
        stale = error is not None and self.stands_in is not None and self.stands_in(error)
        emit(self._on_event, CallFinished(self._account, count, elapsed, name, stale, call_id=self.call_id))

    def _append(self, attempt: Attempt) -> None:
        self.attempts += (attempt,)
        if self.is_watched:
            emit(self._on_event, AttemptFinished(self._account, attempt, call_id=self.call_id))

    @property
    def _next_number(self) -> int:
        return len(self.attempts) + 1
