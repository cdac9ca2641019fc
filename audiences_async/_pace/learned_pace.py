"""The pace that refusals have shown: a rate, or a number of requests in a window."""

from typing import Final

from audiences_async._pace.learned_rate import LearnedRate
from audiences_async._pace.learned_window import LearnedWindow

_SLOWLY: Final = 0.5  # of the proven rate, with each later answer: accounts may be refused in between


class LearnedPace:
    """The pace of a limit of unknown kind, from the first refusal on.

    Args:
        grants: Requests that were granted before.
        began: When the first of them was sent.
        ended: When the last of them was answered, or later.
        is_shared: Whether the limit may be shared with other processes.
    """

    __slots__ = ("_proven", "_window", "steady", "until_open")

    def __init__(self, grants: int, began: float, ended: float, *, is_shared: bool) -> None:
        self.steady: LearnedRate = LearnedRate(is_shared=is_shared)
        """The rate at which requests go one by one, unless many may go at once."""
        self._window = LearnedWindow(grants, began, ended)
        self._proven: float | None = None  # the steady rate at the latest proof
        self.until_open: float | None = None
        """Seconds from the latest refusal until the window opens; ``None`` if none is recognized."""

    @property
    def rate(self) -> float | None:
        """Requests per second in the long run; ``None`` until enough was granted between two refusals."""
        return self._window.rate or self.steady.rate

    @property
    def spaces(self) -> bool:
        """Whether requests go one by one at a rate; otherwise many may go at once."""
        return self.steady.rate is not None

    @property
    def per(self) -> float | None:
        """Seconds of the window; ``None`` if none is recognized."""
        return None if self._window.limit is None else self._window.period

    @property
    def is_forgettable(self) -> bool:
        """Whether forgetting it would make little difference."""
        return self.rate is None and self.steady.measurement.since is None

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        delay = self.steady.delay(now)
        return delay if self._window.limit is None else max(delay, self._window.delay(now, in_flight))

    def backlog(self, now: float, ahead: int) -> float:
        """Estimate the seconds until the turn of a request behind *ahead* others; 0.0 if that is unknown."""
        return max(self.steady.backlog(now, ahead), self._window.backlog(now, ahead))

    def sent(self, now: float) -> None:
        """Note that a request goes now."""
        self.steady.sent(now)

    def granted(self, now: float, sent_at: float, *, fresh: bool) -> None:
        """Note that a request was granted; *fresh* if it was sent after the latest refusal."""
        self.steady.answered(fresh=fresh)
        self._window.granted(now, sent_at, fresh=fresh, is_paced=self.steady.rate is not None)

    def refused(self, now: float, sent_at: float, *, asked: bool) -> bool:
        """Learn from a refusal; return whether the pace is a new one.

        Args:
            now: The time.
            sent_at: When the request was sent.
            asked: Whether the refusal names a pause.
        """
        self.until_open = self._window.refused(sent_at)
        if self.until_open is not None:
            self.steady.forget()
            return True
        return self.steady.throttled(now, asked=asked)

    def prove(self) -> None:
        """Note that an account that had been refused got an answer, which shows that there is a limit."""
        if self.rate is not None:
            self._proven = max(self.steady.rate or 0.0, _SLOWLY * (self._proven or 0.0))

    def restore(self) -> bool:
        """Return to the pace that was proven last; return ``False`` if none was."""
        if self._proven is None or (self.steady.rate is not None and not self._proven):
            return False
        if self.steady.rate is not None:
            self.steady.rate = max(self.steady.rate, self._proven)
            self.steady.measurement.stop()
        return True

    def paused(self, now: float, until: float, closed_until: float, *, asked: bool) -> None:
        """Note a pause *until* a moment, after one that lasts until *closed_until*."""
        seconds = until - max(now, closed_until)
        if asked:
            self.steady.measurement.excuse(seconds)
        else:
            self.steady.measurement.paused += seconds
        self.steady.paused_until(until)

    def resumed(self, now: float) -> None:
        """Note the end of a pause."""
        self.steady.paused_until(now)

    def idle(self, idle_for: float = 0.0) -> None:
        """Discard the measurement after idle time, and the window after four periods of it."""
        self.steady.measurement.stop()
        if self._window.is_old(idle_for):
            self._window = LearnedWindow()
