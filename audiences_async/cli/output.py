"""Write audiences to stdout: a table for terminals, NDJSON, JSON or CSV for programs."""

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final, Literal, TextIO, TypeAlias, cast

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiences_async._jobs.results import Line, lines, write_whole
from audiences_async.errors import ConfigurationError, printable
from audiences_async.models import Audience, AudiencesResponse

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


def check_target(path: Path, output: FileFormat, checkpoint: Path) -> None:
    """Refuse an output file that `convert` could not write or must not replace.

    Raises:
        ConfigurationError: *path* is not a regular file, or was not written by this command from *checkpoint*.
        OSError: Its directory is not writable.
    """
    for each in (path, checkpoint):
        if each.exists() and not each.is_file():
            raise ConfigurationError(
                f"{printable(str(each))} is not a regular file; use --output ndjson or another file"
            )
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            is_ours = file.read(len(_STARTS[output])) == _STARTS[output] and checkpoint.is_file()
        if not is_ours:
            problem = f"{printable(str(path))} was not written from {printable(checkpoint.name)} by this command"
            raise ConfigurationError(f"{problem}; choose another file")
    with TemporaryFile(dir=path.resolve().parent):
        pass


def convert(outcomes: Path, out: Path, output: FileFormat) -> None:
    """Write the NDJSON *outcomes* in another format, atomically, with one account in memory at a time.

    JSON is an array of the same objects. CSV has one row per audience. An account without audiences has one row with
    only its name, and a failed account has its error in the last column.
    """
    chunks = _accounts_as_json if output == "json" else _accounts_as_csv
    write_whole(out, chunks(lines(outcomes)), like=outcomes)


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
    yield _STARTS["csv"]
    for outcome in outcomes:
        decoded = msgspec.json.decode(outcome.text)
        error = "" if outcome.ok else decoded["error"]["message"]
        audiences = decoded.get("audiences") or [{}]
        yield _csv_rows([outcome.account, *_csv_cells(audience), error] for audience in audiences)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


# First bytes of the files that `convert` writes.
_STARTS: Final[Mapping[FileFormat, bytes]] = {
    "json": b'[\n{"account":',
    "csv": _csv_rows([["account", *_COLUMNS, "extra", "error"]]),
}
_FORMATS: Final[Mapping[Format, Callable[[Iterable[Mapping[str, Any]]], bytes]]] = {
    "json": _json,
    "ndjson": _ndjson,
    "csv": _csv,
}
