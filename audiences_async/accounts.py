"""Read accounts from TOML, CSV or NDJSON files, which are checked as a whole first."""

import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Final, Literal

from attrs import evolve, frozen

from audiences_async._jobs.account_rows import FIELDS, KEY_FIELDS, Problem, Row, layout, read, suffixes
from audiences_async.credentials import ApiKey
from audiences_async.errors import ConfigurationError, printable
from audiences_async.models import Account

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

MAX_PROBLEMS: Final = 20
"""Maximum number of problems that `check` describes."""


@frozen
class AccountFileReport:
    """What `check` found in an account file.

    Attributes:
        layout: The format, and of a CSV file the separator and the header; empty if the file cannot be read.
        accounts: Number of accounts without a problem.
        problems: Number of problems.
        described: The first 20 problems, each with its line and column, and never with a key.
        notes: The first 20 things that are allowed, but are likely to be mistakes: a key that two accounts have, or an
            invisible character in a name or key.
    """

    layout: str
    accounts: int
    problems: int
    described: tuple[str, ...]
    notes: tuple[str, ...] = ()


def check(path: str | os.PathLike[str], *, with_keys: bool = True) -> AccountFileReport:
    """Return everything that is wrong with an account file, at once.

    Args:
        path: The file, as for `AccountFile`.
        with_keys: Whether the keys are checked, and the environment variables that hold them.

    Raises:
        ConfigurationError: The file's name has none of the supported extensions.
    """
    reader = _Reader(Path(path), with_keys=with_keys)
    return evolve(reader.check(), notes=tuple(map(reader.described, islice(_notes(reader.valid), MAX_PROBLEMS))))


class AccountFile:
    """The accounts of a file. Iterable any number of times; ``len()`` is the number of accounts.

    Each account has a ``name`` and one of these; other fields are ignored:

    - ``api_key``: the key;
    - ``api_key_env``: the name of an environment variable that holds the key;
    - ``api_key_from``: the path of another account file, in which the account of that name has its key. A relative path
      is relative to this file. The accounts of the other file are kept in memory.

    The file name's extension selects the format:

    - ``.csv``: a header line with the column names, then one line per account. Commas, semicolons or tabs separate the
      columns; upper case, spaces and hyphens in the header make no difference, and rows of empty cells are skipped;
    - ``.ndjson`` or ``.jsonl``: one JSON object per line;
    - ``.toml``: one ``[[accounts]]`` table per account.

    Each iteration reads CSV and NDJSON line by line, with one account in memory at a time. TOML is read at once.

    Args:
        path: The file; UTF-8, with or without a byte order mark.
        with_keys: Whether to read the keys. Without them the environment variables need not be set, and the accounts
            are usable only for their names, as on the submitting side of a distributed job.

    Raises:
        ConfigurationError: The file cannot be read or has no accounts; an account is invalid; or two accounts have the
            same name. The message has the first problem with its line and column, and never a key; `check` returns all.
    """

    def __init__(self, path: str | os.PathLike[str], *, with_keys: bool = True) -> None:
        self._reader = _Reader(Path(path), with_keys=with_keys)
        report = self._reader.check()
        if report.problems:
            more = report.problems - 1
            rest = f"; {more:,} more: see audiences fetch --accounts FILE --check" if more else ""
            raise ConfigurationError(f"{report.described[0]}{rest}")
        self._count = report.accounts

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self._reader.path

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Account]:
        for account in self._reader.accounts():
            if isinstance(account, Problem):
                raise ConfigurationError(self._reader.described(account))
            yield account[1]

    def places(self) -> Iterator[tuple[str, int]]:
        """Yield each account's name and place, for `at`. TOML has no places."""
        return ((row.fields["name"], row.offset) for row in self._reader.rows() if isinstance(row, Row))

    def at(self, place: int, head: int) -> Account | None:
        """Return the account at a place; ``None`` if there is none any more, because the file has changed.

        Args:
            place: The place.
            head: Place of the first account; what comes before it is the header.
        """
        return self._reader.at(place, head)

    def key_sources(self, names: Collection[str]) -> dict[str, tuple[Literal["api_key_env", "api_key_from"], str]]:
        """Return a field for each account by which another account file finds its key; it never holds the key.

        Args:
            names: Names of accounts of this file.

        Returns:
            By name, ``api_key_env`` with the variable, or ``api_key_from`` with the absolute path of the account file.
        """
        rows = ((str(row.fields["name"]), row) for row in self._reader.rows() if isinstance(row, Row))
        return {name: self._reader.key_source(row) for name, row in rows if name in names}


