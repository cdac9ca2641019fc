"""One row for each audience, with the same columns of the same types whatever the service sends."""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final, TypeAlias

import msgspec

from audiences_async._base.dates import date_and_time
from audiences_async._jobs.outcome_files import Line

COLUMNS: Final = (
    "account", "fetched_at", "response_time", "id", "name", "type", "created_time", "user_count", "extra",
)  # fmt: skip
"""Text, except for ``fetched_at``, ``response_time``, ``created_time`` (times) and ``user_count`` (an integer)."""

TIMES: Final = frozenset({"fetched_at", "response_time", "created_time"})
COUNTS: Final = frozenset({"user_count"})

Row: TypeAlias = tuple[str | int | datetime | None, ...]

_MAX_COUNT: Final = 2**63 - 1  # of a signed integer of 64 bits


class _Fetched(msgspec.Struct):
    """The fields of a line that its rows need."""

    account: str
    fetched_at: datetime | None
    response_time: datetime | None
    audiences: list[dict[str, Any]]


_decode: Final = msgspec.json.Decoder(_Fetched).decode


def rows(outcomes: Iterable[Line]) -> Iterator[Row]:
    """Yield the audiences of all accounts that were fetched.

    A field that does not fit into its column, as that of an unknown type may be, is in ``extra`` with all undocumented
    fields. ``extra`` is a JSON object, or ``None`` if it would be empty.
    """
    for outcome in outcomes:
        fetched = _decode(outcome.text)
        start = fetched.account, fetched.fetched_at, fetched.response_time
        for audience in fetched.audiences:
            yield *start, *_values(audience)


def _values(rest: dict[str, Any]) -> Iterator[str | int | datetime | None]:
    """Yield the values of one audience; *rest* loses those that have a column of their own."""
    for name in COLUMNS[3:-1]:
        value = _fitting(name, rest.get(name))
        if value is not None:
            del rest[name]
        yield value
    yield msgspec.json.encode(rest).decode() if rest else None


def _fitting(name: str, value: Any) -> str | int | datetime | None:
    if name in COUNTS:
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
        return value if fits else None
    if not isinstance(value, str):
        return None
    return _time(value) if name in TIMES else value


def _time(text: str) -> datetime | None:
    try:
        return date_and_time(text)
    except (ValueError, OverflowError):
        return None
