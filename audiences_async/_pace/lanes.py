"""The lane of one account: its pace, and its pauses after a 429."""

import math
from collections.abc import Callable
from typing import Final

from audiences_async._base.deadlines import Deadlines
from audiences_async._pace.pacing import PacedQueue, PauseSettings, Verdict
from audiences_async.clock import Clock
from audiences_async.events import AccountPaused, AccountResumed, Event, RateLearned
from audiences_async.policies import Limiter, RateLimit
from audiences_async.snapshots import AccountPace

_SLOW_START: Final = 2.0  # requests in flight, until a pace is known
_STEP: Final = 0.25  # for each answer, so a quarter more in a round trip
_LONG_TRIP: Final = 0.08  # s; a slow start costs more time than requests then
_LONG_STEP: Final = 0.5
_RECENT: Final = 1.0  # s; requests that an account sent in it may explain a refusal
_LONGEST_ANNOUNCED: Final = 30.0  # s; a pause that no refusal asked for may be misread, and a request will show it


class Lane(PacedQueue):
    """One account's way to the wire, at the account's pace, and closed after a 429."""

    __slots__ = ("_emit", "_granted_at", "_suspected_at", "_window", "account", "fails_alone", "users")

    is_shared = False

    def __init__(
        self,
        account: str,
        *,
        limit: RateLimit | Limiter | None,
        clock: Clock,
        deadlines: Deadlines,
        settings: PauseSettings,
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(limit, clock, deadlines, settings)
        self.account: str = account
        self.users: int = 0
        """Calls that hold on to the lane, also while they neither wait nor send."""
        self._emit = emit
        self._window = _SLOW_START if limit is None else math.inf
        self._granted_at = -math.inf
        self._suspected_at: int | None = None  # answers of the service when this account began to fail
        self.fails_alone: bool = False
        """Whether other accounts were answered between its latest failures."""

    def snapshot(self, now: float) -> AccountPace:
        """Return how the account is paced right now."""
        return AccountPace(self.account, self.paces.rate, self.closing.left(now), self.waiting, self.in_flight)

    def is_idle(self, now: float) -> bool:
        """Return whether forgetting the lane would make no difference."""
        return not self.users and not self.closing.failures and self.closing.until <= now and self.paces.is_idle(now)

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self.in_flight + 1 > self._window and (self.paces.learned is None or not self.paces.learned.spaces):
            return math.inf
        return super().delay(now)

    def explains(self, sent_at: float) -> bool:
        """Return whether a refusal of what was sent then can be the account's own doing: it has sent others lately."""
        if self.in_flight > 1 or sent_at - self._granted_at < _RECENT:
            return True
        return self.paces.rate is not None and sent_at - self._granted_at < 2 / self.paces.rate

    def note_failure(self, answers: int) -> None:
        """Note a failure, after that many *answers* of the service to all accounts."""
        if self._suspected_at is None:
            self._suspected_at = answers
        elif answers > self._suspected_at:
            self.fails_alone = True

    @property
    def recovers(self) -> bool:
        """Whether its last request failed; an answer now shows that this was not its own doing."""
        return self._suspected_at is not None

    def returned(self, now: float, sent_at: float, verdict: Verdict, pause: float | None) -> None:
        """Learn from the result of a request.

        Args:
            now: The time.
            sent_at: When it was sent.
            verdict: The meaning of the reply for the account's pace.
            pause: Seconds for which the service asked to send nothing, if it did.
        """
        fresh = self._returned(now, sent_at)
        if fresh:
            self.closing.probe_is_out = False
        try:
            if verdict == "throttled":
                self._throttled(now, sent_at, pause, fresh=fresh)
            elif verdict in {"answered", "failed", "unavailable"}:
                if verdict == "answered":
                    self._granted_at, self._suspected_at, self.fails_alone = now, None, False
                if self.paces.learned is None or not self.paces.learned.spaces:
                    self._window += _STEP if now - sent_at < _LONG_TRIP else _LONG_STEP
                self._answered(now, sent_at, fresh=fresh)  # the account's limit let it through
                if pause is not None and verdict != "unavailable":
                    self._close(now, min(pause, _LONGEST_ANNOUNCED), asked=True)
        finally:  # a hook may raise what ends the program, and be mistaken
            if self._changed is not None:
                self.changed()

    def _learn(self, now: float, sent_at: float, *, asked: bool) -> float:
        self._window = max(1.0, self._window / 2)
        return super()._learn(now, sent_at, asked=asked)

    def _on_paused(self, seconds: float, *, asked: bool) -> None:
        self._emit(AccountPaused(self.account, seconds, asked))

    def _on_resumed(self) -> None:
        self._emit(AccountResumed(self.account))

    def _on_rate(self, rate: float, per: float | None) -> None:
        self._emit(RateLearned(self.account, rate, per))
