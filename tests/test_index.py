"""Accounts that stay in their file, with an index on disk."""

import sqlite3
from pathlib import Path

import pytest

from audiences_async import ConfigurationError
from audiences_async._distributed import index
from audiences_async._distributed.index import AccountIndex, by_name
from audiences_async.accounts import AccountFile

FILES = {
    "a.csv": '\ufeff\n\nname,api_key\nnorth,k-north\n\n"so\nuth",k-south\nöst,k-öst',
    "a.ndjson": '\ufeff\n{"name": "north", "api_key": "k-north"}\n\n{"name": "so\\nuth", "api_key": "k-south"}\n'
    '{"api_key": "k-öst", "name": "öst"}',
    "a.toml": 'accounts = [{name = "north", api_key = "k-north"}, {name = "so\\nuth", api_key = "k-south"},'
    '{name = "öst", api_key = "k-öst"}]',
}


@pytest.mark.parametrize("name", FILES)
def test_each_account_is_found(tmp_path: Path, name: str) -> None:
    """Find every account with its key, whatever its line begins with, and no other."""
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    accounts = by_name(AccountFile(path))
    assert list(accounts) == ["north", "so\nuth", "öst"]
    assert [account.api_key for account in accounts.values()] == ["k-north", "k-south", "k-öst"]
    assert len(accounts) == 3
    with pytest.raises(KeyError):
        accounts["west"]


@pytest.mark.parametrize("changed", ["", "name,api_key\nwest,k\nnorth,k\n", "name,api_key\nnor"])
def test_a_file_that_has_changed(tmp_path: Path, changed: str) -> None:
    """Report a changed file instead of another account."""
    path = tmp_path / "a.csv"
    path.write_text("name,api_key\nnorth,k\n")
    accounts = AccountIndex(AccountFile(path))
    path.write_text(changed)
    with pytest.raises(ConfigurationError, match="has changed since the worker read it"):
        accounts["north"]


def test_an_index_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say what to do if there is no room for the index."""
    path = tmp_path / "a.csv"
    path.write_text("name,api_key\nnorth,k\n")
    monkeypatch.setattr(index, "_CACHE", "nonsense")
    with pytest.raises(ConfigurationError, match="set SQLITE_TMPDIR"):
        AccountIndex(AccountFile(path))


def test_names_with_the_same_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell names apart that have the same hash."""
    monkeypatch.setattr(index, "hash", lambda name: 1, raising=False)
    monkeypatch.setattr("audiences_async.accounts.hash", lambda name: 1, raising=False)
    path = tmp_path / "a.csv"
    path.write_text("name,api_key\nnorth,k-north\nsouth,k-south\n")
    accounts = AccountIndex(AccountFile(path))
    assert [accounts[name].api_key for name in ("north", "south")] == ["k-north", "k-south"]
    assert sqlite3.sqlite_version_info > (3, 0)
