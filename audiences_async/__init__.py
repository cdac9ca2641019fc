"""Asyncio client for ``GET /audiences`` of the CommBox API: a complete answer, or an error that explains why not."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from audiences_async._version import __version__

if TYPE_CHECKING:
    from audiences_async.client import AudiencesClient
    from audiences_async.clock import Clock
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
    from audiences_async.policies import CachePolicy, Limiter, RateLimit, RetryBudget, RetryPolicy
    from audiences_async.snapshots import AccountPace, ClientSnapshot

__all__ = [
    "Account",
    "AccountPace",
    "Attempt",
    "AttemptTimeoutError",
    "Audience",
    "AudiencesClient",
    "AudiencesError",
    "AudiencesResponse",
    "BadRequestError",
    "CachePolicy",
    "ClientClosedError",
    "ClientSnapshot",
    "Clock",
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

# Module of each name. Names are imported on first use, so that a program that only loads the pytest plugin or reads the
# version does not pay for aiohttp and cattrs.
_NAMES = {
    "client": ("AudiencesClient",),
    "clock": ("Clock",),
    "errors": (
        "AttemptTimeoutError",
        "AudiencesError",
        "BadRequestError",
        "ClientClosedError",
        "ConfigurationError",
        "ConnectionFailedError",
        "DeadlineExceededError",
        "ForbiddenError",
        "InvalidResponseError",
        "NotFoundError",
        "ResponseTooLargeError",
        "ServerError",
        "StatusError",
        "TooManyRequestsError",
        "TransportError",
        "UnauthorizedError",
    ),
    "events": ("Attempt", "Event"),
    "models": (
        "Account",
        "Audience",
        "AudiencesResponse",
        "DynamicAudience",
        "Failed",
        "Fetched",
        "Outcome",
        "StaticAudience",
        "UnknownAudience",
    ),
    "snapshots": ("AccountPace", "ClientSnapshot"),
    "policies": ("CachePolicy", "Limiter", "RateLimit", "RetryBudget", "RetryPolicy"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_PUBLIC_MODULES = frozenset(
    {"accounts", "client", "clock", "errors", "events", "models", "policies", "snapshots", "structuring", "web"}
)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _PUBLIC_MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
