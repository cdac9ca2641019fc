"""Read accounts from TOML, CSV or NDJSON files, which are checked as a whole first."""

import csv
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from attrs import field, frozen

from audiences_async.errors import ConfigurationError, printable
from audiences_async.models import Account

_FIELDS: Final = ("name", "api_key", "api_key_env")
_TOML_TABLE: Final = re.compile(r"\s*\[\[\s*accounts\s*\]\]")
_TOML_FIELD: Final = re.compile(rf"\s*({'|'.join(_FIELDS)})\s*=")
_TOML_PLACE: Final = re.compile(r" \(at (line \d+, column \d+|end of document)\)$")


class AccountFile:
    """The accounts of a file. Iterable any number of times; ``len()`` is the number of accounts.

    Each account has a ``name`` and either ``api_key`` or ``api_key_env``, the name of an environment variable that
    holds the key; other fields are ignored. The file name's extension selects the format:

    - ``.csv``: a header line with the column names, then one line per account;
    - ``.ndjson`` or ``.jsonl``: one JSON object per line;
    - ``.toml``: one ``[[accounts]]`` table per account.

    Each iteration reads CSV and NDJSON line by line, with one account in memory at a time. TOML is read at once.

    Args:
        path: The file; UTF-8, with or without a byte order mark.
        with_keys: Whether to read the keys. Without them the environment variables need not be set, and the accounts
            are usable only for their names, as on the submitting side of a distributed job.

    Raises:
        ConfigurationError: The file cannot be read or has no accounts; an account is invalid; or two accounts have the
            same name. The message has the line and the column, and never a key.
    """

    def __init__(self, path: str | os.PathLike[str], *, with_keys: bool = True) -> None:
        self._path = Path(path)
        self._with_keys = with_keys
        if self._path.suffix.lower() not in _FORMATS:
            raise self._error("", f"unsupported file type; the name must end in one of {', '.join(_FORMATS)}")
        self._count = self._checked()

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self._path

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Account]:
        for _, account in self._accounts():
            yield account

    def _checked(self) -> int:
        """Check every account and return their number; names must be unique."""
        seen: dict[str, str] = {}
        for row, account in self._accounts():
            if account.name in seen:
                problem = f"duplicate name '{printable(account.name)}', first defined in {seen[account.name]}"
                raise self._error(row.at("name"), problem)
            seen[account.name] = row.place
        if not seen:
            raise self._error("", "contains no accounts")
        return len(seen)

    def _accounts(self) -> Iterator[tuple["_Row", Account]]:
        rows = self._rows()
        # Errors are raised here, where no frame holds a key in plain text: tracebacks may print locals.
        while (row := _advance(rows)) is not None:
            if isinstance(row, _Problem):
                raise self._error(row.place, row.text)
            account = _account(row, with_key=self._with_keys)
            if isinstance(account, _Problem):
                raise self._error(account.place, account.text)
            yield row, account

    def _rows(self) -> Iterator["_Row"]:
        with self._path.open("rb") as file:
            yield from _FORMATS[self._path.suffix.lower()](file)

    def _error(self, place: str, problem: str) -> ConfigurationError:
        where = f", {place}" if place else ""
        return ConfigurationError(f"{printable(str(self._path))}{where}: {problem}")


class _Problem(NamedTuple):
    """A problem and its place in the file; the place is empty if it concerns the whole file."""

    place: str
    text: str


class _MalformedError(Exception):
    """The file's syntax is invalid; the arguments are those of `_Problem`."""


@frozen
class _Row:
    """One account's fields and their place in the file.

    Attributes:
        number: Index of the account, from 0.
        line: Line of the file, from 1; 0 if unknown.
        columns: Line and column of each field, from 1. The column counts characters, or fields in a CSV file.
        fields: Field values; never printed.
    """

    number: int
    line: int
    columns: Mapping[str, tuple[int, int]]
    fields: Mapping[str, Any] = field(repr=False)

    def at(self, name: str) -> str:
        if name in self.columns:
            line, column = self.columns[name]
            return f"line {line}, column {column} ({name})"
        return f"{self.place} ({name})"

    @property
    def place(self) -> str:
        return f"line {self.line}" if self.line else f"accounts[{self.number}]"


def _advance(rows: Iterator[_Row]) -> _Row | _Problem | None:
    """Return the next row, or a problem; ``None`` at the end."""
    try:
        return next(rows, None)
    except _MalformedError as error:
        return _Problem(*error.args)
    except OSError as error:
        return _Problem("", f"cannot be read: {error.strerror or error}")
    except ValueError as error:  # a NUL in the path
        return _Problem("", f"cannot be read: {error}")


