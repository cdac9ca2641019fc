"""Audiences on stdout: a table for people, NDJSON, JSON or CSV for programs."""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiences_async.errors import printable
from audiences_async.models import Audience, AudiencesResponse
from audiences_async.results import Line, lines, write_whole
from audiences_async.structuring import record

Format: TypeAlias = Literal["table", "json", "ndjson", "csv"]
FileFormat: TypeAlias = Literal["ndjson", "json", "csv"]

_COLUMNS: Final = ("id", "name", "type", "created_time", "user_count")


def write(response: AudiencesResponse, output: Format | None) -> None:
    """Write the audiences to stdout; ``None`` means a table on a terminal and NDJSON elsewhere."""
    if output is None:
        output = "table" if sys.stdout.isatty() else "ndjson"
    if output == "table":
        Console().print(table(("", response)))
        return
    # Bytes: data is UTF-8 whatever the locale says.
    sys.stdout.buffer.write(_FORMATS[output](record(audience) for audience in response))
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def convert(outcomes: Path, out: Path, output: FileFormat) -> None:
    """Write the NDJSON *outcomes* in another format, whole or not at all; one account in memory at a time.

    JSON is an array of the same objects. CSV has one row for each audience; an account without audiences has one with
    nothing but its name, and one that failed has its error in the last column.
    """
    chunks = _accounts_as_json if output == "json" else _accounts_as_csv
    write_whole(out, chunks(lines(outcomes)))


def table(*replies: tuple[str, AudiencesResponse]) -> Table:
    """A table of the audiences of one account, or of several with their names."""
    named = any(name for name, _ in replies)
    result = Table(*(["account"] if named else []), "id", "name", "type", "created", "users")
    result.columns[-1].justify = "right"
    for name, response in replies:
        for audience in response:
            result.add_row(*([_text(name)] if named else []), *_cells(audience))
    return result


def _cells(audience: Audience) -> list[Text]:
    created = audience.created_time
    shown = (
        audience.id,
        audience.name,
        audience.type,
        None if created is None else f"{created:%Y-%m-%d %H:%M}",
        getattr(audience, "user_count", None),
    )
    return [_text("–" if value is None else str(value)) for value in shown]


def _text(value: str) -> Text:
    return Text(printable(value))  # Text, so that the service's words are never taken for rich's markup


def _ndjson(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in records)


def _json(records: Iterable[Mapping[str, Any]]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(list(records))) + b"\n"


def _csv(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One column for each documented field, and what goes beyond them as JSON in the last."""
    return _csv_rows([[*_COLUMNS, "extra"], *map(_csv_cells, records)])


def _csv_cells(row: Mapping[str, Any]) -> list[str]:
    extra = {name: value for name, value in row.items() if name not in _COLUMNS}
    return [*(_cell(row.get(name)) for name in _COLUMNS), _cell(extra or None)]


def _csv_rows(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _accounts_as_json(outcomes: Iterable[Line]) -> Iterator[bytes]:
    separator = b"[\n"
    for outcome in outcomes:
        yield separator + outcome.text.rstrip(b"\n")
        separator = b",\n"
    yield b"\n]\n"


def _accounts_as_csv(outcomes: Iterable[Line]) -> Iterator[bytes]:
    yield _csv_rows([["account", *_COLUMNS, "extra", "error"]])
    for outcome in outcomes:
        told = msgspec.json.decode(outcome.text)
        error = "" if outcome.ok else told["error"]["message"]
        audiences = told.get("audiences") or [{}]
        yield _csv_rows([outcome.account, *_csv_cells(audience), error] for audience in audiences)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


_FORMATS: Final[Mapping[Format, Callable[[Iterable[Mapping[str, Any]]], bytes]]] = {
    "json": _json,
    "ndjson": _ndjson,
    "csv": _csv,
}
