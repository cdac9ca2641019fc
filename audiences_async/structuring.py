"""The body of a 200 into models, by cattrs: strict, with the path of everything that is wrong.

The shape is the service's own: https://api.commbox.io/ (GET /audiences).

The converter has two hooks for audiences. The union hook is the reference: it reads one record, whatever that holds.
The hook for many reads *plain* records, of the documented fields alone, whose types msgspec has checked; that is what
the service sends, and costs a fifth. What is not plain takes the reference, a piece of the body at a time.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import attrs
from cattrs import BaseValidationError, Converter, transform_error
from cattrs.gen import make_dict_structure_fn, override
from msgspec import UNSET, Meta, MsgspecError, Raw, Struct, UnsetType, ValidationError
from msgspec.json import Decoder

from audiences_async.dates import date_and_time, in_utc
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
_Many: TypeAlias = tuple[Audience, ...]

MAX_PROBLEMS: Final = 20
"""As many problems of one body are told; a body of 100,000 wrong records must not hold the event loop."""

_AT_ONCE: Final = 128 * 1024  # bytes that are decoded at a stretch: a millisecond for plain records, four for others
_SHOWN_TEXT: Final = 40
_BOM: Final = b"\xef\xbb\xbf"
_NOT_JSON: Final = (MsgspecError, UnicodeDecodeError, RecursionError)
# What msgspec takes for a time it reads alike, with two exceptions: it rounds to microseconds, which are cut off
# here, and takes a T and a Z in lower case. Each pattern begins with a character that `re` finds fast.
_BEYOND_MICROSECONDS: Final = re.compile(rb"\.[0-9]{7}").search
_LOWER_T: Final = re.compile(rb"-[0-9]{2}t").search
_LOWER_Z: Final = re.compile(rb'z(?<=[0-9]z)"').search
_ANY_OF_IT_ESCAPED: Final = re.compile(rb"\\u00(?:00|2[DdEe]|3[0-9]|7[4Aa])").search
_SEEMING_END: Final = re.compile(rb"\}[ \t\n\r]*,").search
_STATUS: Final = re.compile(r"[1-5][0-9]{2}")
_ABSENT: Final = Raw()
_MUCH: Final = 1024 * 1024  # bytes that may become many times as many
_SHORTEST: Final = len('{"type":"a"},')  # bytes of an audience
# Carries the fields beyond the documented ones to `extra`. cattrs writes it into source code: no quotes, no control
# characters. A field of the service with this very name is in `extra` like any other.
_EXTRA: Final = "audiences_async:extra"
_MAX_DEPTH: Final = 200  # of an undocumented value; the JSON parser's own limit depends on the Python and its stack


class _ProblemError(ValueError):
    """What was expected of a value and what came, ``...`` for nothing; and where below the place that cattrs knows."""

    def __init__(self, expected: str, value: Any, below: str = "") -> None:
        super().__init__("missing" if value is ... else f"expected {expected}, got {_shown(value)}")
        self.below = below


class _OutOfRange(float):
    """Stands for a number in JSON that no Python number can hold."""

    def __repr__(self) -> str:
        return "a number out of range"


_OUT_OF_RANGE: Final = _OutOfRange("inf")


def decode(body: bytes) -> AudiencesResponse:
    """The audiences in the body of a 200.

    Args:
        body: UTF-8 JSON, with or without a byte order mark.

    Raises:
        StatusError: The envelope's own status is 300 or more.
        InvalidResponseError: It is not JSON, or breaks the schema; every problem (up to 20) is told with its path.
    """
    response = decode_plain(body)
    return whole(decoding(body)) if response is None else response


def whole(steps: Generator[None, None, _T]) -> _T:
    """The result of what is done in steps, at a stretch."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result


