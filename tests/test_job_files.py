"""The files of a job: rows, Parquet, compression, cells that are safe in a spreadsheet, and failed accounts."""

import csv
import gzip
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attrs import define
from command import COMMAND, KEY, Done, counted, runner
from services import missing_module

import audiences_async
from audiences_async import Account, ConfigurationError, Failed
from audiences_async._jobs import compression, outcome_files
from audiences_async.accounts import AccountFile
from audiences_async.cli.rows import COLUMNS
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox

needs_pyarrow = pytest.mark.skipif(missing_module("pyarrow"), reason="pyarrow is not installed")
needs_polars = pytest.mark.skipif(missing_module("polars"), reason="polars is not installed")
needs_duckdb = pytest.mark.skipif(missing_module("duckdb"), reason="duckdb is not installed")

CREATED = "2025-10-01T09:10:00Z"
ODD = {"type": "New", "id": 9, "name": "n", "created_time": "soon", "user_count": 2**63, "note": [1]}
FORMULAS = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "\nx", "\uff1dx", "'quoted", "''", "plain", "a=1", "5"]


@define
class Job:
    """A fetch of some accounts, and its files."""

    command: Callable[..., Done]
    sandbox: Sandbox
    folder: Path

    @property
    def accounts(self) -> Path:
        """Path of the accounts file."""
        return self.folder / "accounts.csv"

    def open(self, name: str, audiences: Sequence[Any] = EXAMPLE_AUDIENCES) -> None:
        """Add an account to the file, and open it in the sandbox."""
        self.sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=audiences)
        if not self.accounts.exists():
            self.accounts.write_text("name,api_key\n")
        with self.accounts.open("a") as file:
            file.write(f"{name},{KEY}-{name}\n")

    def run(self, out: str, *arguments: str) -> Done:
        """Fetch into a file."""
        files = ["--accounts", str(self.accounts), "--out", str(self.folder / out)]
        return self.command("fetch", *files, "--concurrency", "1", *arguments)


@pytest.fixture
def job(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Return a job without accounts."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    return Job(runner(monkeypatch, capsys), sandbox, tmp_path)


def mixed(job: Job) -> None:
    """Open an account with audiences of all kinds, one without, and one that fails once."""
    job.open("full", [*EXAMPLE_AUDIENCES, ODD])
    job.open("empty", [])
    job.open("bad")
    job.sandbox.script("bad", Answer(403))


# Rows.


@pytest.mark.parametrize("output", ["ndjson", "csv"])
def test_rows_have_fixed_columns(job: Job, output: str) -> None:
    """Write one row per audience; what does not fit into its column is in extra, and nothing is lost."""
    mixed(job)
    assert job.run("out", "--rows", "--output", output).returncode == 7
    text = (job.folder / "out").read_text()
    rows = (
        [json.loads(line) for line in text.splitlines()] if output == "ndjson" else [*csv.DictReader(io.StringIO(text))]
    )
    assert {tuple(row) for row in rows} == {COLUMNS}
    static, dynamic, odd = rows
    none = None if output == "ndjson" else ""
    assert (static["account"], static["id"], static["created_time"]) == (
        "full",
        "31234",
        EXAMPLE_AUDIENCES[0]["created_time"],
    )
    assert (int(static["user_count"]), dynamic["user_count"], static["extra"]) == (
        EXAMPLE_AUDIENCES[0]["user_count"],
        none,
        none,
    )
    assert (odd["id"], odd["created_time"], odd["user_count"], odd["type"]) == (none, none, none, "New")
    assert json.loads(odd["extra"]) == {name: ODD[name] for name in ("id", "created_time", "user_count", "note")}


@pytest.mark.parametrize("output", ["ndjson", "csv"])
def test_rows_can_be_resumed(job: Job, output: str) -> None:
    """Continue from the checkpoint beside it, and refuse an output that has other content."""
    mixed(job)
    command = ["out", "--rows", "--output", output]
    assert job.run(*command).returncode == 7
    assert job.run(*command, "--resume").returncode == 0
    assert (job.folder / "out").read_text().count("\n") == (5 if output == "ndjson" else 6)
    (job.folder / "out").write_text('{"account":"x","ok":true,"elapsed":1}\n')
    done = job.run(*command, "--resume")
    assert (done.returncode, "was not written from out.ndjson" in done.stderr) == (2, True)


def test_rows_are_not_json(job: Job) -> None:
    """Refuse --rows with --output json before the first request."""
    mixed(job)
    assert job.run("out", "--rows", "--output", "json").returncode == 2
    assert job.sandbox.requests == []


@pytest.mark.once
def test_the_page_has_every_key_and_column() -> None:
    """Name the keys of a line and the columns of a row on the page about jobs, in order."""
    page = (Path(audiences_async.__file__).parent / "help" / "jobs.md").read_text(encoding="utf-8")
    keys, columns = (re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) for part in page.split("A row always has")[:2])
    outcome = Failed(Account("a", "key"), 0.0, ConfigurationError("x"))
    assert keys[-7:] == list(json.loads(outcome_files.line(outcome)))
    assert tuple(columns) == COLUMNS


