"""Limits in force: they refuse requests and announce quotas."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

from attrs import define, field

from audiences_async._base import checks
from audiences_async.errors import ConfigurationError
from audiences_async.sandbox.answers import Answer
from audiences_async.sandbox.limits import Limit, Meter

if TYPE_CHECKING:
    from attrs import Attribute

Refusal: TypeAlias = Literal[429, 503]
"""The status of a request that a limit refuses."""


def _is_limit(_: object, attribute: "Attribute[Limit]", value: Limit) -> None:
    checks.instance(attribute.name, value, Limit)


def _is_refusal(_: object, attribute: "Attribute[Refusal]", value: Refusal) -> None:
    if value not in (429, 503):
        raise ConfigurationError(f"{attribute.name} must be 429 or 503, got {value!r}")


@define
class Throttle:
    """A limit in force, with a meter of its own.

    Attributes:
        name: The name of its quota in the ``RateLimit`` headers.
        limit: The description.
        refusal: The status of a refusal.
        retry_after: Whether a refusal has ``Retry-After``.
        quota_headers: Whether replies have the ``RateLimit`` headers.
        meter: The state of the limit.
    """

    name: str
    limit: Limit = field(validator=_is_limit)
    refusal: Refusal = field(validator=_is_refusal)
    retry_after: bool
    quota_headers: bool
    meter: Meter = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.meter = self.limit.meter()

    def refuse(self, now: float) -> Answer | None:
        """Return the refusal of a request that comes at *now*; ``None`` if it may be granted."""
        quota = self.meter.quota(now)
        if quota.remaining > 0:
            return None
        wait = quota.reset if self.retry_after else None
        return Answer(self.refusal, retry_after=None if wait is None else _whole_seconds(wait))

    def announce(self, now: float) -> str:
        """Return the quota at *now* as a member of the ``RateLimit`` header."""
        quota = self.meter.quota(now)
        reset = "" if quota.reset is None else f";t={_whole_seconds(quota.reset)}"
        return f'"{self.name}";r={quota.remaining}{reset}'


@contextmanager
def admission(throttles: Sequence[Throttle], now: float) -> Iterator[Answer | None]:
    """Count a request as under way in all limits, until the block ends.

    If a limit refuses the request, yield the refusal, and count the request in none of them.
    """
    refusal = next(filter(None, (throttle.refuse(now) for throttle in throttles)), None)
    meters = [] if refusal else [throttle.meter for throttle in throttles]
    for meter in meters:
        meter.take(now)
    try:
        yield refusal
    finally:
        for meter in meters:
            meter.release()


def quota_headers(throttles: Sequence[Throttle], now: float) -> dict[str, str]:
    """Return the headers that announce the quotas at *now* (draft-ietf-httpapi-ratelimit-headers-10)."""
    announced = [throttle for throttle in throttles if throttle.quota_headers]
    if not announced:
        return {}
    return {
        "RateLimit-Policy": ", ".join(f'"{throttle.name}";{throttle.limit.policy}' for throttle in announced),
        "RateLimit": ", ".join(throttle.announce(now) for throttle in announced),
    }


def _whole_seconds(wait: float) -> int:
    """Round up, so that a client which waits this long is not early."""
    return max(1, math.ceil(wait))
