"""The body of a 200 into models, by cattrs: strict, with the path of everything that is wrong.

The shape is the service's own: https://api.commbox.io/ (GET /audiences).
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
from attrs import fields
from cattrs import BaseValidationError, Converter, transform_error
from cattrs.gen import make_dict_structure_fn, override

from audiences_async.errors import InvalidResponseError, status_error
from audiences_async.models import Audience, AudiencesResponse, DynamicAudience, StaticAudience, UnknownAudience

_T = TypeVar("_T")
_Hook: TypeAlias = Callable[[Any, Any], Any]

MAX_PROBLEMS: Final = 20
"""As many problems of one body are told; a body of 100,000 wrong records must not hold the event loop."""

_SHOWN_TEXT: Final = 40
_BOM: Final = b"\xef\xbb\xbf"
# Date and time, in ISO 8601's extended format. `fromisoformat` alone also reads dates without a time, and weeks; what
# else it reads changes from one Python to the next.
_DATE_AND_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?", re.ASCII)
# No field of the service has this name: it carries the fields beyond the documented ones to `extra`.
_EXTRA: Final = "\0extra"


class _ProblemError(ValueError):
    """What was expected of a value and what came, ``...`` for nothing; and where below the place that cattrs knows."""

    def __init__(self, expected: str, value: Any, below: str = "") -> None:
        super().__init__("missing" if value is ... else f"expected {expected}, got {_shown(value)}")
        self.below = below


def decode(body: bytes) -> AudiencesResponse:
    """The audiences in the body of a 200.

    Args:
        body: UTF-8 JSON, with or without a byte order mark.

    Raises:
        StatusError: The envelope's own status is 300 or more.
        InvalidResponseError: It is not JSON, or breaks the schema; every problem (up to 20) is told with its path.
    """
    envelope = parse(body)
    if not isinstance(envelope, dict):
        raise _invalid([f"$: {_ProblemError('an object', envelope)}"], body)
    try:
        status = _envelope_status(envelope)
    except _ProblemError as problem:
        return _raise_problems(envelope, body, first=f"$.status: {problem}")
    if status >= 300:
        raise status_error(status, description_of(envelope), response_time=response_time_of(envelope), body=body)
    try:
        data = _CONVERTER.structure(_array(envelope), tuple[Audience, ...])
        return AudiencesResponse(status, _description(envelope), response_time_of(envelope), data)
    except Exception:  # noqa: BLE001 - cattrs raises what its hooks raise; the second pass tells what and where
        return _raise_problems(envelope, body)


def parse(body: bytes) -> Any:
    """JSON as Python values, integers of any size kept.

    Raises:
        InvalidResponseError: It is empty, not UTF-8, not JSON, or nested too deeply.
    """
    if not body:
        raise _invalid(["$: the body is empty"], body)
    try:
        return msgspec.json.decode(body.removeprefix(_BOM))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason}"
    except RecursionError:
        reason = "nested too deeply"
    except msgspec.MsgspecError as error:
        reason = str(error)
    raise _invalid([f"$: not JSON: {reason}"], body)


def description_of(envelope: Mapping[str, Any]) -> str:
    """The envelope's text; empty where there is none."""
    description = envelope.get("description")
    return description if isinstance(description, str) else ""


def response_time_of(envelope: Mapping[str, Any]) -> datetime | None:
    """The envelope's time, aware and in UTC; ``None`` where it cannot be read."""
    return _read(_utc, envelope.get("response_time"))


def record(audience: Audience) -> dict[str, Any]:
    """The service's own record of an audience, ready for JSON; ``created_time`` in ISO 8601 with ``Z``."""
    if isinstance(audience, UnknownAudience):
        return dict(audience.raw)
    created = audience.created_time.isoformat().replace("+00:00", "Z")
    count = {"user_count": audience.user_count} if isinstance(audience, StaticAudience) else {}
    known = {"id": audience.id, "name": audience.name, "created_time": created, **count, "type": audience.type}
    return known | dict(audience.extra)


def _envelope_status(envelope: Mapping[str, Any]) -> int:
    # Documented as a string in a 200 and as an integer in errors; both come.
    status = envelope.get("status", ...)
    if isinstance(status, str) and status.isascii() and status.isdigit() and len(status) < 10:
        status = int(status)
    if type(status) is not int or status < 100:
        raise _ProblemError("an HTTP status", status)
    return status


def _description(envelope: Mapping[str, Any]) -> str:
    description = envelope.get("description")
    return "" if description is None else _string(description, None)


def _array(envelope: Mapping[str, Any]) -> list[Any]:
    data = envelope.get("data", ...)
    if not isinstance(data, list):
        raise _ProblemError("an array", data)
    return data


def _string(value: Any, _: Any) -> str:
    if type(value) is not str:
        raise _ProblemError("a string", value)
    return value


