"""Write audiences to stdout: a table for terminals, NDJSON, JSON or CSV for programs. Messages go to stderr."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal, TextIO, TypeAlias, cast

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiences_async.cli import cells
from audiences_async.errors import printable
from audiences_async.models import Audience, AudiencesResponse

Format: TypeAlias = Literal["table", "json", "ndjson", "csv"]


def write(response: AudiencesResponse, output: Format | None) -> None:
    """Write the audiences to stdout; ``None`` means a table on a terminal and NDJSON elsewhere."""
    if output is None:
        output = "table" if sys.stdout.isatty() else "ndjson"
    if output == "table":
        Console().print(table(("", response)))
        return
    # Bytes, because data is UTF-8 in any locale.
    sys.stdout.buffer.write(_FORMATS[output](audience.to_dict() for audience in response))
    sys.stdout.buffer.flush()


class _Notices(io.TextIOBase):
    """A stderr that ignores write errors, so that a lost terminal never stops a job."""

    def write(self, text: str) -> int:
        """Write *text*; errors are ignored."""
        self._try(lambda stderr: stderr.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush stderr; errors are ignored."""
        self._try(lambda stderr: stderr.flush())

    def isatty(self) -> bool:
        """Return whether stderr is a terminal."""
        return sys.stderr.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override] # what rich reads
        """Encoding of stderr."""
        return sys.stderr.encoding

    def _try(self, write: Callable[[TextIO], object]) -> None:
        try:
            write(sys.stderr)
        except OSError:
            # The terminal is gone or the disk is full. Keep the interpreter from writing again at exit.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def notices() -> TextIO:
    """Return stderr for messages to the user; write errors are ignored."""
    return cast("TextIO", _Notices())


def notify(text: str) -> None:
    """Write a line to stderr for the user."""
    print(text, file=notices(), flush=True)


def table(*replies: tuple[str, AudiencesResponse]) -> Table:
    """Return a table of the audiences of one account, or of several with their names."""
    named = any(name for name, _ in replies)
    result = Table()
    for name in (*(["account"] if named else []), "id", "name", "type", "created", "users"):
        result.add_column(name, overflow="fold", justify="right" if name == "users" else "left")
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
    # Text, because a plain string would be parsed as rich markup.
    return Text(printable(value, limit=len(value)))


def _ndjson(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in records)


def _json(records: Iterable[Mapping[str, Any]]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(list(records))) + b"\n"


def _csv(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return one column per documented field; all other fields are JSON in the last column."""
    return cells.encode([[*cells.AUDIENCE, "extra"], *map(cells.of_audience, records)])


_FORMATS: Final[Mapping[Format, Callable[[Iterable[Mapping[str, Any]]], bytes]]] = {
    "json": _json,
    "ndjson": _ndjson,
    "csv": _csv,
}
