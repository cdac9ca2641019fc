"""When to try again, and after how long: our decisions, for tenacity to run.

The service documents 429 and 500, and no ``Retry-After``: https://api.commbox.io/ (GET /audiences). The proxies that
stand before such a service add 408, 502, 503 and 504.
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
    """How often to try, and how long to wait in between. A frozen value: share it freely.

    The wait before attempt *n* + 1 is drawn from 0 to ``min(max_delay, base_delay * 2 ** (n - 1))`` (full jitter).
    ``Retry-After`` is a floor below it, also above ``max_delay``. The whole call never outlives its ``timeout``.

    Attributes:
        max_attempts: Requests on the wire for one call, the first included; 1 means no retry.
        base_delay: Seconds; the longest first wait. 0 means none, but after a 429.
        max_delay: Seconds; the longest drawn wait.
        throttle_base_delay: Seconds; takes the place of ``base_delay`` after a 429. 0 means no wait of our own.
        statuses: The statuses to retry; an attempt without an answer is always retried.

    Raises:
        ConfigurationError: A number out of its range, or a status that is none.
    """

    max_attempts: int = field(default=5, validator=checks.is_count)
    base_delay: float = field(default=0.5, validator=checks.is_not_negative)
    max_delay: float = field(default=20.0, validator=checks.is_not_negative)
    throttle_base_delay: float = field(default=1.0, validator=checks.is_not_negative)
    statuses: frozenset[int] = field(default=RETRIED_STATUSES, converter=_statuses)

    def retries(self, error: AudiencesError) -> bool:
        """Whether another attempt may help."""
        if isinstance(error, StatusError):
            return error.status in self.statuses
        return isinstance(error, TransportError) and error.transient


class wait_full_jitter(wait_base):  # noqa: N801 - tenacity's strategies are named like functions
    """Full jitter below tenacity's capped exponential, on top of what ``Retry-After`` asked for.

    Of our own because tenacity's draws from the global random source, and knows neither 429 nor ``Retry-After``.
    """

    def __init__(self, policy: RetryPolicy, clock: Clock) -> None:
        self._clock = clock
        self._backoff = wait_exponential(policy.base_delay, policy.max_delay)
        self._throttled = wait_exponential(policy.throttle_base_delay, policy.max_delay)

    def __call__(self, retry_state: RetryCallState) -> float:
        """Seconds to wait after the attempt whose error *retry_state* holds."""
        assert retry_state.outcome is not None
        error = retry_state.outcome.result()
        longest = self._throttled if isinstance(error, TooManyRequestsError) else self._backoff
        return (error.retry_after or 0.0) + self._clock.random() * longest(retry_state)


@frozen
class RetryBudget:
    """How many retries a client may make of all its calls together: none of them can storm the service.

    A retry after a 5xx, a 408, a timeout or a failed connection takes *cost* tokens; an answer gives *refund* back.
    Other retries are free: after a 429, whose retry is paced, after a stale connection, and with a fresh key. First
    attempts never wait for the budget. If it is used up, a call of `AudiencesClient.get_audiences` ends with the error
    that it has, and ``stop_reason="budget"``. In a job, such a retry waits for one of the places that retries without
    tokens share: a tenth of the job's concurrency.

    Attributes:
        capacity: Tokens at the start, and at most.
        cost: Tokens for a retry.
        refund: Tokens for an answer; 0 means that none come back.

    Raises:
        ConfigurationError: A number out of its range.
    """

    capacity: float = field(default=500.0, validator=checks.is_positive)
    cost: float = field(default=5.0, validator=checks.is_positive)
    refund: float = field(default=1.0, validator=checks.is_not_negative)


class RetryTokens:
    """What is left of a client's `RetryBudget`; ``None`` means that there is no such bound."""

    def __init__(self, budget: RetryBudget | None) -> None:
        self._budget = budget
        self.left: float = math.inf if budget is None else budget.capacity

    def take(self) -> bool:
        """Take the tokens for one retry; ``False`` where there are not enough."""
        if self._budget is None:
            return True
        if self.left < self._budget.cost:
            return False
        self.left -= self._budget.cost
        return True

    def give_back(self) -> None:
        """An answer came."""
        if self._budget is not None:
            self.left = min(self._budget.capacity, self.left + self._budget.refund)
