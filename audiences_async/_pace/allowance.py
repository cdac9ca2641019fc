"""Keep to announced quotas, of an account or of all accounts together."""

import math
from typing import Final

from audiences_async._http.quota import Quota

_ROUNDING: Final = 1.0  # s; most services announce whole seconds
_LONGEST: Final = 30.0  # s; a quota that was misread must not hold requests back for longer
_SAMPLE: Final = 12  # counts
_CLOSE: Final = 4  # requests from one count to the next, if some are still in flight
_SURE: Final = 2  # samples that fall


class Allowance:
    """The requests that remain of an announced quota, until it is restored.

    What is in flight may not have been counted yet, so it is taken off. Replies may overtake each other: the one whose
    request was sent last has the latest count.
    """

    __slots__ = ("_remaining", "_sent_at", "_until")

    def __init__(self) -> None:
        self._remaining: float = math.inf
        self._sent_at = self._until = -math.inf

    def delay(self, now: float, in_flight: int) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply."""
        if self._remaining > in_flight:
            return 0.0
        if in_flight:
            return math.inf
        return max(0.0, self._until - now)  # after the reset, one request shows what remains

    def announced(self, now: float, sent_at: float, quota: Quota) -> None:
        """Take over the *quota* that was announced in the reply to a request sent at *sent_at*."""
        if sent_at > self._sent_at or now >= self._until:
            self._remaining = quota.remaining
        elif sent_at == self._sent_at:
            self._remaining = min(self._remaining, quota.remaining)
        else:
            return
        self._sent_at, self._until = sent_at, now + min(quota.reset, _LONGEST)

    def not_announced(self, now: float) -> None:
        """Note the end of a request without a quota: it may have been counted; after the reset there may be none."""
        self._remaining = self._remaining - 1 if now < self._until else math.inf


class QuotaScope:
    """Whether announced quotas are of single accounts, or of all together.

    If all accounts share a quota, no two are told the same count in one window, all counts are close together, and they
    fall from sample to sample.
    """

    __slots__ = ("_account", "_counts", "_falls", "_mean", "_until", "is_shared")

    def __init__(self) -> None:
        self.is_shared: bool = False
        """Whether all accounts share the quota, as far as is known."""
        self._account: object = None
        self._counts: list[int] = []
        self._mean = -math.inf  # of the sample before
        self._falls = 0  # samples in a row that are lower than the one before
        self._until = -math.inf

    def announced(self, account: object, now: float, quota: Quota) -> None:
        """Note a *quota* that was announced to an account."""
        until = now + quota.reset
        if until > self._until + _ROUNDING:
            self._counts.clear()
            self._mean = math.inf  # the first sample of a window is lower than none
        self._until = until
        if account is self._account or not quota.remaining:
            return  # two requests of one account, or an exhausted quota, show nothing
        self._account = account
        self._counts.append(quota.remaining)
        if len(self._counts) == _SAMPLE:
            self._judge()

    def _judge(self) -> None:
        mean = sum(self._counts) / _SAMPLE
        spread = max(self._counts) - min(self._counts)
        is_one = len(set(self._counts)) == _SAMPLE and spread <= _CLOSE * _SAMPLE
        if not is_one or mean > self._mean - _SAMPLE / 2:
            self._falls = 0
        elif self._mean < math.inf:
            self._falls += 1
        self.is_shared = self._falls >= _SURE or (self.is_shared and is_one and self._mean == math.inf)
        self._mean = mean
        self._counts.clear()
