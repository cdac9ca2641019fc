"""The asyncio client for ``GET /audiences`` of the CommBox API: a complete answer, or an error that says why not."""

from audiences_async._version import __version__
from audiences_async.caching import CachePolicy
from audiences_async.client import AudiencesClient
from audiences_async.errors import (
    AttemptTimeoutError,
    AudiencesError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidResponseError,
    NotFoundError,
    ResponseTooLargeError,
    ServerError,
    StatusError,
    TooManyRequestsError,
    TransportError,
    UnauthorizedError,
)
from audiences_async.events import Attempt, Event
from audiences_async.models import (
    Account,
    Audience,
    AudiencesResponse,
    DynamicAudience,
    Failed,
    Fetched,
    Outcome,
    StaticAudience,
    UnknownAudience,
)
from audiences_async.pacing import Limiter
from audiences_async.rates import RateLimit
from audiences_async.retrying import RetryBudget, RetryPolicy

__all__ = [
    "Account",
    "Attempt",
    "AttemptTimeoutError",
    "Audience",
    "AudiencesClient",
    "AudiencesError",
    "AudiencesResponse",
    "BadRequestError",
    "CachePolicy",
    "ClientClosedError",
    "ConfigurationError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "DynamicAudience",
    "Event",
    "Failed",
    "Fetched",
    "ForbiddenError",
    "InvalidResponseError",
    "Limiter",
    "NotFoundError",
    "Outcome",
    "RateLimit",
    "ResponseTooLargeError",
    "RetryBudget",
    "RetryPolicy",
    "ServerError",
    "StaticAudience",
    "StatusError",
    "TooManyRequestsError",
    "TransportError",
    "UnauthorizedError",
    "UnknownAudience",
    "__version__",
]
