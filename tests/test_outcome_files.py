"""Outcome files: whole lines, one per account, from which a job can resume."""

import errno
import functools
import gzip
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiences_async import Account, ConfigurationError, DeadlineExceededError, Failed, Fetched
from audiences_async._jobs import outcome_files
from audiences_async._jobs.outcome_files import OutcomeFile, lines, write_whole
from audiences_async.errors import status_error
from audiences_async.sandbox import EXAMPLE_AUDIENCES
from audiences_async.structuring import decode

NOW = datetime(2026, 11, 24, 12, 0, 0, 500, tzinfo=UTC)
KEYS = ["account", "ok", "elapsed", "fetched_at", "response_time", "audiences", "error"]
line = functools.partial(outcome_files.line, fetched_at=NOW)

ENVELOPE = {"status": "200", "response_time": "2026-02-11T13:00:00+01:00"}
RESPONSE = decode(json.dumps(ENVELOPE | {"data": [*EXAMPLE_AUDIENCES, {"type": "New", "x": 2**70}]}).encode())
NORTH = Fetched(Account("north", "key"), 0.5, RESPONSE)
ERROR = status_error(429, "slow\ndown", account="south", retry_after=3.5, stop_reason="deadline")
SOUTH = Failed(Account("south", "key"), 1.25, ERROR)
OLD = b'{"account":"old","ok":true,"elapsed":0.25,"audiences":[{"type":"New","x":1}]}\n'
OLD_FAILURE = b'{"account":"bad","ok":false,"elapsed":0.25,"error":{"type":"ServerError","status":500}}\n'


def test_a_line_for_each_kind_of_outcome() -> None:
    """Write an outcome as one line: the account with its audiences as sent, or with its error."""
    fetched, failed = json.loads(line(NORTH)), json.loads(line(SOUTH))
    assert fetched == {
        "account": "north",
        "ok": True,
        "elapsed": 0.5,
        "fetched_at": "2026-11-24T12:00:00.000500Z",
        "response_time": "2026-02-11T12:00:00Z",
        "audiences": [*EXAMPLE_AUDIENCES, {"type": "New", "x": 2**70}],
        "error": None,
    }
    message = "account 'south': HTTP 429 Too Many Requests: slow\\ndown"
    told = {"type": "TooManyRequestsError", "message": message, "status": 429, "retry_after": 3.5}
    assert failed["error"] == {**told, "stop_reason": "deadline"}
    assert (failed["audiences"], failed["response_time"]) == ([], None)
    late = json.loads(line(Failed(NORTH.account, 1.0, DeadlineExceededError("late"))))
    assert late["error"]["status"] is None
    assert list(fetched) == list(failed) == list(late) == KEYS
    assert line(NORTH).count(b"\n") == 1


def test_a_file_of_the_version_before_is_continued(tmp_path: Path) -> None:
    """Keep an account that version 0.2 fetched when resuming, in a line with all keys."""
    path = tmp_path / "out"
    path.write_bytes(OLD + OLD_FAILURE + OLD[:50])
    with OutcomeFile(path, resume=True) as file:
        assert file.fetched == {"old"}
        file.append(line(NORTH))
    old, north = map(json.loads, path.read_bytes().splitlines())
    assert (list(old), old["audiences"]) == (KEYS, [{"type": "New", "x": 1}])
    assert (old["fetched_at"], old["response_time"], old["error"], north["account"]) == (None, None, None, "north")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@given(cut=st.integers(min_value=0, max_value=700))
def test_a_compressed_file_is_continued_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, cut: int
) -> None:
    """Keep the accounts of a compressed file that a kill cut off anywhere, and complete it to a sound file."""
    path = tmp_path_factory.getbasetemp() / f"cut{suffix}"
    path.unlink(missing_ok=True)
    second = Fetched(Account("east", "key"), 0.25, RESPONSE)
    with OutcomeFile(path) as file:
        file.append(line(NORTH))
        whole_first = path.stat().st_size
        file.append(line(second))
    path.write_bytes(path.read_bytes()[:cut])
    with OutcomeFile(path, resume=True) as file:
        assert "north" in file.fetched or cut < whole_first
        for outcome in (NORTH, second):
            if outcome.account.name not in file.fetched:
                file.append(line(outcome))
    assert b"".join(each.text for each in lines(path)) == line(NORTH) + line(second)
    assert suffix != ".gz" or gzip.decompress(path.read_bytes()) == line(NORTH) + line(second)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_is_refused(tmp_path: Path, suffix: str) -> None:
    """Refuse to resume a file whose content is not what its name says, and keep it unchanged."""
    path = tmp_path / f"out{suffix}"
    path.write_bytes(line(NORTH))
    with pytest.raises(ConfigurationError, match="is not compressed as its name says"):
        OutcomeFile(path, resume=True)
    assert path.read_bytes() == line(NORTH)


