"""Account files: three formats, read as streams, and errors with the place and never a key."""

import traceback
from pathlib import Path

import pytest

from audiences_async import Account, AudiencesClient, ConfigurationError
from audiences_async.accounts import AccountFile, check

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
        ("a.csv", b"north,%k\n", "line 1: the header needs a column 'name', and a column 'api_key', "),
        ("a.csv", b"name,api_key,name\n", "line 1: duplicate column name in the header"),
        ("a.csv", b"name,api_key\nn,k\nn,%k\n", "line 3, column 1 (name): duplicate name 'n', first defined in line 2"),
        ("a.csv", b"name,api_key\nn,%k,\n", "line 2, column 3: expected 2 fields as in the header, got 3"),
        ("a.csv", b"name,api_key\n\n,%k\n", "line 3, column 1 (name): an account needs a name"),
        ("a.csv", b"name,api_key\nn, %k\n", "line 2, column 2 (api_key): the API key has leading or trailing"),
        ("a.csv", b'name,api_key\nn,k\nm,"%k\n\n', "line 3: a quote is opened here and never closed"),
        ("a.csv", b'name,api_key\n"n,k\no,%k\np",k\n', "line 2, column 1: the cell has 3 lines; is a quote missing?"),
        ("a.csv", b'name,api_key\n"n" m,%k\n', "line 2: a text goes on after the quote that ends it"),
        ("a.csv", b'name,api_key\n"n,k\no,k\n"p,%k\n', "line 2: a text goes on after"),
        ("a.csv", b'name,api_key,note\nn,%k,"x\no,%k,y\np,%k,z"\n', "line 2, column 3: the cell has 3 lines; is a"),
        ("a.csv", b'note,name,api_key\n"x,n,%k\ny,m,%k\nz",o,%k\n', "line 2, column 1: the cell has 3 lines; is a"),
        ("a.csv", b'note,name,api_key\n"x\ny,n",m,%k\na,b,\n', "line 4, column 3 (api_key): an account needs one of"),
        ("a.csv", b"name,api_key\n#NAME?,%k\n", "line 2, column 1: an error value of a spreadsheet"),
        ("a.csv", b"name,api_key\n#12,%k\nn,########\n", "line 3, column 2: an error value of a spreadsheet"),
        ("a.csv", b"name,api_key\nn,%k\n1.23E+15,%k\n", "line 3, column 1: a number that a spreadsheet has shortened"),
        ("a.csv", b"api_key,name\n1E+14,n\n", "line 2, column 1: a number that a spreadsheet has shortened"),
        ("a.csv", b"name,api_key\nn ,%k\n", "line 2, column 1 (name): the name has leading or trailing white space"),
        ("a.csv", b"name,api_key\n\xff,%k\n", "line 2, column 1: is not UTF-8 text"),
        ("a.csv", "name,api_key\nn,k\n".encode("utf-16"), "line 1: is not UTF-8 text"),
        ("a.csv", b"name,api_key\nn,\n", "(api_key): an account needs one of api_key, api_key_env and api_key_from"),
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


MISTAKES = f"""name;note;api_key
north;x;{KEY}

;x;{KEY}
north;x;{KEY}
south;x; {KEY}
east;x
west;"x"y;{KEY}
"""


def test_every_mistake_is_found_at_once(tmp_path: Path) -> None:
    """Return every problem of a file with its place, and the separator and the header that were found."""
    file = tmp_path / "a.csv"
    file.write_bytes(MISTAKES.encode() + b"\xfc;x;k\n;;\nlast;x;k\n")
    report = check(file)
    assert (report.layout, report.accounts, report.problems) == (
        "CSV separated by semicolons, header: name, note, api_key",
        2,
        6,
    )
    assert [problem.partition(", ")[2] for problem in report.described] == [
        "line 4, column 1 (name): an account needs a name",
        "line 5, column 1 (name): duplicate name 'north', first defined in line 2",
        "line 6, column 3 (api_key): the API key has leading or trailing white space",
        "line 7, column 3: expected 3 fields as in the header, got 2",
        "line 8: a text goes on after the quote that ends it; is a quote missing, or not doubled?",
        "line 9, column 1: is not UTF-8 text; a spreadsheet writes it as 'CSV UTF-8'",
    ]
    assert KEY not in str(report)
    with pytest.raises(ConfigurationError, match=r"an account needs a name; 5 more: see .+ --check"):
        AccountFile(file)


