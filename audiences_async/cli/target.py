"""The output of a job: its file, its format, and the checkpoint that it is made from."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final, Literal, TypeAlias

import msgspec
from attrs import field, frozen

from audiences_async._jobs import compression
from audiences_async._jobs.outcome_files import Line, check_new, lines, successor, write_whole
from audiences_async.cli import cells, parquet
from audiences_async.cli.rows import COLUMNS, rows
from audiences_async.errors import ConfigurationError, printable

FileFormat: TypeAlias = Literal["ndjson", "json", "csv", "parquet"]

_BY_NAME: Final[Mapping[str, FileFormat]] = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def format_of(out: Path) -> FileFormat:
    """Return the format that the file's name asks for; NDJSON if it asks for none."""
    named = out.with_suffix("") if compression.is_compressed(out) else out
    return _BY_NAME.get(named.suffix.lower(), "ndjson")


@frozen
class Target:
    """Where a job's outcomes go.

    Attributes:
        out: The output file; a name that ends in ``.gz`` or ``.zst`` selects a compression.
        output: Its format.
        rows: Whether it has one row for each audience; always so for Parquet.
    """

    out: Path = field()
    output: FileFormat = "ndjson"
    rows: bool = False

    @out.validator
    def _check_out(self, _: object, out: Path) -> None:
        if not out.name:
            raise ConfigurationError(f"--out must name a file, got {printable(str(out))}")

    @property
    def is_checkpoint(self) -> bool:
        """Whether outcomes are appended to the output itself."""
        return self.output == "ndjson" and not self.rows

    @property
    def checkpoint(self) -> Path:
        """The NDJSON file that outcomes are appended to: the output itself, or a file beside it."""
        return self.out if self.is_checkpoint else self.out.with_name(f"{self.out.name}.ndjson")

    def check(self, *, resume: bool) -> None:
        """Refuse an output that could not be written at the end, or must not be replaced.

        Raises:
            ConfigurationError: An extra is missing, the options do not fit together, a file is not a regular one, or
                the output already exists and was not written by this command from the checkpoint.
            OSError: The directory is not writable.
        """
        self._check_format()
        if not resume:
            check_new(self.out)
        if self.is_checkpoint:
            return
        for each in (self.out, self.checkpoint):
            if each.exists() and not each.is_file():
                problem = f"{printable(str(each))} is not a regular file"
                raise ConfigurationError(f"{problem}; use --output ndjson without --rows, or another file")
        if self.out.exists() and self.out.stat().st_size and not (self.checkpoint.is_file() and self._is_ours()):
            problem = (
                f"{printable(str(self.out))} was not written from {printable(self.checkpoint.name)} by this command"
            )
            raise ConfigurationError(f"{problem}; choose another file, or --output ndjson to continue NDJSON in it")
        folder = self.out.resolve().parent
        if not folder.is_dir():
            raise FileNotFoundError(2, "No such directory", str(folder))
        with TemporaryFile(dir=folder):
            pass

    def convert(self) -> None:
        """Write the output from the checkpoint, atomically; no effect if it is the checkpoint.

        JSON is an array of the lines' objects. CSV has one row for each audience; an account without audiences has one
        with only its name, and a failed account one with its error in the last column. With *rows*, and in Parquet,
        there is a row for each audience and none for such accounts.
        """
        if self.output == "parquet":
            with successor(self.out.resolve(), like=self.checkpoint) as file:
                parquet.write(file, rows(lines(self.checkpoint)))
        elif not self.is_checkpoint:
            chunks = _CHUNKS[self.output, self.rows]
            write_whole(self.out, chunks(lines(self.checkpoint)), like=self.checkpoint)

    def _check_format(self) -> None:
        compression.check_available(self.out)
        if self.output == "json" and self.rows:
            raise ConfigurationError("--rows cannot be combined with JSON; use ndjson, csv or parquet")
        if self.output == "parquet":
            parquet.check_available()
            if compression.is_compressed(self.out):
                problem = f"Parquet is compressed inside, so its name must not end in {self.out.suffix}"
                raise ConfigurationError(f"{problem}: {printable(str(self.out))}")

    def _is_ours(self) -> bool:
        """Return whether the output begins as `convert` writes it."""
        if self.output == "parquet":
            return parquet.is_ours(self.out)
        try:
            start = b"".join(islice(compression.lines(self.out), 2))
        except compression.UnreadableError:
            return False
        return _STARTS[self.output, self.rows].match(start) is not None


def _as_json(outcomes: Iterable[Line]) -> Iterator[bytes]:
    separator = b"[\n"
    for outcome in outcomes:
        yield separator + outcome.text.rstrip(b"\n")
        separator = b",\n"
    yield b"\n]\n"


def _as_csv(outcomes: Iterable[Line]) -> Iterator[bytes]:
    yield _HEADER
    for outcome in outcomes:
        decoded = msgspec.json.decode(outcome.text)
        account = cells.cell(outcome.account)
        error = "" if outcome.ok else cells.cell(decoded["error"]["message"])
        yield cells.encode([account, *cells.of_audience(audience), error] for audience in decoded["audiences"] or [{}])


def _rows_as_ndjson(outcomes: Iterable[Line]) -> Iterator[bytes]:
    for row in rows(outcomes):
        yield msgspec.json.encode(dict(zip(COLUMNS, row, strict=True))) + b"\n"


def _rows_as_csv(outcomes: Iterable[Line]) -> Iterator[bytes]:
    yield _ROWS_HEADER
    for row in rows(outcomes):
        yield cells.encode([[cells.cell(value) for value in row]])


_HEADER: Final = cells.encode([["account", *cells.AUDIENCE, "extra", "error"]])
_ROWS_HEADER: Final = cells.encode([COLUMNS])
_CHUNKS: Final[Mapping[tuple[FileFormat, bool], Callable[[Iterable[Line]], Iterator[bytes]]]] = {
    ("json", False): _as_json,
    ("csv", False): _as_csv,
    ("ndjson", True): _rows_as_ndjson,
    ("csv", True): _rows_as_csv,
}
# How the files begin that `convert` writes.
_STARTS: Final[Mapping[tuple[FileFormat, bool], re.Pattern[bytes]]] = {
    ("json", False): re.compile(rb'\[\n\{"account":'),
    ("csv", False): re.compile(re.escape(_HEADER)),
    ("ndjson", True): re.compile(rb'\{"account":"(?:[^"\\]|\\.)*","fetched_at":'),
    ("csv", True): re.compile(re.escape(_ROWS_HEADER)),
}
