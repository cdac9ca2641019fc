"""Audiences on stdout: a table for people, NDJSON, JSON or CSV for programs."""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiences_async.errors import printable
from audiences_async.models import Audience, AudiencesResponse
from audiences_async.structuring import record

Format: TypeAlias = Literal["table", "json", "ndjson", "csv"]

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
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*_COLUMNS, "extra"])
    for row in records:
        extra = {name: value for name, value in row.items() if name not in _COLUMNS}
        writer.writerow([*(_cell(row.get(name)) for name in _COLUMNS), _cell(extra or None)])
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


_FORMATS: Final[Mapping[Format, Callable[[Iterable[Mapping[str, Any]]], bytes]]] = {
    "json": _json,
    "ndjson": _ndjson,
    "csv": _csv,
}
