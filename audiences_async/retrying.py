"""Retry decisions and delays; tenacity runs the loop.

The service documents 429 and 500, and no ``Retry-After``: https://api.commbox.io/ (GET /audiences). Proxies in front of
it add 408, 502, 503 and 504.
"""

import math
from collections.abc import Iterable
from typing import Final

from attrs import field, frozen
from tenacity import RetryCallState, wait_exponential
from tenacity.wait import wait_base

from audiences_async import checks
from audiences_async.clock import Clock
from audiences_async.errors import AudiencesError, StatusError, TooManyRequestsError, TransportError

RETRIED_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})


def _statuses(values: Iterable[int]) -> frozenset[int]:
    return checks.statuses("statuses", values)


@frozen
class RetryPolicy:
    """How often to retry, and how long to wait in between. A frozen value that can be shared freely.

    The wait before attempt *n* + 1 is drawn from 0 to ``min(max_delay, base_delay * 2 ** (n - 1))`` (full jitter). It
    is added to ``Retry-After``, which is honoured even above ``max_delay``. The whole call never outlives its
    ``timeout``.

    Attributes:
        max_attempts: Maximum number of requests for one call, the first included; 1 means no retry.
        base_delay: Seconds; upper bound of the first wait. 0 means no wait, except after a 429.
        max_delay: Seconds; upper bound of every drawn wait.
        throttle_base_delay: Seconds; replaces ``base_delay`` after a 429. 0 means no wait beyond the service's own.
        statuses: Statuses to retry. An attempt without an answer is always retried.

    Raises:
        ConfigurationError: A number is out of range, or a status is invalid.
    """

    max_attempts: int = field(default=5, validator=checks.is_count)
    base_delay: float = field(default=0.5, validator=checks.is_not_negative)
    max_delay: float = field(default=20.0, validator=checks.is_not_negative)
    throttle_base_delay: float = field(default=1.0, validator=checks.is_not_negative)
    statuses: frozenset[int] = field(default=RETRIED_STATUSES, converter=_statuses)

    def retries(self, error: AudiencesError) -> bool:
        """Return whether another attempt may help."""
        if isinstance(error, StatusError):
            return error.status in self.statuses
        return isinstance(error, TransportError) and error.transient


class wait_full_jitter(wait_base):  # noqa: N801 - tenacity's strategies are named like functions
    """Full jitter below tenacity's capped exponential, added to the wait that ``Retry-After`` asked for.

    tenacity's own strategy draws from the global random source, and knows neither 429 nor ``Retry-After``.
    """

    def __init__(self, policy: RetryPolicy, clock: Clock) -> None:
        self._clock = clock
        self._backoff = wait_exponential(policy.base_delay, policy.max_delay)
        self._throttled = wait_exponential(policy.throttle_base_delay, policy.max_delay)

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the seconds to wait after the attempt whose error *retry_state* holds."""
        assert retry_state.outcome is not None
        error = retry_state.outcome.result()
        longest = self._throttled if isinstance(error, TooManyRequestsError) else self._backoff
        return (error.retry_after or 0.0) + self._clock.random() * longest(retry_state)


@frozen
class RetryBudget:
    """Limit on the retries of all calls of a client together, so that retries cannot overload the service.

    A retry after a 5xx, a 408, a timeout or a failed connection takes *cost* tokens; an answer gives *refund* back.
    Other retries are free: after a 429 (which is paced), after a stale connection, and with a fresh key. First attempts
    never wait for the budget. If it is used up, a call of `AudiencesClient.get_audiences` ends with its last error and
    ``stop_reason="budget"``. In a job, the retry waits instead for one of the places shared by retries without tokens:
    a tenth of the job's concurrency.

    Attributes:
        capacity: Tokens at the start, and the maximum.
        cost: Tokens for a retry.
        refund: Tokens for an answer; 0 means that tokens never come back.

    Raises:
        ConfigurationError: A number is out of range.
    """

    capacity: float = field(default=500.0, validator=checks.is_positive)
    cost: float = field(default=5.0, validator=checks.is_positive)
    refund: float = field(default=1.0, validator=checks.is_not_negative)


class RetryTokens:
    """The tokens left of a client's `RetryBudget`; a budget of ``None`` is unlimited."""

    def __init__(self, budget: RetryBudget | None) -> None:
        self._budget = budget
        self.left: float = math.inf if budget is None else budget.capacity

    def take(self) -> bool:
        """Take the tokens for one retry; return ``False`` if there are too few."""
        if self._budget is None:
            return True
        if self.left < self._budget.cost:
            return False
        self.left -= self._budget.cost
        return True

    def give_back(self) -> None:
        """Refund tokens for one answer."""
        if self._budget is not None:
            self.left = min(self._budget.capacity, self.left + self._budget.refund)
