"""How long to wait before a retry, and the tokens of the retry budget; tenacity runs the loop.

The service documents 429 and 500, and no ``Retry-After``: https://api.commbox.io/ (GET /audiences). Proxies in front of
it add 408, 502, 503 and 504.
"""

import math

from tenacity import RetryCallState, wait_exponential
from tenacity.wait import wait_base

from audiences_async.clock import Clock
from audiences_async.errors import TooManyRequestsError
from audiences_async.policies import RetryBudget, RetryPolicy


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