def decode_plain(body: bytes) -> AudiencesResponse | None:
    """As `decode`, of a body that is not large and has nothing but plain records in it; ``None`` for any other."""
    if len(body) > _AT_ONCE or not _has_plain_times(body):
        return None
    try:
        envelope = _plain_envelope(body)
        status = _status(envelope.status)
        time = None if envelope.response_time is None else in_utc(envelope.response_time)
        data = _structure_many(envelope.data, _Many)
    except Exception:  # noqa: BLE001 - the reference tells what is wrong, if anything
        return None
    return AudiencesResponse(status, envelope.description or "", time, data) if status < 300 else None


def decoding(body: bytes) -> Generator[None, None, AudiencesResponse]:
    """As `decode`, in steps of a few milliseconds at most, for a body of any size."""
    text = body.removeprefix(_BOM)
    problems: list[str] = []
    yield
    with _readable(text):
        if not text.isascii():
            text.decode()  # also what is not looked at below, such as a member that comes once more
            yield
        envelope, data = _envelope(text, problems)
        audiences = yield from _audiences(data, problems)
    if len(problems) >= MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = ["$: there may be more; these are the first"]
    if problems:
        raise _invalid(problems, text)
    return attrs.evolve(envelope, data=tuple(audiences))


def parse(body: bytes) -> Any:
    """JSON as Python values, integers of any size kept.

    Raises:
        InvalidResponseError: It is empty, not UTF-8, not JSON, or nested too deeply.
    """
    with _readable(body):
        return _any(body.removeprefix(_BOM))


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


class _Record(Struct, forbid_unknown_fields=True, gc=False):
    """A plain record."""

    type: Literal["Static", "Dynamic"]
    id: Annotated[str, Meta(min_length=1)]
    name: str
    created_time: datetime
    user_count: Annotated[int, Meta(ge=0)] | UnsetType = UNSET


class _Envelope(Struct, forbid_unknown_fields=True):
    """An envelope of plain records."""

    status: str | int
    data: list[_Record]
    description: str | None = None
    response_time: datetime | None = None


class _Members(Struct):
    """What an envelope has of the documented members, as it was sent; of any other, only that it is JSON."""

    status: Raw = _ABSENT
    description: Raw = _ABSENT
    response_time: Raw = _ABSENT
    data: Raw = _ABSENT


class _Typed(Struct, gc=False):
    """The least that an audience is."""

    type: Annotated[str, Meta(min_length=1)]


_any: Final = Decoder().decode
_elements: Final = Decoder(list[Raw]).decode
_typed: Final = Decoder(list[_Typed]).decode
_members: Final = Decoder(_Members).decode
_value: Final = Decoder(Raw).decode
_fields: Final = Decoder(dict[str, Raw]).decode
_plain_envelope: Final = Decoder(_Envelope).decode
_plain_records: Final = Decoder(list[_Record]).decode


def _envelope(text: bytes, problems: list[str]) -> tuple[AudiencesResponse, Raw]:
    """The envelope without its data; and these as they were sent."""
    members = _members_of(text)
    named = {"status": members.status, "description": members.description, "response_time": members.response_time}
    sent = {name: _glimpse(value) for name, value in named.items() if value}
    status = 0
    try:
        status = _status(sent.get("status", ...))
    except _ProblemError as problem:
        problems.append(f"$.status: {problem}")
    if status >= 300:
        raise status_error(status, description_of(sent), response_time=response_time_of(sent), body=text)
    if not isinstance(sent.get("description"), str | None):
        problems.append(f"$.description: {_ProblemError('a string', sent['description'])}")
    return AudiencesResponse(status, description_of(sent), response_time_of(sent), ()), members.data


def _members_of(text: bytes) -> _Members:
    try:
        return _members(text)
    except ValidationError:
        raise _invalid([f"$: {_ProblemError('an object', _glimpse(text))}"], text) from None


def _audiences(data: Raw, problems: list[str]) -> Generator[None, None, list[Audience]]:
    """The audiences, or their problems, some at a time."""
    audiences: list[Audience] = []
    array = memoryview(data)
    if bytes(array[:1]) != b"[":
        problems.append("$.data: missing" if not data else f"$.data: {_ProblemError('an array', _glimpse(data))}")
        return audiences
    first, start = 0, 1
    while start < len(array) and len(problems) < MAX_PROBLEMS:
        plain, others, start = yield from _part(array, start, first, problems)
        if not (plain or others):
            break  # there are none at all, or the part was refused as a whole
        audiences += plain
        for index, piece in _pieces(others, first + len(plain)):
            yield
            audiences += _piece(piece, index, problems)
            if len(problems) >= MAX_PROBLEMS:
                break
        first += len(plain) + len(others)
    return audiences