def _non_empty_string(value: Any, _: Any) -> str:
    if type(value) is not str or not value:
        raise _ProblemError("a non-empty string", value)
    return value


def _user_count(value: Any, _: Any) -> int:
    if type(value) is not int:
        raise _ProblemError("an integer", value)
    if value < 0:
        raise _ProblemError("an integer of 0 or more", value)
    return value


def _utc(value: Any, _: Any) -> datetime:
    try:
        if not _DATE_AND_TIME.fullmatch(_string(value, None)):
            raise ValueError  # noqa: TRY301 - the same words for every way to be no date and time
        time = datetime.fromisoformat(value)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise _ProblemError("a date and time in ISO 8601", value) from None


def _read(hook: Callable[[Any, Any], _T], value: Any) -> _T | None:
    try:
        return hook(value, None)
    except _ProblemError:
        return None


def _shown(value: Any) -> str:
    """A value in a problem: whole or not at all, so that a part of a secret never shows."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() if len(value) > _SHOWN_TEXT:
            return f"a string of {len(value)} characters"
        case int() | float() | str():
            return repr(value)
        case list():
            return "an array"
        case _:
            return "an object"


_STRICT: Final[Mapping[str, _Hook]] = {
    "id": _non_empty_string,
    "name": _string,
    "created_time": _utc,
    "user_count": _user_count,
}


def _model_hook(converter: Converter, cls: type[Any]) -> _Hook:
    """A hook from a record to one class: strict for the documented fields, all others into ``extra``."""
    documented = [attribute.name for attribute in fields(cls) if attribute.name in _STRICT]
    known = frozenset({*documented, "type"})
    overrides: dict[str, Any] = {name: override(struct_hook=_STRICT[name]) for name in documented}
    overrides["extra"] = override(rename=_EXTRA, struct_hook=lambda value, _: value)
    structure = make_dict_structure_fn(cls, converter, **overrides)

    def hook(sent: dict[str, Any], _: Any) -> Any:
        if len(sent) == len(known):
            return structure(sent, cls)
        beyond = {name: value for name, value in sent.items() if name not in known}
        return structure({**sent, _EXTRA: beyond}, cls)

    return hook


def _unknown(sent: dict[str, Any]) -> UnknownAudience:
    return UnknownAudience(
        type=sent["type"],
        id=_read(_non_empty_string, sent.get("id")),
        name=_read(_string, sent.get("name")),
        created_time=_read(_utc, sent.get("created_time")),
        raw=sent,
    )


def _converter(*, detailed: bool) -> Converter:
    converter = Converter(detailed_validation=detailed)
    by_type: dict[str, _Hook] = {cls.type: _model_hook(converter, cls) for cls in (StaticAudience, DynamicAudience)}

    def union_hook(sent: Any, _: Any) -> Audience:
        if not isinstance(sent, dict):
            raise _ProblemError("an object", sent)
        kind = sent.get("type", ...)
        if type(kind) is not str or not kind:
            raise _ProblemError("a non-empty string", kind, below=".type")
        hook = by_type.get(kind)
        return hook(sent, None) if hook else _unknown(sent)

    converter.register_structure_hook(Audience, union_hook)
    converter.get_structure_hook(tuple[Audience, ...])  # made now, so that no request pays for it
    return converter


_CONVERTER: Final = _converter(detailed=False)
_DETAILED: Final = _converter(detailed=True)


def _raise_problems(envelope: dict[str, Any], body: bytes, *, first: str | None = None) -> AudiencesResponse:
    """The second pass, over a body that is known to be wrong: what is wrong, and where."""
    problems = [] if first is None else [first]
    for name, check in (("description", _description), ("data", _array)):
        try:
            check(envelope)
        except _ProblemError as problem:
            problems.append(f"$.{name}: {problem}")
    rows = envelope.get("data")
    for index, sent in enumerate(rows if isinstance(rows, list) else ()):
        if len(problems) >= MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = ["$: there may be more; these are the first"]
            break
        problems += _problems_of(sent, f"$.data[{index}]")
    raise _invalid(problems, body)


def _problems_of(sent: Any, path: str) -> list[str]:
    try:
        _DETAILED.structure(sent, Audience)  # type: ignore[arg-type]
    except _ProblemError as problem:
        return [f"{path}{problem.below}: {problem}"]
    except BaseValidationError as group:
        told = transform_error(group, path, lambda error, _: _told(error))
        return [f"{where}: {what}" for what, _, where in (line.rpartition(" @ ") for line in told)]
    return []


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, _ProblemError) else "missing"


def _invalid(problems: list[str], body: bytes) -> InvalidResponseError:
    return InvalidResponseError("the reply cannot be read", problems=tuple(problems), body=body[: 64 * 1024])
