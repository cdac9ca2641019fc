"""Limits that grant a number of requests at once, and then none for a while: fixed and sliding windows."""

import math
from collections import deque
from typing import Final

_STREAK: Final = 4  # refusals in a row, the first included; a bucket of tokens is rarely empty for as long
_BUNCH: Final = 4  # requests granted together
_QUICK_BUNCH: Final = 0.5  # of the time from one opening to the next, in which they are granted
_EXACT: Final = 0.03  # of the period: how exactly it must be known; each probe for it costs one request
_LOOK_AGAIN: Final = 16  # periods, after which the limit is tried again
_FORGOTTEN: Final = 4  # periods
_STRETCHED: Final = 12  # first periods; one that began in the middle of a window is shorter than the window
_LONGEST_STEP: Final = 20.0  # s
_STEP: Final = 0.25  # of the time waited so far, if the period is longer than expected


_NO_GRANTS: Final[deque[float]] = deque(maxlen=0)


class LearnedWindow:
    """A limit of some requests in any period, recognized by refusals in a row and then many grants at once.

    It suits a fixed window as well as a sliding one. Probes bound the period: it is longer than the wait of a probe
    that was refused, and no longer than the wait of one that was granted. A single request that goes ahead of time
    narrows it, and a single one beyond the limit shows whether more is granted.

    Args:
        grants: Requests that were granted until now.
        began: When the first of them was sent.
        ended: When the last of them was answered, or later.
    """

    __slots__ = (
        "_began", "_count", "_ended", "_first", "_grants", "_is_open", "_longest", "_refusals", "_refused_at",
        "_settled", "_shortest", "limit",
    )  # fmt: skip

    def __init__(self, grants: int = 0, began: float = -math.inf, ended: float = -math.inf) -> None:
        self.limit: int | None = None
        """Requests in a period; ``None`` if no such limit is recognized."""
        self._shortest = 0.0  # s
        self._longest = math.inf  # s
        self._first = math.inf  # s; the period as it was recognized
        self._grants = _NO_GRANTS  # when the latest granted requests were sent, as many as the limit
        self._settled = 0  # grants until the next look whether more is granted
        self._is_open = False  # whether it was granted
        # Until a limit is recognized, of the requests that were granted since the last opening:
        self._count = grants
        self._began = began
        self._ended = ended
        self._refusals = 0  # in a row
        self._refused_at = -math.inf

    @property
    def rate(self) -> float | None:
        """Requests per second in the long run."""
        return None if self.limit is None else self.limit / self.period

    @property
    def period(self) -> float:
        """Seconds of the window: how long after a request another one is tried in its place."""
        if self._longest == math.inf:
            return self._shortest
        assert self.limit is not None
        is_exact = self._longest - self._shortest <= max(_EXACT, 2 / self.limit) * self._longest
        return self._longest if is_exact else (self._shortest + self._longest) / 2

    def is_old(self, idle_for: float) -> bool:
        """Return whether the window is worth nothing after *idle_for* seconds without a request."""
        return self.limit is not None and idle_for > _FORGOTTEN * self.period

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self.limit is None or self._is_open:
            return 0.0
        left = self.limit - in_flight
        if left <= 0:
            return math.inf
        if len(self._grants) < left:
            return 0.0
        since = now - self._grants[-left]
        if since >= self._longest:
            return 0.0
        if not self._settled:
            return math.inf if in_flight else 0.0
        trial = self.period - since
        return self._longest - since if in_flight and trial <= 0 else trial

    def backlog(self, now: float, ahead: int) -> float:
        """Estimate the seconds until the turn of a request behind *ahead* others; 0.0 if that is unknown."""
        if self.limit is None or self._is_open or not self._grants:
            return 0.0
        windows = (ahead + self._within(now)) // self.limit
        return max(0.0, self._grants[0] + windows * self._shortest - now) if windows else 0.0

    def granted(self, now: float, sent_at: float, *, fresh: bool, is_paced: bool) -> None:
        """Note that a request was granted.

        Args:
            now: The time.
            sent_at: When it was sent.
            fresh: Whether that was after the latest refusal.
            is_paced: Whether there is a rate that explains refusals, so that no window is looked for.
        """
        opens = fresh and self._refusals > 0
        if self.limit is not None:
            self._append(sent_at)
        elif opens and not is_paced:
            self._recognize(sent_at)
        if opens:
            self._refusals = self._count = 0
            self._began = sent_at
        elif not self._count:
            self._began = sent_at
        self._count += 1
        self._ended = now

    def refused(self, sent_at: float) -> float | None:
        """Note that a request was refused, which was sent after the latest refusal.

        Returns:
            Seconds to wait; ``None`` if no window is recognized.
        """
        self._refusals += 1
        self._refused_at = sent_at
        if self.limit is None:
            return None
        if self._is_open:
            self._is_open = False
            self._settle(len(self._grants))
        since = sent_at - self._grants[0]
        if len(self._grants) == self.limit and since < self._shortest:
            self._settle(self.limit)
            return self.period - since
        if len(self._grants) == self.limit and since < self._longest < math.inf:
            self._shortest = since
            return self._longest - since
        return self._surprised(sent_at, since)

    def _surprised(self, sent_at: float, since: float) -> float | None:
        """Learn from a refusal of a request that should have been granted: the period is longer, or the limit lower."""
        if self._refusals > 1 or sent_at - self._grants[-1] > self._shortest / 2:
            if since > _STRETCHED * self._first:
                self._forget()  # not one window, but a closure of another kind
                return None
            self._shortest, self._longest = max(self._shortest, since), math.inf
            return min(_STEP * since, _LONGEST_STEP)
        recent = self._within(sent_at)
        if recent < _BUNCH:
            self._forget()
            return None
        self._settle(recent)
        self._trim()
        return max(0.0, self.period - (sent_at - self._grants[0]))

    def _forget(self) -> None:
        self.limit, self._is_open = None, False
        self._grants = _NO_GRANTS

    def _settle(self, limit: int) -> None:
        self.limit = limit
        self._settled = _LOOK_AGAIN * limit

    def _recognize(self, sent_at: float) -> None:
        gap = sent_at - self._began
        together = self._ended - self._began <= _QUICK_BUNCH * gap
        if self._refusals >= _STREAK and self._count >= _BUNCH and together:
            self.limit = self._count
            self._shortest, self._longest, self._first = self._refused_at - self._began, gap, gap
            self._grants = deque([sent_at])
            self._settled = 0

    def _append(self, sent_at: float) -> None:
        assert self.limit is not None
        since = sent_at - self._grants[0]
        if self._is_open and since > self._longest:
            self._forget()  # the service grants any number
            return
        if len(self._grants) == self.limit and since < self._longest and not self._is_open:
            if since >= self._shortest:
                self._longest = since
            else:
                self._is_open = self._longest < math.inf  # else no later grant would show that the limit is gone
        self._settled = max(0, self._settled - 1)
        self._grants.append(sent_at)
        if not self._is_open:
            self._trim()

    def _trim(self) -> None:
        assert self.limit is not None
        while len(self._grants) > self.limit:
            self._grants.popleft()

    def _within(self, now: float) -> int:
        """Return how many requests were granted that are still in the window."""
        return sum(at + self._shortest > now for at in self._grants)
