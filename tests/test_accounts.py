"""Account files: three formats, read as streams, and errors with the place and never a key."""

import traceback
from pathlib import Path

import pytest

from audiences_async import Account, AudiencesClient, ConfigurationError
from audiences_async.accounts import AccountFile

KEY = "s3cr3t-k3y"

CSV = f"""name,note,api_key,api_key_env
north,x,{KEY},
"so
uth",x,,SOUTH_KEY

"""
NDJSON = f"""{{"name": "north", "api_key": "{KEY}", "note": 1}}

{{"name": "so\\nuth", "api_key": null, "api_key_env": "SOUTH_KEY"}}"""
TOML = f"""title = "ours"
[[accounts]]
name = "north"
api_key = "{KEY}"
[[accounts]]
name = "so\\nuth"
api_key_env = "SOUTH_KEY"
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.CSV", CSV.replace("\n", "\r\n")),
        ("a.ndjson", NDJSON),
        ("a.jsonl", NDJSON + "\n"),
        ("a.toml", TOML),
        ("a.toml", f'accounts = [{{name="north", api_key="{KEY}"}}, {{name="so\\nuth", api_key_env="SOUTH_KEY"}}]'),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, start: str) -> None:
    """Read names and keys unchanged, keys also from the environment, at every iteration."""
    monkeypatch.setenv("SOUTH_KEY", "another key")
    file = tmp_path / name
    file.write_bytes((start + text).encode())
    accounts = AccountFile(file)
    assert len(accounts) == 2
    south = "so\r\nuth" if name == "a.CSV" else "so\nuth"
    for _ in range(2):
        assert list(accounts) == [Account("north", KEY), Account(south, "another key")]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", b"", "unsupported file type; the name must end in one of .csv, .ndjson, .jsonl, .toml"),
        ("a.csv", b"", "a.csv: contains no accounts"),
        ("a.csv", b"name,api_key\n", "a.csv: contains no accounts"),
        ("a.csv", b"north,%k\n", "line 1: the header must name the columns name and api_key or api_key_env"),
        ("a.csv", b"name,api_key,name\n", "line 1: duplicate column name in the header"),
        ("a.csv", b"name,api_key\nn,k\nn,%k\n", "line 3, column 1 (name): duplicate name 'n', first defined in line 2"),
        ("a.csv", b"name,api_key\nn,%k,\n", "line 2, column 3: expected 2 fields as in the header, got 3"),
        ("a.csv", b"name,api_key\n\n,%k\n", "line 3, column 1 (name): an account needs a name"),
        ("a.csv", b"name,api_key\nn, %k\n", "line 2, column 2 (api_key): the API key has leading or trailing"),
        ("a.csv", b'name,api_key\nn,k\nm,"%k\n\n', "line 3: unexpected end of data"),
        ("a.csv", b"name,api_key\n\xff,%k\n", "line 2, column 1: is not UTF-8 text"),
        ("a.csv", "name,api_key\nn,k\n".encode("utf-16"), "line 1: is not UTF-8 text"),
        ("a.csv", b"name,api_key\nn,\n", "line 2, column 2 (api_key): an account needs one of api_key and api_key_env"),
        ("a.csv", b"name,api_key,api_key_env\nn,%k,E\n", "column 2 (api_key): an account needs one of"),
        ("a.csv", b"name,api_key_env\nn,%k\n", "(api_key_env): names an environment variable that is not set"),
        ("a.csv", b"name,api_key_env\nn,EMPTY\n", "line 2, column 2 (api_key_env): the API key is empty"),
        ("a.ndjson", b'{"name": "n", "api_key": "%k"', "line 1, column "),
        ("a.ndjson", b'\n["%k"]', "line 2, column 1: expected an object, got list"),
        ("a.ndjson", b'{"name": "n", "api_key": 5}', "line 1, column 15 (api_key): expected text, got int"),
        ("a.ndjson", b'{"name": "n"}', "line 1 (api_key): an account needs one of"),
        ("a.ndjson", b'{"name": "\\ud800", "api_key": "%k"}', "(name): has a character that UTF-8 cannot encode"),
        ("a.ndjson", b"[" * 100_000, "line 1: is nested too deeply"),
        ("a.toml", b"", "a.toml: expected one [[accounts]] table for each account"),
        ("a.toml", b"accounts = [1]", "a.toml: expected one [[accounts]] table for each account"),
        ("a.toml", b'[[accounts]]\nname = "n"\napi_key = "%k\n', "line 3, column "),
        ("a.toml", b'api_key = "%k', "end of document: "),
        ("a.toml", b"a = " + b"[" * 100_000, "nested too deeply"),
        ("a.toml", b'[[accounts]]\nname = "n"\n  api_key = ["%k"]', "line 3, column 3 (api_key): expected text, got"),
        ("a.toml", b'[[accounts]]\nname = "n"\n[other]\n', "line 1 (api_key): an account needs one of"),
        ("a.toml", b'accounts = [{name = "n", api_key = "%k "}]', "accounts[0] (api_key): the API key has leading or"),
    ],
)  # fmt: skip
def test_errors_tell_the_place_and_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: bytes, told: str
) -> None:
    """Report a problem with its line and column when the file is opened, without repeating a misplaced key."""
    monkeypatch.setenv("EMPTY", "")
    file = tmp_path / name
    file.write_bytes(text.replace(b"%k", KEY.encode()))
    with pytest.raises(ConfigurationError) as caught:
        AccountFile(file)
    assert told in str(caught.value)
    assert str(file) in str(caught.value) or name == "a.txt"
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert KEY not in shown
    assert caught.value.__cause__ is caught.value.__context__ is None


async def test_without_keys(tmp_path: Path) -> None:
    """Read for its names alone, the file needs no keys, and the accounts have none."""
    path = tmp_path / "accounts.csv"
    path.write_text("name,api_key_env\nnorth,NOT_SET\n")
    (account,) = AccountFile(path, with_keys=False)
    assert account.name == "north"
    async with AudiencesClient() as client:
        with pytest.raises(ConfigurationError, match="account 'north': the API key function raised LookupError"):
            await client.get_audiences(account)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Report a missing file as a usage error like any other."""
    with pytest.raises(ConfigurationError, match="none.csv: cannot be read: No such file or directory"):
        AccountFile(tmp_path / "none.csv")


def test_a_large_file_is_read_as_a_stream(tmp_path: Path) -> None:
    """Accounts are yielded while the file is being read: a row that goes bad later does not hide the first ones."""
    file = tmp_path / "a.csv"
    file.write_text("name,api_key\n" + "".join(f"a{number},key\n" for number in range(5_000)))
    accounts = AccountFile(file)
    with file.open("a") as more:
        more.write("bad\n")
    read = iter(accounts)
    assert next(read).name == "a0"
    with pytest.raises(ConfigurationError, match="line 5002, column 2: expected 2 fields"):
        list(read)
