"""Decode the body of a 200 into models: strictly, and reporting each problem with its path.

The schema is the service's own: https://api.commbox.io/ (GET /audiences).

This is the reference: a cattrs converter with a union hook that reads a record of any content by its ``type``. It reads
what `audiences_async._fast_path` leaves to it, and any body reads the same with and without the fast path.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar

import attrs
from cattrs import BaseValidationError, Converter, transform_error
from cattrs.gen import make_dict_structure_fn, override
from msgspec import MsgspecError, Raw, Struct, ValidationError
from msgspec.json import Decoder

from audiences_async._base.dates import date_and_time, iso_with_z
from audiences_async._fast_path import STEP, decode_plain, parts
from audiences_async.errors import InvalidResponseError, status_error
from audiences_async.models import (
    NOTHING,
    Audience,
    AudiencesResponse,
    DynamicAudience,
    StaticAudience,
    UnknownAudience,
)

_T = TypeVar("_T")
_Hook: TypeAlias = Callable[[Any, Any], Any]

MAX_PROBLEMS: Final = 20
"""Maximum number of problems reported per body, so that 100,000 invalid records do not block the event loop."""

_LONGEST_TEXT: Final = 40
_BOM: Final = b"\xef\xbb\xbf"
_NOT_JSON: Final = (MsgspecError, UnicodeDecodeError, RecursionError)
_STATUS: Final = re.compile(r"[1-5][0-9]{2}")
_ABSENT: Final = Raw()
# Carries the undocumented fields to `extra`. cattrs puts this name into source code: no quotes, no control characters.
# A field of the service with this very name is in `extra` like any other.
_EXTRA: Final = "audiences_async:extra"
_OUT_OF_RANGE: Final = float("inf")  # a JSON number that no Python number can hold; none is read as infinity
_MAX_DEPTH: Final = 200  # of an undocumented value; the JSON parser's own limit depends on the Python and its stack


class _ProblemError(ValueError):
    """A value that breaks the schema.

    The message has the expected and the actual value; ``...`` stands for a missing one. ``below`` is the path below the
    place that cattrs knows.
    """

    def __init__(self, expected: str, value: Any, below: str = "") -> None:
        super().__init__("missing" if value is ... else f"expected {expected}, got {_shown(value)}")
        self.below = below


def decode(body: bytes) -> AudiencesResponse:
    """Return the audiences in the body of a 200.

    Args:
        body: UTF-8 JSON, with or without a byte order mark.

    Raises:
        StatusError: The envelope's own status is 300 or more.
        InvalidResponseError: The body is not JSON, or breaks the schema; the first 20 problems are reported with their
            paths.
    """
    response = decode_plain(body)
    return run_to_completion(decode_in_steps(body)) if response is None else response


def run_to_completion(steps: Generator[None, None, _T]) -> _T:
    """Run a stepwise computation to completion without yielding to the event loop."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result


def decode_in_steps(body: bytes, *, step: int = STEP) -> Generator[None, None, AudiencesResponse]:
    """Do the same as `decode` without blocking the event loop: yield every few milliseconds.

    Args:
        body: As for `decode`.
        step: Bytes that are decoded without yielding, unless one record is longer.
    """
    text = body.removeprefix(_BOM)
    problems: list[str] = []
    yield
    with _readable(text):
        if not text.isascii():
            text.decode()  # members that are not decoded below, such as duplicates, must be UTF-8 too
            yield
        envelope, data = _envelope(text, problems)
        yield
        audiences = yield from _audiences(data, problems, step)
    if len(problems) >= MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = ["$: there may be more problems; only the first are reported"]
    if problems:
        raise _invalid(problems, text)
    return attrs.evolve(envelope, data=tuple(audiences))


def parse(body: bytes) -> Any:
    """Return the Python value of a JSON text, with integers of any size.

    Raises:
        InvalidResponseError: *body* is empty, not UTF-8, not JSON, or nested too deeply.
    """
    with _readable(body):
        return _any(body.removeprefix(_BOM))


def data_of(body: bytes) -> Any:
    """Return the data in the envelope of another call of the API, as plain data; ``None`` if there is none.

    Raises:
        StatusError: The envelope's own status is 300 or more.
        InvalidResponseError: The body is not JSON, or no envelope.
    """
    envelope = parse(body)
    if not isinstance(envelope, dict):
        raise _invalid([f"$: {_ProblemError('an object', envelope)}"], body)
    try:
        status = _status(envelope.get("status", 200))
    except _ProblemError as problem:
        raise _invalid([f"$.status: {problem}"], body) from None
    if status >= 300:
        raise status_error(
            status, description_of(envelope), response_time=response_time_of(envelope), body=body[:_KEPT]
        )
    return envelope.get("data")