# Parquet.


@pytest.mark.once
@needs_pyarrow
def test_parquet_has_types_and_can_be_resumed(job: Job) -> None:
    """Write typed columns with times in UTC; continue from the checkpoint beside it."""
    import pyarrow.parquet

    mixed(job)
    command = ["out.parquet", "--output", "parquet"]
    assert job.run(*command).returncode == 7
    assert job.run(*command).returncode == 2  # it already exists
    assert job.run(*command, "--resume").returncode == 0
    table = pyarrow.parquet.read_table(job.folder / "out.parquet")
    assert [str(kind) for kind in table.schema.types] == [
        *("string", "timestamp[us, tz=UTC]", "timestamp[us, tz=UTC]", "string", "string", "string"),
        *("timestamp[us, tz=UTC]", "int64", "string"),
    ]
    rows = table.to_pylist()
    assert [row["account"] for row in rows] == ["full"] * 3 + ["bad"] * 2
    assert rows[0]["created_time"] == datetime.fromisoformat(EXAMPLE_AUDIENCES[0]["created_time"])
    assert rows[0]["user_count"] == EXAMPLE_AUDIENCES[0]["user_count"]
    assert datetime.now(UTC) >= rows[0]["fetched_at"]


@pytest.mark.once
@needs_pyarrow
@needs_polars
@needs_duckdb
def test_the_output_is_read_as_on_the_page(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the page's program on the files of a job whose first accounts have only Dynamic audiences."""
    dynamic = [audience for audience in EXAMPLE_AUDIENCES if audience["type"] == "Dynamic"]
    for number in range(200):
        job.open(f"dynamic-{number}", dynamic)
    mixed(job)
    job.run("audiences.parquet", "--allow-partial")
    job.run("rows.ndjson", "--rows")
    page = (Path(audiences_async.__file__).parent / "help/jobs.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(job.folder)
    found: dict[str, Any] = {}
    exec(program, found)
    for frame in (found["frame"], found["rows"]):
        types = [str(kind) for kind in frame.dtypes]
        assert types.count("Datetime(time_unit='us', time_zone='UTC')") == 3
        assert "Int64" in types
    assert found["rows"].height == found["frame"].height + 2


@pytest.mark.once
@needs_pyarrow
def test_parquet_is_written_in_row_groups(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a row group for each so many rows, so that memory does not grow with the job."""
    import pyarrow.parquet

    monkeypatch.setattr("audiences_async.cli.parquet._BATCH", 1)
    monkeypatch.setattr("audiences_async.cli.parquet._GROUP", 2)
    mixed(job)
    job.run("out.parquet", "--output", "parquet", "--allow-partial")
    assert pyarrow.parquet.ParquetFile(job.folder / "out.parquet").num_row_groups == 2


@pytest.mark.once
@needs_pyarrow
@pytest.mark.parametrize("content", [b"precious", b"PAR1 precious"])
def test_parquet_of_others_is_never_replaced(job: Job, content: bytes) -> None:
    """Refuse an existing file that is not Parquet of this command, and keep it unchanged."""
    mixed(job)
    assert job.run("out", "--output", "parquet").returncode == 7
    (job.folder / "out").write_bytes(content)
    done = job.run("out", "--output", "parquet", "--resume")
    assert (done.returncode, (job.folder / "out").read_bytes()) == (2, content)


def test_parquet_needs_an_extra(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the extra before the first request, and refuse a compressed Parquet."""
    mixed(job)
    monkeypatch.setattr("audiences_async.cli.parquet.find_spec", lambda _: None)
    done = job.run("out", "--output", "parquet")
    assert (done.returncode, "audiences_async[parquet]" in done.stderr) == (2, True)
    monkeypatch.setattr("audiences_async.cli.parquet.find_spec", lambda _: True)
    assert "must not end in .gz" in job.run("out.gz", "--output", "parquet").stderr
    assert job.sandbox.requests == []


@pytest.mark.once
@needs_pyarrow
@needs_polars
def test_polars_reads_the_types(job: Job) -> None:
    """Open Parquet in polars with the right types."""
    import polars as pl

    mixed(job)
    job.run("out.parquet", "--output", "parquet")
    frame = pl.read_parquet(job.folder / "out.parquet")
    time = pl.Datetime("us", "UTC")
    text = pl.String
    assert frame.dtypes == [text, time, time, text, text, text, time, pl.Int64, text]
    assert frame["user_count"].to_list() == [EXAMPLE_AUDIENCES[0]["user_count"], None, None]


@pytest.mark.once
@needs_polars
def test_polars_keeps_a_count_that_comes_late(job: Job) -> None:
    """Read NDJSON rows in polars without losing a count that only late accounts have; every line has the column."""
    import polars as pl

    dynamic = {**EXAMPLE_AUDIENCES[1]}
    job.open("many", [{**dynamic, "id": str(number)} for number in range(200)])
    job.open("late", EXAMPLE_AUDIENCES[:1])
    job.run("out.ndjson", "--rows")
    frame = pl.read_ndjson(job.folder / "out.ndjson", schema_overrides={"user_count": pl.Int64})
    assert frame["user_count"].drop_nulls().to_list() == [EXAMPLE_AUDIENCES[0]["user_count"]]


@pytest.mark.once
@needs_pyarrow
@needs_duckdb
def test_duckdb_reads_the_types(job: Job) -> None:
    """Open Parquet in duckdb with the right types."""
    import duckdb

    mixed(job)
    job.run("out.parquet", "--output", "parquet")
    table = duckdb.read_parquet(str(job.folder / "out.parquet"))
    time = "TIMESTAMP WITH TIME ZONE"
    assert [str(kind) for kind in table.types] == ["VARCHAR", time, time, *["VARCHAR"] * 3, time, "BIGINT", "VARCHAR"]
    assert table.sum("user_count").fetchall() == [(EXAMPLE_AUDIENCES[0]["user_count"],)]


# Compression.


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("output", ["ndjson", "csv", "json"])
def test_a_compressed_output_can_be_resumed(job: Job, output: str, suffix: str) -> None:
    """Compress by the name of the output, in every format, and continue it."""
    mixed(job)
    out = f"out.{output}{suffix}"
    assert job.run(out, "--output", output).returncode == 7
    assert job.run(out, "--output", output, "--resume").returncode == 0
    text = b"".join(compression.lines(job.folder / out)).decode()
    assert len(job.sandbox.requests) == 4
    assert [text.count(name) for name in ("31234", "Forbidden")] == [2, 0]
    if suffix == ".gz":
        assert gzip.decompress((job.folder / out).read_bytes()).decode() == text
    (job.folder / out).write_bytes(b"precious")
    assert job.run(out, "--output", output, "--resume").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_killed_job_keeps_what_is_compressed(job: Job, suffix: str) -> None:
    """Killed, and resumed, a job has lost none of the accounts of its compressed output."""
    names = [f"a{number}" for number in range(6)]
    for name in names:
        job.open(name)
    job.sandbox.script("a4", Answer(delay=60.0))
    out = job.folder / f"out.ndjson{suffix}"
    arguments = ["fetch", "--accounts", str(job.accounts), "--out", str(out), "--concurrency", "1"]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.DEVNULL) as process:
        job.sandbox.wait_for_requests(5)
        process.send_signal(signal.SIGKILL)
    assert [line.account for line in outcome_files.lines(out)] == names[:4]
    done = job.run(out.name, "--resume")
    assert (done.returncode, counted(done.stderr)) == (0, "6 of 6 accounts fetched, 0 failed")
    assert sorted(line.account for line in outcome_files.lines(out)) == names
    assert len(job.sandbox.requests) == 7


def test_zstandard_needs_an_extra(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the extra before the first request."""
    mixed(job)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    done = job.run("out.csv.zst", "--output", "csv")
    assert (done.returncode, "audiences_async[zstd]" in done.stderr, job.sandbox.requests) == (2, True, [])


# Spreadsheets.


def original(cell: str) -> str:
    """Return the text of a cell, as the help of --output says."""
    return cell.removeprefix("'")


@pytest.mark.parametrize("rows", [[], ["--rows"]], ids=["accounts", "rows"])
def test_no_cell_is_executed_and_every_text_comes_back(job: Job, rows: list[str]) -> None:
    """Put an apostrophe in front of cells that a spreadsheet would execute; without it a program has the text."""
    audiences = [{"id": text, "name": text, "created_time": CREATED, "type": text} for text in FORMULAS]
    job.open("n", audiences)
    job.run("out.csv", "--output", "csv", *rows)
    shown = list(csv.DictReader(io.StringIO((job.folder / "out.csv").read_bytes().decode(), newline="")))
    for name in ("id", "name", "type"):
        assert [original(row[name]) for row in shown] == FORMULAS
        assert not any(row[name].startswith(tuple("=+-@\t\r\n\uff1d")) for row in shown)
    assert [row["name"] for row in shown[-3:]] == ["plain", "a=1", "5"]


def test_a_list_is_safe_too(job: Job) -> None:
    """Defuse the cells of `audiences list --output csv`."""
    audience = {"id": "1", "name": "=cmd|' /C calc'!A0", "created_time": CREATED, "type": "Dynamic"}
    job.sandbox.add_account(api_key=KEY, audiences=[audience])
    printed = job.command("list", "--output", "csv", AUDIENCES_API_KEY=KEY).stdout
    (row,) = csv.DictReader(io.StringIO(printed))
    assert row["name"] == "'=cmd|' /C calc'!A0"


# Failed accounts.


@pytest.mark.parametrize("name", ["errors.csv", "errors.ndjson"])
def test_failures_can_be_fetched_again(job: Job, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write failed accounts without a key, to a file that --accounts reads: their keys are found where they were."""
    monkeypatch.setenv("EAST_KEY", f"{KEY}-east")
    for each in ("north", "=south", "east"):
        job.open(each)
    job.accounts.write_text(f"name;API key;api_key_env\nnorth;{KEY}-north;\n=south;{KEY}-=south;\neast;;EAST_KEY\n")
    job.sandbox.script("=south", Answer(403))
    job.sandbox.script("east", Answer(404, body={"status": 404, "description": "=1+1"}))
    errors = job.folder / name
    done = job.run("out", "--errors", str(errors))
    assert done.returncode == 7
    assert KEY not in errors.read_text()
    again = AccountFile(errors)
    assert [account.name for account in again] == ["=south", "east"]
    assert [account.api_key for account in again] == [f"{KEY}-=south", f"{KEY}-east"]
    arguments = ["--accounts", str(errors), "--out", str(job.folder / "rest"), "--errors", str(job.folder / f"2{name}")]
    assert job.command("fetch", *arguments).returncode == 0
    assert AccountFile(job.accounts).key_sources(["=south"]) == again.key_sources(["=south"])


@pytest.mark.parametrize("name", ["errors.csv", "errors.ndjson"])
def test_failures_do_not_disturb_resuming(job: Job, name: str) -> None:
    """Replace the failures of an earlier run; without failures, the file has no account."""
    mixed(job)
    errors = job.folder / name
    assert job.run("out", "--errors", str(errors)).returncode == 7
    (account,) = AccountFile(errors)
    assert account.name == "bad"
    done = job.run("out", "--errors", str(errors), "--resume")
    assert (done.returncode, counted(done.stderr)) == (0, "3 of 3 accounts fetched, 0 failed")
    assert "bad" not in errors.read_text()
    assert job.run("out", "--errors", str(errors), "--resume").returncode == 0


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("errors.txt", None, "must end in one of .csv, .ndjson, .jsonl"),
        ("accounts.csv", None, "--errors is the accounts file"),
        ("out.ndjson", None, "two files of the job are the same"),
        ("mine.csv", "name,api_key\nnorth,k\n", "was not written by --errors"),
        ("mine.ndjson", '{"name":"north","api_key":"k"}\n', "was not written by --errors"),
        ("folder.csv", "", "was not written by --errors"),
    ],
)
def test_failures_never_replace_another_file(job: Job, name: str, content: str | None, told: str) -> None:
    """Refuse a file of failures that is something else, before the first request."""
    mixed(job)
    errors = job.folder / name
    if content == "":
        errors.mkdir()
    elif content is not None:
        errors.write_text(content)
    done = job.run("out.ndjson", "--errors", str(errors))
    assert (done.returncode, job.sandbox.requests, told in done.stderr) == (2, [], True)
    assert not content or errors.read_text() == content


def test_failures_need_an_output_that_can_be_read(job: Job) -> None:
    """Refuse --errors with an output that is a device."""
    mixed(job)
    done = job.run("/dev/null", "--errors", str(job.folder / "errors.csv"))
    assert (done.returncode, "regular file" in done.stderr, job.sandbox.requests) == (2, True, [])