@pytest.mark.parametrize(
    ("note", "places"),
    [
        ('x"', ["line 2, column 3", "line 3, column 1 (name)", "line 5, column 1 (name)"]),
        ('"x', ["line 2", "line 3, column 1 (name)", "line 4", "line 5, column 1 (name)"]),
        ("x", ["line 2", "line 3, column 1 (name)", "line 5, column 1 (name)"]),
    ],
    ids=["closed", "opened again", "never closed"],
)
def test_a_stray_quote_hides_no_mistake(tmp_path: Path, note: str, places: list[str]) -> None:
    """Report what is wrong behind a stray quote too, up to the next one and after it."""
    file = tmp_path / "a.csv"
    file.write_text(f'name,api_key,note\na,k,"x\n,k,\nc,k,{note}\n,k,\ne,k,\n')
    report = check(file)
    assert [problem.partition(", ")[2].partition(":")[0] for problem in report.described] == places
    assert report.accounts == 5 - len(places)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (f'a,{KEY},"x\n"\n', "a"),
        (f'a,{KEY},"Main St 5\nBerlin, Germany"\n', "a"),
        (f'a,{KEY},"\n\n"\nb,{KEY},"\u2028"\n', "ab"),
        (f"#a!,{KEY},\n", ["#a!"]),
    ],
)
def test_what_is_no_stray_quote(tmp_path: Path, rows: str, names: str) -> None:
    """Accept texts that end in a line break, or have separators in their lines."""
    file = tmp_path / "a.csv"
    file.write_text(f"name,api_key,note\n{rows}", encoding="utf-8")
    assert [account.name for account in AccountFile(file)] == list(names)


def test_a_quote_in_the_first_column_swallows_no_account(tmp_path: Path) -> None:
    """Find a pair of stray quotes in a column before those that are read, and the account between them."""
    file = tmp_path / "a.csv"
    file.write_text(f'note,name,api_key\n"x,n,{KEY}\ny",o,{KEY}\n')
    assert [problem.partition(", ")[2] for problem in check(file).described] == [
        "line 2, column 1: the cell has 2 lines; is a quote missing?"
    ]


def test_a_mistake_beside_a_long_text_is_one(tmp_path: Path) -> None:
    """Report no mistakes in the lines of a cell, because its row has one."""
    file = tmp_path / "a.csv"
    file.write_text(f'name,api_key,note\na,1.2E+15,"one\ntwo\nthree"\nb,{KEY},\n')
    report = check(file)
    assert (report.accounts, [problem.partition(", ")[2][:16] for problem in report.described]) == (
        1,
        ["line 2, column 2"],
    )


def test_a_quote_that_is_not_closed_for_long(tmp_path: Path) -> None:
    """Say so, as of one that is never closed."""
    file = tmp_path / "a.csv"
    file.write_text(f'name,api_key\n"n,{KEY}\n' + f"m,{KEY}\n" * 20_000)
    assert "line 2: a quote is opened here and not closed within 131,072 characters" in check(file).described[0]


def test_quotes_without_end_take_bounded_time(tmp_path: Path) -> None:
    """Read rows again for the first stray quotes only."""
    file = tmp_path / "a.csv"
    file.write_text("name,api_key\n" + '"n,k\n' * 20_000)
    assert check(file).problems >= 20


def test_what_is_likely_to_be_a_mistake_is_noted(tmp_path: Path) -> None:
    """Note a key that several accounts have, and what cannot be seen, without refusing the file or repeating a key."""
    file = tmp_path / "a.csv"
    rows = [
        ("a", KEY),
        ("b", f"'{KEY}"),
        ("c\u200b", "c"),
        ("d", KEY),
        ("e", KEY),
        ("f", "x y"),
        ("g", "k\u200bk"),
        ("h", "h"),
    ]
    file.write_text("name,api_key\n" + "".join(f"{name},{key}\n" for name, key in rows), encoding="utf-8")
    report = check(file)
    assert (report.problems, report.accounts) == (0, len(rows))
    assert [note.removeprefix(f"{file}, ") for note in report.notes] == [
        "line 3: the key has an apostrophe in front",
        "line 4, column 1 (name): the name has an invisible character",
        "line 7: the key has white space inside",
        "line 8: the key has an invisible character",
        "line 2, line 5 and 1 more: the same key",
    ]
    assert check(file, with_keys=False).notes == report.notes[1:2]
    assert not check(tmp_path / "none.csv").notes


def test_a_text_of_several_lines_is_no_mistake(tmp_path: Path) -> None:
    """Accept line breaks and separators in a column that is not read, unless they look like rows of the file."""
    file = tmp_path / "a.csv"
    file.write_text(f'name,api_key,note\nnorth,{KEY},"Call Monday,\nor later.\n"\nsouth,{KEY},"a,b,c\nd,e"\n')
    assert [account.name for account in AccountFile(file)] == ["north", "south"]