def description_of(envelope: Mapping[str, Any]) -> str:
    """Return the envelope's description; empty if it is missing or not a string."""
    description = envelope.get("description")
    return description if isinstance(description, str) else ""


def response_time_of(envelope: Mapping[str, Any]) -> datetime | None:
    """Return the envelope's time, aware and in UTC; ``None`` if it is missing or unreadable."""
    return _read(_utc, envelope.get("response_time"))


_KEPT: Final = 64 * 1024  # bytes of a body, for its error


class _Members(Struct):
    """The documented members of an envelope as raw JSON; other members are only parsed."""

    status: Raw = _ABSENT
    description: Raw = _ABSENT
    response_time: Raw = _ABSENT
    data: Raw = _ABSENT


_any: Final = Decoder().decode
_members: Final = Decoder(_Members).decode
_value: Final = Decoder(Raw).decode
_fields: Final = Decoder(dict[str, Raw]).decode


def _envelope(text: bytes, problems: list[str]) -> tuple[AudiencesResponse, Raw]:
    """Return the envelope without its data, and the data as raw JSON."""
    try:
        members = _members(text)
    except ValidationError:
        raise _invalid([f"$: {_ProblemError('an object', _glimpse(text))}"], text) from None
    named = {"status": members.status, "description": members.description, "response_time": members.response_time}
    sent = {name: _glimpse(value) for name, value in named.items() if value}
    status = 0
    try:
        status = _status(sent.get("status", ...))
    except _ProblemError as problem:
        problems.append(f"$.status: {problem}")
    if status >= 300:
        raise status_error(status, description_of(sent), response_time=response_time_of(sent), body=text[:_KEPT])
    if not isinstance(sent.get("description"), str | None):
        problems.append(f"$.description: {_ProblemError('a string', sent['description'])}")
    return AudiencesResponse(status, description_of(sent), response_time_of(sent), ()), members.data


def _audiences(data: Raw, problems: list[str], step: int) -> Generator[None, None, list[Audience]]:
    """Return the audiences, one part at a time; append their problems to *problems*."""
    audiences: list[Audience] = []
    if bytes(memoryview(data)[:1]) != b"[":
        problems.append("$.data: missing" if not data else f"$.data: {_ProblemError('an array', _glimpse(data))}")
        return audiences
    for first, plain, rows in parts(data, problems, step=step):
        yield
        audiences += plain
        size = 0
        for index, row in enumerate(rows, first):
            size += len(row)
            if size > step:
                yield
                size = len(row)
            try:
                audiences.append(_structure(_record(row), Audience))
            except Exception:  # noqa: BLE001 - cattrs raises whatever its hooks raise; a second pass finds what and where
                problems += _problems_of(row, f"$.data[{index}]")
                if len(problems) >= MAX_PROBLEMS:
                    return audiences
    return audiences


def _problems_of(row: Raw, path: str) -> list[str]:
    """Return the problems of an invalid record with their paths, in a second, detailed pass."""
    try:
        _structure_detailed()(_record(row), Audience)
    except ValidationError:
        found = [f"{path}{below}: {problem}" for below, problem in _numbers_out_of_range(row)]
        return found or [f"{path}: has a number out of range"]  # in a duplicate member
    except _NOT_JSON as error:
        return [f"{path}: {_reason(error)}"]
    except _ProblemError as problem:
        return [f"{path}{problem.below}: {problem}"]
    except BaseValidationError as group:
        messages = transform_error(group, path, _message)
        return [f"{where}: {what}" for what, _, where in (line.rpartition(" @ ") for line in messages)]
    return [f"{path}: cannot be read"]  # only in the first pass, but it must not be lost


def _record(row: Raw) -> Any:
    """Decode a record.

    Raises:
        ValidationError: A number in the record is out of range.
        RecursionError: The record is nested too deeply.
    """
    value = _any(row)
    opened = bytes(row).count(b"[") + bytes(row).count(b"{")
    if opened > _MAX_DEPTH and _is_deep(value):
        raise RecursionError
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [below for each in level for below in _children(each)]
    return bool(level)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _numbers_out_of_range(row: Raw) -> Iterator[tuple[str, _ProblemError]]:
    """Yield the fields of a record with a number that no Python number can hold."""
    fields = _fields(row) if bytes(row).startswith(b"{") else {"": row}
    for name, value in fields.items():
        try:
            _any(value)
        except ValidationError:
            yield f".{name}" if name else "", _ProblemError("a number in range", _OUT_OF_RANGE)


def _message(error: BaseException, _: Any) -> str:
    return str(error) if isinstance(error, _ProblemError) else "missing"