def test_zstandard_needs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the extra if Zstandard is not installed, before a file is created."""
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(ConfigurationError, match="audiences_async\\[zstd\\]"):
        OutcomeFile(tmp_path / "out.zst")
    assert list(tmp_path.iterdir()) == []


def test_going_on_keeps_what_was_fetched(tmp_path: Path) -> None:
    """Failed accounts, an incomplete last line and duplicates are removed; the rest stays unchanged."""
    path = tmp_path / "out"
    torn = line(NORTH)[:-1]
    path.write_bytes(line(SOUTH) + line(NORTH) + line(NORTH) + torn)
    with OutcomeFile(path, resume=True) as file:
        assert file.fetched == {"north"}
        assert path.read_bytes() == line(NORTH)
        file.append(line(SOUTH))
        assert [(each.account, each.ok) for each in lines(path)] == [("north", True), ("south", False)]
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".out.lock", path]


@given(cut=st.integers(min_value=0, max_value=2000))
def test_wherever_a_crash_cuts_the_file(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """Keep the whole lines of any prefix of a file when resuming, and nothing else."""
    path = tmp_path_factory.getbasetemp() / "cut"
    second = Fetched(Account("east", "key"), 0.25, RESPONSE)
    whole = line(NORTH) + line(second)
    path.write_bytes(whole[:cut])
    with OutcomeFile(path, resume=True) as file:
        assert len(file.fetched) == whole[:cut].count(b"\n")
        for outcome in (NORTH, second):
            if outcome.account.name not in file.fetched:
                file.append(line(outcome))
    assert path.read_bytes() == whole


def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    """Refuse a file with content without resume, but not an empty one."""
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    with pytest.raises(ConfigurationError, match="already exists"):
        OutcomeFile(path)
    path.write_bytes(b"precious\n")
    with pytest.raises(ConfigurationError, match="line 1, is not the outcome of an account"):
        OutcomeFile(path, resume=True)
    assert path.read_bytes() == b"precious\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Change the file behind a symbolic link when resuming."""
    (tmp_path / "real").write_bytes(line(NORTH) + line(NORTH)[:20])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with OutcomeFile(tmp_path / "link", resume=True):
        pass
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == line(NORTH)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Refuse a second process while a file is written, also after its resumption, until it is closed."""
    path = tmp_path / "out"
    path.write_bytes(line(SOUTH))
    with OutcomeFile(path, resume=True), pytest.raises(ConfigurationError, match="written by another process"):
        OutcomeFile(path, resume=True)
    with OutcomeFile(path, resume=True):
        pass


def test_a_pipe_can_be_written_but_not_gone_on_from(tmp_path: Path) -> None:
    """Write outcomes to a pipe, but refuse to resume it."""
    reader, writer = os.pipe()
    path = Path(f"/dev/fd/{writer}")
    with pytest.raises(ConfigurationError, match="is not a regular file"):
        OutcomeFile(path, resume=True)
    with OutcomeFile(path) as file:
        file.append(line(SOUTH))
    assert os.read(reader, 10_000) == line(SOUTH)
    os.close(reader)
    os.close(writer)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Keep a file unchanged that cannot be written completely, with nothing beside it."""
    path = tmp_path / "out"
    write_whole(path, [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", [b"5\n", b"{}\n", b'{"account": 5, "ok": true}\n', b'{"account": "a", "ok": tru\n', b"\xff\n"]
)
def test_what_is_no_outcome_is_refused(tmp_path: Path, text: bytes) -> None:
    """Report a line that this package did not write with its number, and never treat it as incomplete."""
    path = tmp_path / "out"
    path.write_bytes(line(NORTH) + text)
    with pytest.raises(ConfigurationError, match="out, line 2, is not the outcome"):
        list(lines(path))
