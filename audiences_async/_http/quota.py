"""The quota that a reply announces in its headers, without I/O.

Four forms are read:

- ``RateLimit: "name";r=0;t=30``, with an optional ``RateLimit-Policy: "name";q=100;w=60``: lists
  (https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-ratelimit-headers-10, sections 3 and 4).
- ``RateLimit: limit=100, remaining=0, reset=30``: a dictionary (draft 07, section 3.1).
- ``RateLimit-Remaining`` and ``RateLimit-Reset`` (drafts 00 to 06), and the same with ``X-`` (GitHub and many others,
  https://docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api).
- ``X-Rate-Limit-Remaining`` and ``X-Rate-Limit-Reset``, a date in ISO 8601 (AspNetCoreRateLimit,
  https://github.com/stefanprodan/AspNetCoreRateLimit: ``RateLimitMiddleware.cs`` and ``RateLimitProcessor.cs``).

A malformed field is ignored (draft 10, section 7; RFC 9651, section 4.2), as if the reply did not have it.
"""

from collections import UserString
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

from attrs import frozen
from multidict import MultiMapping, istr

from audiences_async._base.dates import date_and_time, delay_seconds, sent_at

# Each reply is searched for these names. A name that is made once is found faster.
_COMBINED: Final = istr("RateLimit")
_POLICY: Final = istr("RateLimit-Policy")
_SEPARATE: Final = tuple(
    (istr(f"{prefix}-Remaining"), istr(f"{prefix}-Reset")) for prefix in ("RateLimit", "X-RateLimit", "X-Rate-Limit")
)
_MAX_RESET: Final = 86_400.0  # seconds; a day
_MAX_FIELD: Final = 8190  # characters of all lines together; aiohttp's default bound of one, which takes 6 ms to parse
_MAX_DIGITS: Final = 15  # of an Integer in RFC 9651, section 3.3.1
# Draft 10, section 3.1.2, has "requests" in its text, and section 10.3 "request" in the registry.
_REQUESTS: Final = ("requests", "request")


@frozen
class Quota:
    """A quota as a reply announces it.

    Attributes:
        remaining: Requests that may still be sent; 0 or more.
        reset: Seconds from now until the quota is restored; above 0 and at most a day.
    """

    remaining: int
    reset: float


def announced(headers: MultiMapping[str], *, now: float) -> Quota | None:
    """Return the quota that a reply announces.

    Of several quotas the most restrictive counts: the one with the fewest remaining requests, and of equal ones the
    one that takes longest to be restored. A quota whose reset is 0 or in the past is ignored: it is restored by now, so
    there is nothing to wait for, and its count is out of date.

    Args:
        headers: The reply's headers. The reply's own ``Date`` is the base of a reset that is a point in time.
        now: Seconds since 1970, for a reply without a readable ``Date``.

    Returns:
        The quota; ``None`` if the reply announces none, or only malformed or implausible ones.
    """
    quotas: list[Quota] = []
    if _COMBINED in headers:
        quotas += list(_from_list(headers)) or _from_dictionary(headers, now)
    for remaining, reset in _SEPARATE:
        if remaining in headers:
            quotas += _from_lines(headers, remaining, reset, now)
    return min(quotas, key=_restriction) if quotas else None


def _restriction(quota: Quota) -> tuple[int, float]:
    """Return a sort key that puts the most restrictive quota first."""
    return quota.remaining, -quota.reset


def _from_list(headers: MultiMapping[str]) -> Iterator[Quota]:
    """Yield the sane items of a ``RateLimit`` list."""
    policies = dict(_items(headers, _POLICY)) if _POLICY in headers else {}
    for name, parameters in _items(headers, _COMBINED):
        policy = policies.get(name, {})
        remaining = _count(parameters.get("r"))
        # The window bounds the time that a missing "t" leaves open.
        reset = _count(parameters.get("t", policy.get("w")))
        # Quotas of bytes or of concurrency do not count requests: only their exhaustion matters.
        if remaining == 0 or policy.get("qu", "requests") in _REQUESTS:
            yield from _sane(remaining, reset)


def _from_dictionary(headers: MultiMapping[str], now: float) -> Iterator[Quota]:
    """Yield the quota of a ``RateLimit`` dictionary, if it is sane."""
    members = _parse(headers, _COMBINED, "dictionary") or {}
    remaining, reset = (members.get(key, (None,))[0] for key in ("remaining", "reset"))
    if isinstance(reset, int | Decimal) and not isinstance(reset, bool):
        yield from _sane(_count(remaining), _from_now(float(reset), headers, now))


def _from_lines(headers: MultiMapping[str], remaining: str, reset: str, now: float) -> Iterator[Quota]:
    """Yield the sane quotas of two headers; if they are repeated, as by a proxy, they pair up in order."""
    for count, time in zip(headers.getall(remaining), headers.getall(reset, ()), strict=False):
        digits = count.strip(" \t")
        # Spring Cloud Gateway's RedisRateLimiter sends -1 if it does not know.
        if len(digits) <= _MAX_DIGITS and digits.isascii() and digits.isdigit():
            yield from _sane(int(digits), _until(time.strip(" \t"), headers, now))


def _sane(remaining: int | None, reset: float | None) -> Iterator[Quota]:
    """Yield a quota, if both values are known and its reset is within a day."""
    if remaining is not None and reset is not None and 0 < reset <= _MAX_RESET:
        yield Quota(remaining, float(reset))


def _items(headers: MultiMapping[str], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the named items of a list, each with its parameters; a name is a String, or carelessly a Token."""
    for item, parameters in _parse(headers, name, "list") or ():
        if isinstance(item, str | UserString):
            yield str(item), parameters


def _parse(headers: MultiMapping[str], name: str, kind: str) -> Any:
    """Return a structured field, its lines joined as RFC 9651, section 4.2, wants; ``None`` if it is malformed."""
    import http_sf  # noqa: PLC0415 - 4 ms of every program's start, 30 ms without aiohttp, for a header that few send

    field = ", ".join(headers.getall(name, ()))
    if len(field) > _MAX_FIELD:
        return None
    try:
        return http_sf.parse(field.encode("ascii"), tltype=kind)
    except ValueError:
        return None


def _count(value: object) -> int | None:
    """Return *value* if it is an integer from 0 up; a Boolean is not."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _until(text: str, headers: MultiMapping[str], now: float) -> float | None:
    """Return the seconds from now until a reset; ``None`` if *text* is neither a number nor a date and time."""
    number = delay_seconds(text)
    if number is not None:
        return _from_now(number, headers, now)
    try:
        return date_and_time(text).timestamp() - sent_at(headers, now=now)
    except (ValueError, OverflowError):
        return None


def _from_now(number: float, headers: MultiMapping[str], now: float) -> float:
    """Return the seconds from now until a reset in seconds from now, or else in (milli)seconds since 1970.

    The drafts have seconds from now. GitHub sends seconds since 1970; others, milliseconds.
    """
    if number <= _MAX_RESET:
        return number
    base = sent_at(headers, now=now)
    from_now = number - base
    return from_now if from_now <= _MAX_RESET else number / 1000 - base