def test_the_first_mistakes_are_described_and_all_are_counted(tmp_path: Path) -> None:
    """Describe 20 of many problems, here in NDJSON, where each line is checked for itself."""
    file = tmp_path / "a.ndjson"
    file.write_bytes(b'{"name": "n", "api_key": "k"}\n' + b'{"name": "\xfc"}\n[]\n{\n' * 100)
    report = check(file)
    assert (report.layout, report.accounts, report.problems, len(report.described)) == ("NDJSON", 1, 300, 20)
    not_text, not_an_object, not_json = report.described[:3]
    assert not_text.endswith("a.ndjson, line 2, column 11: is not UTF-8 text")
    assert not_an_object.endswith("a.ndjson, line 3, column 1: expected an object, got list")
    assert "a.ndjson, line 4, column " in not_json


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("name;api_key", ""),
        ("Name\tAPI Key", ""),
        (" NAME , api-key,,", ""),
        ("\n\nname,api_key", ""),
        ("sep=;\nname;api_key", ""),
        ('"sep=,"\n\nname,api_key', ""),
        ("account;key", "found 'account', 'key', separated by semicolons"),
        (f"north;{KEY}", "found a text of 5 characters, a text of 10 characters, separated by semicolons"),
        ("name", "found 'name', separated by commas"),
        ('"name', "found a text of 5 characters, separated by commas"),
    ],
)
def test_the_header_that_was_found(tmp_path: Path, header: str, told: str) -> None:
    """Accept commas, semicolons and tabs; show a wrong header beside the expected one, but never what may be a key."""
    file = tmp_path / "a.csv"
    separator = next((each for each in ";\t" if each in header), ",")
    columns = header.splitlines()[-1].count(separator) + 1
    file.write_text(f"{header}\n{separator.join(['north', KEY, '', ''][:columns])}\n")
    report = check(file)
    assert report.problems == bool(told)
    assert KEY not in str(report)
    if told:
        expected = "line 1: the header needs a column 'name', and a column 'api_key', 'api_key_env' or 'api_key_from', "
        assert report.described[0].endswith(f"{expected}separated by commas, semicolons or tabs; {told}")
    else:
        assert list(AccountFile(file)) == [Account("north", KEY)]


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    """Report a file that cannot be read, with an empty layout."""
    report = check(tmp_path / "none.csv")
    assert (report.layout, report.problems) == ("", 1)
    assert check(tmp_path / "none\0.toml").described[0].endswith("cannot be read: embedded null byte")
    (tmp_path / "latin.toml").write_bytes(b'\n[[accounts]]\nname = "\xfc"\n')
    assert check(tmp_path / "latin.toml").described[0].endswith("latin.toml, line 3: is not UTF-8 text")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="not Linux")
def test_a_file_that_cannot_be_read_to_its_end(tmp_path: Path) -> None:
    """Report a file that can be opened, but not read, such as one on a disk that fails."""
    file = tmp_path / "a.csv"
    file.symlink_to("/proc/self/mem")
    (problem,) = check(file).described
    assert problem.endswith("a.csv: cannot be read: Input/output error")


def test_keys_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take keys from another file by name, in whatever way that file has them; its path may be relative."""
    monkeypatch.setenv("SOUTH_KEY", "another key")
    (tmp_path / "all.toml").write_text(TOML.replace("so\\nuth", "south"))
    some = tmp_path / "some.csv"
    some.write_text("name,api_key_from\nnorth,all.toml\nsouth,all.toml\n")
    accounts = AccountFile(some)
    assert list(accounts) == [Account("north", KEY), Account("south", "another key")]
    assert accounts.key_sources(["south"]) == {"south": ("api_key_from", str(tmp_path / "all.toml"))}
    assert AccountFile(tmp_path / "all.toml").key_sources(["south", "north"]) == {
        "north": ("api_key_from", str(tmp_path / "all.toml")),
        "south": ("api_key_env", "SOUTH_KEY"),
    }


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("none.csv", "none.csv: cannot be read: No such file or directory"),
        ("none.txt", "none.txt: unsupported file type"),
        ("bad.csv", "bad.csv, line 2, column 2 (api_key): the API key has leading"),
        ("good.csv", "good.csv has no account of this name"),
        ("a.csv", "a file that keys are taken from cannot take them from another"),
    ],
)
def test_keys_that_another_file_does_not_have(tmp_path: Path, other: str, told: str) -> None:
    """Report the problem of the other file in the line that refers to it; files cannot refer in a circle."""
    (tmp_path / "bad.csv").write_text(f"name,api_key\nnorth, {KEY}\n")
    (tmp_path / "good.csv").write_text(f"name,api_key\nsouth,{KEY}\n")
    (tmp_path / "a.csv").write_text(f"name,api_key_from\nnorth,{other}\n")
    (problem,) = check(tmp_path / "a.csv").described
    assert "line 2, column 2 (api_key_from): " in problem
    assert told in problem
    assert KEY not in problem


def test_a_key_in_the_wrong_column_is_not_repeated(tmp_path: Path) -> None:
    """Refer to the file, and not to the variable, if what names it may be a key; without keys it is not checked."""
    path = tmp_path / "accounts.csv"
    path.write_text(f"name,api_key_env\nnorth,{KEY}\n")
    assert AccountFile(path, with_keys=False).key_sources(["north"]) == {"north": ("api_key_from", str(path))}


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
