"""Rows of account files in CSV, NDJSON and TOML, each with its place. A row that cannot be read is a problem."""

import csv
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO, Final, NamedTuple

from attrs import field, frozen

from audiences_async.errors import printable

KEY_FIELDS: Final[tuple[str, ...]] = ("api_key", "api_key_env", "api_key_from")
"""Fields of which an account needs one."""

FIELDS: Final[tuple[str, ...]] = ("name", *KEY_FIELDS)
"""Fields that are read; others are ignored."""

_SEPARATORS: Final[Mapping[str, str]] = {",": "commas", ";": "semicolons", "\t": "tabs"}
_TOML_TABLE: Final = re.compile(r"\s*\[\[\s*accounts\s*\]\]")
_TOML_FIELD: Final = re.compile(rf"\s*({'|'.join(FIELDS)})\s*=")
_TOML_PLACE: Final = re.compile(r" \(at (line \d+, column \d+|end of document)\)$")
_SEPARATOR_LINE: Final = re.compile(r'"?sep=(.|\t)?"?', re.IGNORECASE)
# What a spreadsheet makes of a long number, whose digits are lost; what it shows for an error, or in a narrow column.
_SHORTENED: Final = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE)
_ERROR_VALUE: Final = re.compile(
    r"#(DIV/0!|N/A|NV|NAME\?|(REF|VALUE|NUM|NULL|SPILL|CALC|BEZUG|WERT|ZAHL|ÜBERLAUF)!|#{3,})"
)
_NOT_UTF_8: Final = "is not UTF-8 text; a spreadsheet writes it as 'CSV UTF-8'"
_CSV_ERRORS: Final[Mapping[str, str]] = {
    "unexpected end of data": "a quote is opened here and never closed",
    "field limit": "a quote is opened here and not closed within 131,072 characters",
    "expected after": "a text goes on after the quote that ends it; is a quote missing, or not doubled?",
}
_REREADS: Final = 20  # of rows with a stray quote, each of which may be as long as the file
# If the header is missing, the first line may contain a key: only words that headers are made of are repeated.
_HEADER_WORDS: Final = frozenset({
    "account", "accounts", "api", "apikey", "bearer", "client", "comment", "company", "customer", "email", "env",
    "environment", "from", "id", "key", "keys", "label", "name", "names", "note", "notes", "number", "secret", "title",
    "token", "user", "variable",
})  # fmt: skip


class Problem(NamedTuple):
    """A problem and its place in the file; the place is empty if it concerns the whole file."""

    place: str
    text: str


@frozen
class Row:
    """One account's fields and their place in the file.

    Attributes:
        number: Index of the account, from 0.
        line: Line of the file, from 1; 0 if unknown.
        columns: Line and column of each field, from 1. The column counts characters, or fields in a CSV file.
        fields: Field values; never printed.
        offset: Byte at which it begins; 0 if unknown.
    """

    number: int
    line: int
    columns: Mapping[str, tuple[int, int]]
    fields: Mapping[str, Any] = field(repr=False)
    offset: int = 0

    def at(self, name: str) -> str:
        """Return the place of a field."""
        if name in self.columns:
            line, column = self.columns[name]
            return f"line {line}, column {column} ({name})"
        return f"{self.place} ({name})"

    @property
    def place(self) -> str:
        """The place of the account."""
        return f"line {self.line}" if self.line else f"accounts[{self.number}]"


@frozen
class Header:
    """The first line of a CSV file.

    Attributes:
        separator: What separates its columns.
        names: The columns, in lower case and with underscores.
    """

    separator: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        names = map(_shown if self.problem() else printable, self.names)
        return f"CSV separated by {_SEPARATORS[self.separator]}, header: {', '.join(names)}"

    def problem(self) -> str:
        """Return what is wrong with it; empty if nothing is."""
        named = [name for name in self.names if name]
        if len(set(named)) < len(named):
            return "duplicate column name in the header"
        if "name" in named and set(KEY_FIELDS) & set(named):
            return ""
        expected = "the header needs a column 'name', and a column 'api_key', 'api_key_env' or 'api_key_from'"
        separators = "commas, semicolons or tabs"
        found = f"found {', '.join(map(_shown, self.names))}, separated by {_SEPARATORS[self.separator]}"
        return f"{expected}, separated by {separators}; {found}"


def read(file: Iterable[bytes], suffix: str) -> Iterator[Row | Problem]:
    """Yield the rows of a file's lines in the format of the suffix, and each problem in its place."""
    return _READERS[suffix](_Lines(file))


