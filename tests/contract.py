"""An independent strict reader of a 200's body: JSON Schema, its own date parser, and Python's own JSON.

It shares no code and no library with the package, so that the two agree only if both are right. It is as strict as the
contract: the package must not read as a value what it refuses.
"""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from attrs import frozen
from jsonschema import Draft202012Validator, validators

_RECORD: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"type": "string", "minLength": 1}},
    "allOf": [
        {
            "if": {"properties": {"type": {"enum": ["Static", "Dynamic"]}}},
            "then": {
                "required": ["id", "name", "created_time"],
                "properties": {
                    "id": {"type": "string", "minLength": 1},
                    "name": {"type": "string"},
                    "created_time": {"type": "string"},
                },
            },
        },
        {
            "if": {"properties": {"type": {"const": "Static"}}},
            "then": {"required": ["user_count"], "properties": {"user_count": {"type": "integer", "minimum": 0}}},
        },
    ],
}

SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["status", "data"],
    "properties": {
        "status": {
            "anyOf": [
                {"type": "integer", "minimum": 100, "exclusiveMaximum": 300},
                {"type": "string", "pattern": r"\A[12][0-9][0-9]\Z"},
            ]
        },
        "description": {"type": ["string", "null"]},
        "data": {"type": "array", "items": _RECORD},
    },
}
"""The contract of a readable 200. An integer must be written as one: 100.0 is not an integer."""

_Strict: Final = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)
_VALIDATOR: Final = _Strict(SCHEMA)

_TIME: Final = re.compile(
    r"(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})[T ]"
    r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]+))?)?"
    r"(?:Z|(?P<sign>[+-])(?P<hours>[0-9]{2}):?(?P<minutes>[0-9]{2}))?"
)


class RefusedError(Exception):
    """The body breaks the contract; the message has the place."""


@frozen
class Row:
    """One audience by the contract: `beyond` is ``extra``, or ``raw`` of an unknown type."""

    kind: str
    id: Any
    name: Any
    created_time: datetime | None
    user_count: int | None
    beyond: Mapping[str, Any]


@frozen
class Answer:
    """A whole 200."""

    status: int
    description: str
    response_time: datetime | None
    rows: tuple[Row, ...]


def read(body: bytes) -> Answer:
    """Return the audiences in a body.

    Raises:
        RefusedError: The body breaks the contract.
    """
    document = document_of(body)
    for problem in _VALIDATOR.iter_errors(document):
        raise RefusedError(f"{problem.json_path}: {problem.message[:200]}")
    return Answer(
        status=int(document["status"]),
        description=document.get("description") or "",
        response_time=_time_or_none(document.get("response_time")),
        rows=tuple(_rows(document["data"])),
    )


def document_of(body: bytes) -> Any:
    """Return the JSON of a body, without a byte order mark; the last of duplicate keys counts.

    Raises:
        RefusedError: The body is not UTF-8 or not JSON.
    """
    try:
        text = body.decode("utf-8-sig")
        document = json.loads(text, parse_constant=_no_constant)
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"not JSON: {type(error).__name__}") from None
    return document


def time(text: Any) -> datetime:
    """Parse a date *and* time of the proleptic calendar, to the microsecond; without a zone it is in UTC.

    Raises:
        RefusedError: The text is not a date and time.
    """
    found = _TIME.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise RefusedError("no date and time")
    year, month, day, hour, minute = (int(found[name]) for name in ("year", "month", "day", "hour", "minute"))
    fraction = int((found["fraction"] or "0")[:6].ljust(6, "0"))
    if int(found["hours"] or 0) > 23 or int(found["minutes"] or 0) > 59:
        raise RefusedError("no zone")
    away = timedelta(hours=int(found["hours"] or 0), minutes=int(found["minutes"] or 0))
    try:
        there = datetime(year, month, day, hour, minute, int(found["second"] or 0), fraction, tzinfo=UTC)
        return there + away if found["sign"] == "-" else there - away
    except (ValueError, OverflowError):
        raise RefusedError("no date and time") from None


def same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are the same: 1, 1.0 and true are three values, 0.0 and -0.0 two."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


def _rows(data: list[dict[str, Any]]) -> Iterator[Row]:
    for sent in data:
        kind = sent["type"]
        if kind not in {"Static", "Dynamic"}:
            yield Row(kind, _text(sent.get("id")) or None, _text(sent.get("name")), *_unknown(sent))
            continue
        known = {"id", "name", "created_time", "type", *(["user_count"] if kind == "Static" else [])}
        beyond = {name: value for name, value in sent.items() if name not in known}
        count = sent["user_count"] if kind == "Static" else None
        yield Row(kind, sent["id"], sent["name"], time(sent["created_time"]), count, beyond)


def _unknown(sent: dict[str, Any]) -> tuple[datetime | None, None, dict[str, Any]]:
    return _time_or_none(sent.get("created_time")), None, sent


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _time_or_none(value: Any) -> datetime | None:
    try:
        return time(value)
    except RefusedError:
        return None


def _no_constant(name: str) -> Any:
    raise ValueError(name)
