"""Settings of a client: when to retry, how fast to send, and how long to reuse an answer. All are frozen values.

The service documents 429 and 500, and no ``Retry-After``: https://api.commbox.io/ (GET /audiences). Proxies in front of
such a service add 408, 502, 503 and 504.
"""

from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

from attrs import field, frozen

from audiences_async._base import checks
from audiences_async.errors import AudiencesError, StatusError, TransportError

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
        max_attempts: Maximum number of requests for one call, the first included; 1 means no retry. In a job, probes of
            an outage do not count, nor do refusals by a limit that all accounts share; if other accounts are answered
            meanwhile, only the first four of them do not.
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


@frozen
class RateLimit:
    """A rate that is known: at most ``burst + rate / per * t`` requests in any *t* seconds.

    As ``rate_limit`` it is that of each account, as ``service_rate_limit`` that of all accounts together.

    Attributes:
        rate: Requests in *per* seconds; above 0.
        per: Seconds; above 0.
        burst: Requests that may go at once after a pause; 1 means evenly spaced.

    Raises:
        ConfigurationError: A number out of its range.
    """

    rate: float = field(validator=checks.is_positive)
    per: float = field(default=1.0, validator=checks.is_positive)
    burst: int = field(default=1, validator=checks.is_count)


@runtime_checkable
class Limiter(Protocol):
    """Any object that says when an account may send, such as a limit that several processes share.

    It may also have ``acquire_within(account_name, timeout)``, which is called instead and gets the seconds until the
    call's deadline, ``inf`` if there is none; and ``limit``, a `RateLimit` that this process cannot exceed. Both let a
    call whose turn comes too late fail at once. A `DeadlineExceededError` or `TransportError` that it raises is the
    call's.

    As a ``service_rate_limit`` it may have ``attach_pace(pace)``, called once with the pace that the client learns:
    ``pace.learned_rate`` in requests per second, ``None`` if none is learned, and ``pace.adopt(rate)``, which sets it.
    """

    async def acquire(self, account_name: str) -> object:
        """Return when the account may send one request. Called before every attempt, retries included."""


@frozen
class CachePolicy:
    """How long an answer may be reused. A frozen value that can be shared freely.

    Concurrent calls of one account always share one request. The cache is keyed by the account's API key, never by its
    name, so that no account gets the answer of another. Errors are not cached.

    Attributes:
        ttl: Seconds for which an answer is reused; 0 means that only concurrent calls share it.
        stale_while_revalidate: Seconds after *ttl* for which the old answer is returned while a new one is fetched in
            the background; 0 disables this (https://www.rfc-editor.org/rfc/rfc5861, section 3).
        stale_if_error: Seconds after *ttl* for which the old answer replaces an outage: no answer, a 5xx, a 429, or no
            time left; 0 disables this (section 4).
        max_accounts: Maximum number of cached answers; the least recently used are evicted.

    Raises:
        ConfigurationError: A number is out of range.
    """

    ttl: float = field(validator=checks.is_not_negative)
    stale_while_revalidate: float = field(default=0.0, validator=checks.is_not_negative)
    stale_if_error: float = field(default=0.0, validator=checks.is_not_negative)
    max_accounts: int = field(default=1024, validator=checks.is_count)