@contextmanager
def _readable(text: bytes) -> Iterator[None]:
    """Report invalid JSON as a problem at `$`."""
    try:
        yield
    except _NOT_JSON as error:
        reason = _reason(error) if text else "the body is empty"
        raise _invalid([f"$: {reason}"], text) from None


def _reason(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not JSON: not UTF-8: {error.reason}"
        case RecursionError():
            return "not JSON: nested too deeply"
        case _:
            return f"not JSON: {error}"


def _glimpse(sent: bytes | Raw) -> Any:
    """Decode a value; the content of an array or an object is left out."""
    text = bytes(_value(sent))
    try:
        return [] if text.startswith(b"[") else {} if text.startswith(b"{") else _any(text)
    except ValidationError:
        return _OUT_OF_RANGE


def _invalid(problems: list[str], body: bytes) -> InvalidResponseError:
    return InvalidResponseError("the reply cannot be read", problems=tuple(problems), body=body[:_KEPT])


def _status(status: Any) -> int:
    # Documented as a string in a 200 and as an integer in errors; both occur.
    if isinstance(status, str) and _STATUS.fullmatch(status):
        status = int(status)
    if type(status) is not int or not 100 <= status <= 599:
        raise _ProblemError("an HTTP status", status)
    return status


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
        return date_and_time(_string(value, None))
    except (ValueError, OverflowError):
        raise _ProblemError("a date and time in ISO 8601", value) from None


def _read(hook: Callable[[Any, Any], _T], value: Any) -> _T | None:
    try:
        return hook(value, None)
    except _ProblemError:
        return None


def _shown(value: Any) -> str:
    """Return a value for a message: whole or not at all, so that no part of a secret ever shows."""
    match value:
        case None | bool():
            return json.dumps(value)
        case str() if len(value) > _LONGEST_TEXT:
            return f"a string of {len(value)} characters"
        case float() if value == _OUT_OF_RANGE:
            return "a number out of range"
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
    """Return a hook that reads a record as *cls*: strict for documented fields, with all others in ``extra``."""
    documented = [attribute.name for attribute in attrs.fields(cls) if attribute.name in _STRICT]
    known = frozenset({*documented, "type"})
    overrides: dict[str, Any] = {name: override(struct_hook=_STRICT[name]) for name in documented}
    overrides["extra"] = override(rename=_EXTRA, struct_hook=lambda value, _: value)
    structure = make_dict_structure_fn(cls, converter, **overrides)

    def hook(sent: dict[str, Any], _: Any) -> Any:
        if sent.keys() == known:
            return structure(sent, cls)
        beyond = {name: value for name, value in sent.items() if name not in known}
        return structure({**sent, _EXTRA: beyond or NOTHING}, cls)

    return hook


def _unknown(sent: dict[str, Any]) -> UnknownAudience:
    return UnknownAudience(
        type=sent["type"],
        id=_read(_non_empty_string, sent.get("id")),
        name=_read(_string, sent.get("name")),
        created_time=_read(_utc, sent.get("created_time")),
        raw=sent,
    )


def configure_converter(converter: Converter) -> None:
    """Register hooks that read and write audiences and responses as this package does.

    Without them, cattrs leaves out an audience's ``type``, which is not a field.

    Args:
        converter: A cattrs converter of your own. `Audience` is the union that it can then read; an audience is
            written as by its ``to_dict()``, and a response as the service's envelope.
    """
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
    for cls in (StaticAudience, DynamicAudience, UnknownAudience):
        converter.register_unstructure_hook(cls, cls.to_dict)
    converter.register_unstructure_hook(Audience, lambda audience: audience.to_dict())
    converter.register_structure_hook(AudiencesResponse, lambda sent, _: _response(sent, converter))
    converter.register_unstructure_hook(AudiencesResponse, _envelope_of)


def _response(sent: Mapping[str, Any], converter: Converter) -> AudiencesResponse:
    audiences = converter.structure(sent["data"], tuple[Audience, ...])
    return AudiencesResponse(_status(sent["status"]), description_of(sent), response_time_of(sent), audiences)


def _envelope_of(response: AudiencesResponse) -> dict[str, Any]:
    time = None if response.response_time is None else iso_with_z(response.response_time)
    named = {"status": response.status, "description": response.description, "response_time": time}
    return named | {"data": [audience.to_dict() for audience in response]}


def _converter(*, detailed: bool) -> Converter:
    converter = Converter(detailed_validation=detailed)
    configure_converter(converter)
    return converter


# At import, so that no request pays for it.
_structure: Final[_Hook] = _converter(detailed=False).get_structure_hook(Audience)


@cache
def _structure_detailed() -> _Hook:
    # On the first invalid body, to keep start-up fast.
    return _converter(detailed=True).get_structure_hook(Audience)