def _part(
    array: memoryview, start: int, first: int, problems: list[str]
) -> Generator[None, None, tuple[Sequence[Audience], Sequence[Raw], int]]:
    """The next audiences, or all as they were sent where any is not plain; and where the array goes on.

    The part ends where a record seems to end. If none does, as within a text that has a brace, it is no array by
    itself, and a longer one is tried; if it is an array, it has the very records that the whole has there.
    """
    size = _AT_ONCE
    while True:
        yield
        end = _SEEMING_END(array, start + size)
        stop, further = (end.start() + 1, end.end()) if end else (len(array) - 1, len(array))
        part = b"".join((b"[", array[start:stop], b"]"))
        plain = _plain(part) if size == _AT_ONCE else None
        if plain is not None:
            return plain, (), further
        try:
            return (), _rows(part, first, problems), further
        except InvalidResponseError:
            if end is None:
                raise
        size *= 2


def _rows(part: bytes, first: int, problems: list[str]) -> Sequence[Raw]:
    """The records of a part, as they were sent.

    Raises:
        InvalidResponseError: It is no array by itself.
    """
    with _readable(part):
        # So many values, each of which would be kept apart, are no audiences, or not all of them.
        if len(part) > _MUCH and part.count(b",") * _SHORTEST > len(part):
            try:
                _typed(part)
            except ValidationError as error:
                what, _, where = str(error).partition(" - at `$[")
                index, _, below = where.removesuffix("`").partition("]")
                problems.append(f"$.data[{first + int(index)}]{below}: {what}")
                return ()
        return _elements(part)


def _pieces(rows: Sequence[Raw], first: int) -> Iterator[tuple[int, Sequence[Raw]]]:
    """As many rows at a time as are not too long together, and the index of the first of them."""
    if len(rows) > 1 and sum(map(len, rows)) > 2 * _AT_ONCE:
        half = len(rows) // 2
        yield from _pieces(rows[:half], first)
        yield from _pieces(rows[half:], first + half)
    elif rows:
        yield first, rows


def _plain(part: bytes) -> Sequence[Audience] | None:
    """The audiences in an array that has nothing but plain records in it; ``None`` for any other."""
    try:
        return _structure_many(_plain_records(part), _Many) if _has_plain_times(part) else None
    except Exception:  # noqa: BLE001 - the reference tells what is wrong, if anything
        return None


def _piece(rows: Sequence[Raw], first: int, problems: list[str]) -> Sequence[Audience]:
    """The audiences of some rows, the first of which has the index *first*; or their problems."""
    plain = _plain(b"[%b]" % b",".join(rows))
    if plain is not None:
        return plain
    audiences: list[Audience] = []
    for index, row in enumerate(rows, first):
        try:
            audiences.append(_structure(_record(row), Audience))
        except Exception:  # noqa: BLE001 - cattrs raises what its hooks raise; the second look tells what and where
            problems += _problems_of(row, f"$.data[{index}]")
            if len(problems) >= MAX_PROBLEMS:
                break
    return audiences


def _problems_of(row: Raw, path: str) -> list[str]:
    """The second look, at a record that is known to be wrong: what is wrong, and where."""
    try:
        _structure_detailed()(_record(row), Audience)
    except ValidationError:
        found = [f"{path}{below}: {problem}" for below, problem in _numbers_out_of_range(row)]
        return found or [f"{path}: has a number out of range"]  # in a member that comes once more
    except _NOT_JSON as error:
        return [f"{path}: {_reason(error)}"]
    except _ProblemError as problem:
        return [f"{path}{problem.below}: {problem}"]
    except BaseValidationError as group:
        told = transform_error(group, path, lambda error, _: _told(error))
        return [f"{where}: {what}" for what, _, where in (line.rpartition(" @ ") for line in told)]
    return [f"{path}: cannot be read"]  # at the first look; it must not be lost