def _account(row: _Row, *, with_key: bool) -> Account | _Problem:
    """Return the account of a row, or its problem. Values are never repeated: a misplaced one may be a key."""
    fields = {name: row.fields[name] for name in _FIELDS if row.fields.get(name) is not None}
    for name, value in fields.items():
        if not isinstance(value, str):
            return _Problem(row.at(name), f"expected text, got {type(value).__name__}")
    problem = _name_problem(fields.get("name", ""))
    if problem:
        return _Problem(row.at("name"), problem)
    if not with_key:
        return Account(fields["name"], no_key)
    if ("api_key" in fields) == ("api_key_env" in fields):
        return _Problem(row.at("api_key"), "an account needs one of api_key and api_key_env")
    source = "api_key" if "api_key" in fields else "api_key_env"
    key = fields["api_key"] if source == "api_key" else _variable(fields["api_key_env"])
    try:
        return Account(fields["name"], key or "")
    except ConfigurationError as error:
        unset = key is None
        return _Problem(row.at(source), "names an environment variable that is not set" if unset else error.message)


def _variable(name: str) -> str | None:
    """Return an environment variable; ``None`` if it is unset or its name is invalid."""
    try:
        return os.environ.get(name)
    except ValueError:  # the name has a surrogate
        return None


def no_key() -> str:
    """Stand in for the key function of an account known only by name.

    Raises:
        LookupError: Always.
    """
    raise LookupError("keys are available on the workers only")


def _name_problem(name: str) -> str:
    if not name:
        return "an account needs a name"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "has a character that UTF-8 cannot encode"
    return ""


def _lines(file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _MalformedError(f"line {number}, column {error.start + 1}", "is not UTF-8 text") from None


def _csv(file: BinaryIO) -> Iterator[_Row]:
    rows = csv.reader(_lines(file), strict=True)
    columns: dict[str, int] = {}
    number = line = 0
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise _MalformedError(f"line {line + 1}", str(error)) from None
        if cells is None:
            return
        start, line = line + 1, rows.line_num
        if not cells:
            continue
        if not columns:
            columns = {name.strip(): number for number, name in enumerate(cells, 1)}
            _check_header(columns, cells, start)
            continue
        if len(cells) != len(columns):
            place = f"line {start}, column {min(len(cells), len(columns)) + 1}"
            raise _MalformedError(place, f"expected {len(columns)} fields as in the header, got {len(cells)}")
        # CSV leaves a field out by an empty cell.
        fields = {name: cells[column - 1] or None for name, column in columns.items()}
        yield _Row(number, start, {name: (start, column) for name, column in columns.items()}, fields)
        number += 1


def _check_header(columns: Mapping[str, int], cells: list[str], line: int) -> None:
    # Without the names: if the header is missing, the first line may contain a key.
    if len(columns) != len(cells):
        raise _MalformedError(f"line {line}", "duplicate column name in the header")
    if "name" not in columns or not columns.keys() & {"api_key", "api_key_env"}:
        raise _MalformedError(f"line {line}", "the header must name the columns name and api_key or api_key_env")


def _ndjson(file: BinaryIO) -> Iterator[_Row]:
    number = 0
    for line_number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise _MalformedError(f"line {line_number}, column {error.colno}", error.msg) from None
        except RecursionError:
            raise _MalformedError(f"line {line_number}", "is nested too deeply") from None
        except ValueError:  # `int` limits the number of digits
            raise _MalformedError(f"line {line_number}", "has a number of too many digits") from None
        if not isinstance(fields, dict):
            raise _MalformedError(f"line {line_number}, column 1", f"expected an object, got {type(fields).__name__}")
        columns = {name: (line_number, line.find(f'"{name}"') + 1) for name in _FIELDS if name in fields}
        yield _Row(number, line_number, columns, fields)
        number += 1


def _toml(file: BinaryIO) -> Iterator[_Row]:
    text = "".join(_lines(file))
    try:
        accounts = tomllib.loads(text).get("accounts")
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        raise _MalformedError(place[1] if place else "", _TOML_PLACE.sub("", str(error))) from None
    except RecursionError:
        raise _MalformedError("", "is nested too deeply") from None
    except ValueError:  # `int` limits the number of digits
        raise _MalformedError("", "has a number of too many digits") from None
    if not isinstance(accounts, list) or not all(isinstance(account, dict) for account in accounts):
        raise _MalformedError("", "expected one [[accounts]] table for each account")
    tables = _toml_tables(text)
    for number, fields in enumerate(accounts):
        # Inline tables have no header line to find.
        line, columns = tables[number] if len(tables) == len(accounts) else (0, {})
        yield _Row(number, line, columns, fields)


def _toml_tables(text: str) -> list[tuple[int, dict[str, tuple[int, int]]]]:
    """Return the line and columns of each table; `tomllib` does not report them."""
    tables: list[tuple[int, dict[str, tuple[int, int]]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if _TOML_TABLE.match(line):
            tables.append((number, {}))
        elif tables and (found := _TOML_FIELD.match(line)):
            tables[-1][1].setdefault(found[1], (number, found.start(1) + 1))
    return tables


_FORMATS: Final[Mapping[str, Callable[[BinaryIO], Iterator[_Row]]]] = {
    ".csv": _csv,
    ".ndjson": _ndjson,
    ".jsonl": _ndjson,
    ".toml": _toml,
}