class _Reader:
    """Reads a file's accounts and problems.

    Args:
        path: The file.
        with_keys: Whether to read the keys.
        may_refer: Whether an account may take its key from another file.
    """

    def __init__(self, path: Path, *, with_keys: bool, may_refer: bool = True) -> None:
        self.path = path
        self._with_keys = with_keys
        self._may_refer = may_refer
        self._referred: dict[Path, dict[str, Account] | str] = {}  # the accounts of a file, or its problem
        if self._suffix not in suffixes():
            problem = f"unsupported file type; the name must end in one of {', '.join(suffixes())}"
            raise ConfigurationError(self.described(Problem("", problem)))

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    def described(self, problem: Problem) -> str:
        """Return a problem with the file and the place."""
        where = f", {problem.place}" if problem.place else ""
        return f"{printable(str(self.path))}{where}: {problem.text}"

    def check(self) -> AccountFileReport:
        """Check every account; names must be unique."""
        names = _Hashes()
        report = self._report(lambda _, account: names.add(account.name))
        repeated = names.repeated()
        return self._report(partial(_duplicate, {}, repeated)) if repeated else report

    def valid(self) -> Iterator[tuple[Row, Account]]:
        """Yield each account without a problem, with its row."""
        return (account for account in self.accounts() if not isinstance(account, Problem))

    def _report(self, problem_of: Callable[[Row, Account], Problem | None]) -> AccountFileReport:
        problems: list[Problem] = []
        count = accounts = 0
        for account in self.accounts():
            problem = account if isinstance(account, Problem) else problem_of(*account)
            if problem is None:
                accounts += 1
            else:
                count += 1
                problems += [problem] if count <= MAX_PROBLEMS else []
        if not accounts and not count:
            count, problems = 1, [Problem("", "contains no accounts")]
        return AccountFileReport(self._layout(), accounts, count, tuple(map(self.described, problems)))

    def at(self, place: int, head: int) -> Account | None:
        """Return the account at a place; ``None`` if there is none any more."""
        row = next(self.rows(place, head), None)
        account = self._account(row) if isinstance(row, Row) else None
        return account if isinstance(account, Account) else None

    def accounts(self) -> Iterator[tuple[Row, Account] | Problem]:
        """Yield each account with its row, or its problem."""
        for row in self.rows():
            if isinstance(row, Problem):
                yield row
            else:
                account = self._account(row)
                yield account if isinstance(account, Problem) else (row, account)

    def rows(self, place: int = 0, head: int = 0) -> Iterator[Row | Problem]:
        """Yield the rows, whatever their fields are, from a place on; *head* is the place of the first row."""
        try:
            file = self.path.open("rb")
        except (OSError, ValueError) as error:  # the latter for a NUL in the path
            yield Problem("", f"cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        with file:
            try:
                header = BytesIO(file.read(head) if place else b"")
                file.seek(place)
                yield from read(chain(header, file), self._suffix)
            except OSError as error:
                yield Problem("", f"cannot be read: {error.strerror or error}")

    def key_source(self, row: Row) -> tuple[Literal["api_key_env", "api_key_from"], str]:
        """Return the field, without a key, by which another account file finds the key of this row."""
        variable = row.fields.get("api_key_env")
        if variable and _VARIABLE.fullmatch(variable):  # a misplaced key is not repeated
            return "api_key_env", variable
        other = row.fields.get("api_key_from")
        return "api_key_from", str(self.path.resolve() if other is None else self._other(other))

    def _layout(self) -> str:
        with suppress(OSError, ValueError), self.path.open("rb") as file:
            return layout(file, self._suffix)
        return ""

    def _other(self, path: str) -> Path:
        return (self.path.parent / path).resolve()

    def _account(self, row: Row) -> Account | Problem:
        """Return the account of a row, or its problem. Values are never repeated: a misplaced one may be a key."""
        fields = {name: row.fields[name] for name in FIELDS if row.fields.get(name) is not None}
        for name, value in fields.items():
            if not isinstance(value, str):
                return Problem(row.at(name), f"expected text, got {type(value).__name__}")
        problem = _name_problem(fields.get("name", ""))
        if problem:
            return Problem(row.at("name"), problem)
        if not self._with_keys:
            return Account(fields["name"], no_key)
        sources = [name for name in KEY_FIELDS if name in fields]
        if len(sources) != 1:
            return Problem(row.at(KEY_FIELDS[0]), "an account needs one of api_key, api_key_env and api_key_from")
        account = self._with_key(sources[0], fields["name"], fields[sources[0]])
        return Problem(row.at(sources[0]), account) if isinstance(account, str) else account

    def _with_key(self, source: str, name: str, value: str) -> Account | str:
        """Return the account, or the problem of its key; *source* is the field that holds or names the key."""
        if source == "api_key_from":
            return self._from(value, name)
        key = value if source == "api_key" else _variable(value)
        try:
            return Account(name, key or "")
        except ConfigurationError as error:
            return "names an environment variable that is not set" if key is None else error.message

    def _from(self, path: str, name: str) -> Account | str:
        """Return the account of that name in another account file, or the problem."""
        if not self._may_refer:
            return "a file that keys are taken from cannot take them from another"
        other = self._other(path)
        if other not in self._referred:
            self._referred[other] = _all_accounts(other)
        accounts = self._referred[other]
        if isinstance(accounts, str):
            return accounts
        return accounts.get(name) or f"{printable(str(other))} has no account of this name"


def _all_accounts(path: Path) -> dict[str, Account] | str:
    """Return the accounts of a file by name, or its first problem."""
    try:
        reader = _Reader(path, with_keys=True, may_refer=False)
    except ConfigurationError as error:
        return error.message
    accounts: dict[str, Account] = {}
    for account in reader.accounts():
        if isinstance(account, Problem):
            return reader.described(account)
        accounts[account[1].name] = account[1]
    return accounts


def _notes(accounts: Callable[[], Iterator[tuple[Row, Account]]]) -> Iterator[Problem]:
    """Yield what is allowed, but is likely to be a mistake.

    Args:
        accounts: Called for the accounts once, or twice.
    """
    keys, places = _Hashes(), defaultdict[str, list[str]](list)
    for row, account in accounts():
        if not account.name.isprintable():
            yield Problem(row.at("name"), "the name has an invisible character")
        if isinstance(account.credential, ApiKey):
            keys.add(account.credential.reveal())
            if strange := _strange(account.credential.reveal()):
                yield Problem(row.place, f"the key has {strange}")
    repeated = keys.repeated()
    for row, account in accounts() if repeated else ():
        if isinstance(account.credential, ApiKey) and hash(account.credential.reveal()) in repeated:
            places[account.credential.reveal()].append(row.place)
    for first, second, *more in filter(lambda found: len(found) > 1, places.values()):
        others = f" and {len(more):,} more" if more else ""
        yield Problem(f"{first}, {second}{others}", "the same key")


def _strange(key: str) -> str:
    """Return what is strange about a key; empty if nothing is."""
    if key.startswith("'"):
        return "an apostrophe in front"
    if any(character.isspace() for character in key):
        return "white space inside"
    return "" if key.isprintable() else "an invisible character"


class _Hashes:
    """Hashes of texts of which some may be the same; takes 8 bytes for each, so that millions fit into memory."""

    def __init__(self) -> None:
        self._hashes = [array("q") for _ in range(256)]

    def add(self, text: str) -> None:
        """Add the hash of a text."""
        number = hash(text)
        self._hashes[number & 255].append(number)

    def repeated(self) -> set[int]:
        """Return the hashes that occur more than once; two texts may have the same."""
        return {number for hashes in self._hashes for number, count in Counter(hashes).items() if count > 1}


def _duplicate(seen: dict[str, str], hashes: set[int], row: Row, account: Account) -> Problem | None:
    """Return a problem if the account's name is among those *seen*; add it to them if its hash is one of *hashes*."""
    if account.name in seen:
        text = f"duplicate name '{printable(account.name)}', first defined in {seen[account.name]}"
        return Problem(row.at("name"), text)
    if hash(account.name) in hashes:
        seen[account.name] = row.place
    return None


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
    if name != name.strip():
        return "the name has leading or trailing white space"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "has a character that UTF-8 cannot encode"
    return ""