def _record(row: Raw) -> Any:
    """Decode a record.

    Raises:
        ValidationError: A number in it is out of range.
        RecursionError: It is nested too deeply.
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
    """Find the fields of a record that hold a number which no Python can hold."""
    fields = _fields(row) if bytes(row).startswith(b"{") else {"": row}
    for name, value in fields.items():
        try:
            _any(value)
        except ValidationError:
            yield f".{name}" if name else "", _ProblemError("a number in range", _OUT_OF_RANGE)


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, _ProblemError) else "missing"


@contextmanager
def _readable(text: bytes) -> Iterator[None]:
    """What is no JSON is a problem at the root."""
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
    """A value where it does not matter what an array or an object has in it."""
    text = bytes(_value(sent))
    try:
        return [] if text.startswith(b"[") else {} if text.startswith(b"{") else _any(text)
    except ValidationError:
        return _OUT_OF_RANGE


def _invalid(problems: list[str], body: bytes) -> InvalidResponseError:
    return InvalidResponseError("the reply cannot be read", problems=tuple(problems), body=body[: 64 * 1024])


def _status(status: Any) -> int:
    # Documented as a string in a 200 and as an integer in errors; both come.
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
    documented = [attribute.name for attribute in attrs.fields(cls) if attribute.name in _STRICT]
    known = frozenset({*documented, "type"})
    overrides: dict[str, Any] = {name: override(struct_hook=_STRICT[name]) for name in documented}
    overrides["extra"] = override(rename=_EXTRA, struct_hook=lambda value, _: value)
    structure = make_dict_structure_fn(cls, converter, **overrides)

    def hook(sent: dict[str, Any], _: Any) -> Any:
        if len(sent) == len(known):
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


def _twin(cls: type[Any]) -> type[Any]:
    """A class of the same layout that is not frozen; what it makes then becomes a *cls*.

    A frozen ``__init__`` takes the long way around its own class for each field, and three times as long.
    """
    names = [attribute.name for attribute in attrs.fields(cls)]
    return attrs.make_class(cls.__name__, names, slots=True, weakref_slot=False, eq=False, repr=False)


_Static: Final = _twin(StaticAudience)
_Dynamic: Final = _twin(DynamicAudience)


def _many_hook(records: Sequence[_Record], _: Any) -> tuple[Audience, ...]:
    audiences: list[Any] = []
    for plain in records:
        time, count = plain.created_time, plain.user_count
        if time.tzinfo is not UTC:
            time = in_utc(time)
        if plain.type == "Static":
            if count is UNSET:
                raise _ProblemError("an integer", ...)
            audience = _Static(plain.id, plain.name, time, count, NOTHING)
            audience.__class__ = StaticAudience
        else:
            extra = NOTHING if count is UNSET else {"user_count": count}
            audience = _Dynamic(plain.id, plain.name, time, extra)
            audience.__class__ = DynamicAudience
        audiences.append(audience)
    return tuple(audiences)


def _has_plain_times(text: bytes) -> bool:
    """Whether msgspec reads every time in it as `_utc` does, or not at all."""
    if _BEYOND_MICROSECONDS(text) or _LOWER_T(text) or _LOWER_Z(text):
        return False
    return b"\\" not in text or _ANY_OF_IT_ESCAPED(text) is None


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
    converter.register_structure_hook_func(lambda kind: kind == _Many, _many_hook)
    return converter


_CONVERTER: Final = _converter(detailed=False)
# Looked up now, so that no request pays for it.
_structure: Final[_Hook] = _CONVERTER.get_structure_hook(Audience)
_structure_many: Final[_Hook] = _CONVERTER.get_structure_hook(_Many)


@cache
def _structure_detailed() -> _Hook:
    # Made for the first body that is wrong: no program's start pays for it.
    return _converter(detailed=True).get_structure_hook(Audience)
