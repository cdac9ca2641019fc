"""Find a worker's accounts in their file, by an index on disk."""

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Final
from weakref import finalize

from audiences_async.accounts import AccountFile
from audiences_async.errors import ConfigurationError, printable
from audiences_async.models import Account

_CACHE: Final = 4096  # KiB of the index that are in memory


class AccountIndex(Mapping[str, Account]):
    """Accounts by name, each read from its file when it is asked for.

    The index is a temporary file of hashes and places, without names or keys.

    Args:
        file: The accounts file, CSV or NDJSON; it must not change.

    Raises:
        ConfigurationError: The index cannot be written.
    """

    def __init__(self, file: AccountFile) -> None:
        self._file = file
        self._head = next(file.places())[1]
        self._index = sqlite3.connect("", check_same_thread=False)  # a private file, which SQLite removes
        finalize(self, self._index.close)
        try:
            self._fill()
        except sqlite3.Error as error:
            problem = f"cannot write the index of the accounts to a temporary file: {error}"
            raise ConfigurationError(f"{problem}; set SQLITE_TMPDIR to a directory with free space") from None

    def _fill(self) -> None:
        for pragma in ("journal_mode = off", "synchronous = off", f"cache_size = -{_CACHE}"):
            self._index.execute(f"pragma {pragma}")
        self._index.execute("create table places (hash integer, place integer)")
        rows = ((hash(name), place) for name, place in self._file.places())
        self._index.executemany("insert into places values (?, ?)", rows)
        self._index.execute("create index hashes on places (hash, place)")

    def __getitem__(self, name: str) -> Account:
        """Return the account.

        Raises:
            KeyError: There is no such account.
            ConfigurationError: The file has changed.
        """
        places = self._index.execute("select place from places where hash = ?", (hash(name),)).fetchall()
        if not places:
            raise KeyError(name)
        for (place,) in places:
            account = self._file.at(place, self._head)
            if account is not None and account.name == name:
                return account
        path = printable(str(self._file.path))
        raise ConfigurationError(f"{path} has changed since the worker read it; start the worker again")

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._file.places())

    def __len__(self) -> int:
        return len(self._file)


def by_name(file: AccountFile) -> Mapping[str, Account]:
    """Return the accounts of a file by name; those of a TOML file are in memory."""
    if file.path.suffix.lower() == ".toml":
        return {account.name: account for account in file}
    return AccountIndex(file)