def layout(file: BinaryIO, suffix: str) -> str:
    """Return what the file is, for people: its format, and of CSV the separator and the header."""
    if suffix != ".csv":
        return "TOML" if suffix == ".toml" else "NDJSON"
    return str(_header(list(_start(_Lines(file)))))


def suffixes() -> tuple[str, ...]:
    """Return the file name extensions that are supported."""
    return tuple(_READERS)


def _shown(name: str) -> str:
    words = re.split(r"[\W_]+", name)
    return f"'{name}'" if words and _HEADER_WORDS.issuperset(words) else f"a text of {len(name)} characters"


class _Lines(Iterator[str]):
    """The lines, of which bytes that are not UTF-8 are surrogates.

    Attributes:
        number: Number of lines read so far.
        offset: Byte at which the next line begins.
    """

    def __init__(self, lines: Iterable[bytes]) -> None:
        self.number: int = 0
        self.offset: int = 0
        self._lines = iter(lines)
        self._row: list[bytes] | None = None  # the lines of a row, if it was begun

    def __next__(self) -> str:
        line = next(self._lines)
        text = line.decode("utf-8" if self.offset else "utf-8-sig", "surrogateescape")
        self.number += 1
        self.offset += len(line)
        if self._row is not None:
            self._row.append(line)
        return text

    def begin_row(self) -> None:
        """Note that a row begins with the next line."""
        self._row = []

    def go_back(self) -> None:
        """Have the row end with its first line, so that the next one is read again."""
        assert self._row is not None
        again = self._row[1:]
        self.number -= len(again)
        self.offset -= sum(map(len, again))
        self._lines = chain(again, self._lines)


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _start(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines up to the header: the first that is neither empty nor names the separator for a spreadsheet."""
    for line in lines:
        yield line
        if line.strip() and not _SEPARATOR_LINE.fullmatch(line.strip()):
            return


def _header(start: list[str]) -> Header:
    """Return the header; its separator is the one that makes a column of ``name``, or else the most frequent one."""
    text = start[-1].strip("\r\n") if start else ""
    headers = [Header(separator, _names(text, separator)) for separator in _SEPARATORS]
    return next((each for each in headers if "name" in each.names), max(headers, key=lambda each: len(each.names)))


def _names(text: str, separator: str) -> tuple[str, ...]:
    try:
        cells = next(csv.reader([text], delimiter=separator, strict=True), [])
    except csv.Error:
        cells = [text]
    return tuple(re.sub(r"[\s-]+", "_", cell.strip().casefold()) for cell in cells)


def _csv(lines: _Lines) -> Iterator[Row | Problem]:
    start = list(_start(lines))
    if not any(line.strip() for line in start):
        return
    header = _header(start)
    problem = header.problem() if _is_text(start[-1]) else _NOT_UTF_8
    if problem:
        yield Problem(f"line {len(start)}", problem)
        return
    columns = {name: number for number, name in enumerate(header.names, 1) if name}
    rows = (record for record in _records(lines, header) if isinstance(record, Problem) or any(record[2]))
    for number, record in enumerate(rows):
        if isinstance(record, Problem):
            yield record
            continue
        line, offset, cells = record
        # CSV leaves a field out by an empty cell.
        fields = {name: cells[column - 1] or None for name, column in columns.items()}
        yield Row(number, line, {name: (line, column) for name, column in columns.items()}, fields, offset)


def _records(lines: _Lines, header: Header) -> Iterator[tuple[int, int, list[str]] | Problem]:
    """Yield line, offset and cells of each row, or its mistake.

    If that may be a stray quote, which swallows the rows up to the next one, these are read again, one by one.
    """
    rereads = 0
    reader = csv.reader(lines, delimiter=header.separator, strict=True)
    while True:
        line, offset = lines.number + 1, lines.offset
        lines.begin_row()
        mistake: Problem | None
        try:
            cells = next(reader)
            mistake = _quote_mistake(line, cells, header)
        except StopIteration:
            return
        except csv.Error as error:
            mistake = Problem(f"line {line}", _described(error))
        if mistake is None:
            yield _cell_mistake(line, cells, header) or (line, offset, cells)
            continue
        yield mistake
        if lines.number > line and rereads < _REREADS:
            rereads += 1
            lines.go_back()
            reader = csv.reader(lines, delimiter=header.separator, strict=True)


def _described(error: csv.Error) -> str:
    return next((text for part, text in _CSV_ERRORS.items() if part in str(error)), str(error))


def _quote_mistake(line: int, cells: list[str], header: Header) -> Problem | None:
    """Return what is wrong with a row if a stray quote may be the cause."""
    expected = len(header.names)
    if cells and len(cells) != expected:
        place = f"line {line}, column {min(len(cells), expected) + 1}"
        return Problem(place, f"expected {expected} fields as in the header, got {len(cells)}")
    for column, cell in enumerate(cells, 1):
        if "\n" in cell and _swallows(column, cell, header):
            text = f"the cell has {cell.count(chr(10)) + 1} lines; is a quote missing?"
            return Problem(f"line {line}, column {column}", text)
    return None


def _swallows(column: int, cell: str, header: Header) -> bool:
    """Return whether a cell seems to be several rows, between a stray quote and the next one.

    A name or key has no separators. Any other cell may have a text with some; rows have as many as the columns demand.
    """
    if header.names[column - 1] in FIELDS:
        return header.separator in cell
    first, *rows, last = (line.count(header.separator) for line in cell.split("\n"))
    columns = len(header.names)
    return (first, last) == (columns - column, column - 1) and all(count == columns - 1 for count in rows)


def _cell_mistake(line: int, cells: list[str], header: Header) -> Problem | None:
    """Return what is wrong with a cell of a row."""
    for column, (name, cell) in enumerate(zip(header.names, cells, strict=False), 1):
        problem = ""
        if not _is_text(cell):
            problem = _NOT_UTF_8
        elif name in FIELDS and _SHORTENED.fullmatch(cell):
            problem = "a number that a spreadsheet has shortened; format the column as text, and enter it again"
        elif name in FIELDS and _ERROR_VALUE.fullmatch(cell):
            problem = "an error value of a spreadsheet"
        if problem:
            return Problem(f"line {line}, column {column}", problem)
    return None


def _ndjson(lines: _Lines) -> Iterator[Row | Problem]:
    index = offset = 0
    for number, line in enumerate(lines, 1):
        start, offset = offset, lines.offset
        if not line.strip():
            continue
        fields = _object(number, line)
        if isinstance(fields, Problem):
            yield fields
        else:
            columns = {name: (number, line.find(f'"{name}"') + 1) for name in FIELDS if name in fields}
            yield Row(index, number, columns, fields, start)
        index += 1


def _object(number: int, line: str) -> dict[str, Any] | Problem:
    """Return the JSON object in a line, or its problem."""
    if not _is_text(line):
        column = len(line.encode(errors="surrogateescape").decode(errors="replace").partition("\ufffd")[0]) + 1
        return Problem(f"line {number}, column {column}", "is not UTF-8 text")
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        return Problem(f"line {number}, column {error.colno}", error.msg)
    except RecursionError:
        return Problem(f"line {number}", "is nested too deeply")
    except ValueError:  # `int` limits the number of digits
        return Problem(f"line {number}", "has a number of too many digits")
    if not isinstance(fields, dict):
        return Problem(f"line {number}, column 1", f"expected an object, got {type(fields).__name__}")
    return fields


def _toml(lines: _Lines) -> Iterator[Row | Problem]:
    text = "".join(lines)
    accounts = _tables(text)
    if isinstance(accounts, Problem):
        yield accounts
        return
    places = _toml_places(text)
    for number, fields in enumerate(accounts):
        # Inline tables have no header line to find.
        line, columns = places[number] if len(places) == len(accounts) else (0, {})
        yield Row(number, line, columns, fields)


def _tables(text: str) -> list[dict[str, Any]] | Problem:
    """Return the tables of a TOML document, or its problem."""
    if not _is_text(text):
        line = next(number for number, line in enumerate(text.splitlines(), 1) if not _is_text(line))
        return Problem(f"line {line}", "is not UTF-8 text")
    try:
        accounts = tomllib.loads(text).get("accounts")
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        return Problem(place[1] if place else "", _TOML_PLACE.sub("", str(error)))
    except RecursionError:
        return Problem("", "is nested too deeply")
    except ValueError:  # `int` limits the number of digits
        return Problem("", "has a number of too many digits")
    if not isinstance(accounts, list) or not all(isinstance(account, dict) for account in accounts):
        return Problem("", "expected one [[accounts]] table for each account")
    return accounts


def _toml_places(text: str) -> list[tuple[int, dict[str, tuple[int, int]]]]:
    """Return the line and columns of each table; `tomllib` does not report them."""
    tables: list[tuple[int, dict[str, tuple[int, int]]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if _TOML_TABLE.match(line):
            tables.append((number, {}))
        elif tables and (found := _TOML_FIELD.match(line)):
            tables[-1][1].setdefault(found[1], (number, found.start(1) + 1))
    return tables


_READERS: Final[Mapping[str, Callable[[_Lines], Iterator[Row | Problem]]]] = {
    ".csv": _csv,
    ".ndjson": _ndjson,
    ".jsonl": _ndjson,
    ".toml": _toml,
}
