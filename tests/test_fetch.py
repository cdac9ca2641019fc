"""``audiences fetch``: every account of a file exactly once, whatever ends the process."""

import contextlib
import csv
import json
import os
import pty
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from command import COMMAND, KEY, Done, counted, runner

from audiences_async import events
from audiences_async._http import wire
from audiences_async._jobs import outcome_files
from audiences_async.cli import summary
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox, many_audiences

TIMES = r"([\d.e-]+)/([\d.e-]+)/([\d.e-]+) s"


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line in this process, against the sandbox."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    return runner(monkeypatch, capsys)


def account_file(folder: Path, names: Sequence[str]) -> Path:
    """Write a CSV file of accounts, each with its own key."""
    file = folder / "accounts.csv"
    file.write_text("name,api_key\n" + "".join(f"{name},{KEY}-{name}\n" for name in names))
    return file


def opened(sandbox: Sandbox, folder: Path, count: int, fault_rate: float = 0.0) -> Path:
    """Write a file of *count* accounts that the sandbox knows, with 3 audiences each."""
    names = [f"a{number}" for number in range(count)]
    for name in names:
        sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=many_audiences(name, 3), fault_rate=fault_rate)
    return account_file(folder, names)


def fetched(out: Path) -> dict[str, list[str]]:
    """Return the ids of each account of an output, in which each occurs once."""
    told = [json.loads(line) for line in out.read_text().splitlines()]
    ids = {one["account"]: [audience["id"] for audience in one["audiences"]] for one in told}
    assert len(ids) == len(told)
    return ids


def expected(count: int) -> dict[str, list[str]]:
    """Return the audience ids of each account."""
    return {f"a{number}": [f"a{number}-{audience}" for audience in range(3)] for number in range(count)}


def test_every_account_is_a_line(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """Fetch all accounts: exit 0, one line each, and a summary on stderr."""
    accounts, out = opened(sandbox, tmp_path, 30, fault_rate=0.2), tmp_path / "out.ndjson"
    done = run("fetch", "--accounts", str(accounts), "--out", str(out))
    assert (done.returncode, done.stdout) == (0, "")
    (summary,) = done.stderr.splitlines()
    counts, audiences, times, path = summary.split("; ")
    assert (counts, path) == ("30 of 30 accounts fetched, 0 failed", f"written to {out}")
    assert audiences.startswith("90 audiences in ")
    assert re.fullmatch(rf"for each account \(p50/p95/p99\): turn {TIMES}, wire {TIMES}, backoff {TIMES}", times)
    assert fetched(out) == expected(30)


def test_failures_are_lines_too_and_are_summed_up(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """Exit with 7, or 0 if allowed, if some accounts fail; list each reason once with accounts and a hint."""
    accounts, out = opened(sandbox, tmp_path, 6), tmp_path / "out.ndjson"
    for name in ("a0", "a1", "a2", "a3"):
        sandbox.script(name, Answer(403))
    sandbox.script("a4", Answer(200, "<html>"))
    command = ["fetch", "--accounts", str(accounts), "--out", str(out), "--concurrency", "1"]
    done = run(*command)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.splitlines()[:-1] == [
        "  4 × ForbiddenError (HTTP 403): a0, a1, a2 and 1 more",
        "    hint: check what the account's API key may do in the management console",
        "  1 × InvalidResponseError: a4",
        "    hint: the service may have changed; see .problems and .body",
    ]
    assert counted(done.stderr) == "1 of 6 accounts fetched, 5 failed"
    assert fetched(out).keys() == expected(6).keys()
    sandbox.script("a0", Answer(400))
    done = run(*command, "--resume", "--allow-partial")
    assert done.stderr.startswith("  1 × BadRequestError (HTTP 400): a0\n")
    assert (done.returncode, counted(done.stderr)) == (0, "5 of 6 accounts fetched, 1 failed")
    assert len(sandbox.seen("a5")) == 1
    assert run(*command, "--resume").returncode == 0
    assert fetched(out) == expected(6)


@pytest.mark.parametrize("arguments", [["list"], ["fetch", "--log-format", "json"]])
def test_production_by_default_is_no_surprise(
    run: Callable[..., Done],
    sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Sequence[str],
) -> None:
    """Name the service on stderr if no URL is given and a job begins, or a call fails."""
    monkeypatch.setattr(wire, "PRODUCTION", sandbox.base_url)
    monkeypatch.delenv("AUDIENCES_BASE_URL")
    monkeypatch.setenv("AUDIENCES_API_KEY", "unknown")
    job = ["--accounts", str(opened(sandbox, tmp_path, 1)), "--out", str(tmp_path / "out"), "--resume"]
    command = [*arguments, *(job if arguments[0] == "fetch" else [])]
    done = run(*command)
    assert "requests go to production, https://api.commbox.io/: neither --base-url nor AUDIENCES_BASE" in done.stderr
    assert len(sandbox.requests) == 1
    assert "go to production" not in run(*command, "--base-url", sandbox.base_url).stderr


@pytest.mark.parametrize(
    ("name", "start"),
    [("out.csv", b"account,"), ("out.JSON", b"["), ("out.csv.gz", b"\x1f\x8b"), ("out.jsonl", b'{"account"')],
)
def test_the_file_name_selects_the_format(
    run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path, name: str, start: bytes
) -> None:
    """Write CSV or JSON without --output if the file's extension says so, else NDJSON."""
    command = ["fetch", "--accounts", str(opened(sandbox, tmp_path, 2)), "--out"]
    assert run(*command, str(tmp_path / name)).returncode == 0
    assert (tmp_path / name).read_bytes().startswith(start)
    assert run(*command, str(tmp_path / "other.csv"), "--output", "ndjson").returncode == 0
    assert (tmp_path / "other.csv").read_bytes().startswith(b'{"account"')


@pytest.mark.parametrize("output", ["json", "csv"])
def test_other_formats(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path, output: str) -> None:
    """Write every account as JSON and CSV, with audiences, without, or failed; they can be resumed as well."""
    for name, audiences in (("full", EXAMPLE_AUDIENCES), ("empty", ()), ("bad", ())):
        sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=audiences)
    sandbox.script("bad", Answer(403))
    accounts, out = account_file(tmp_path, ["full", "empty", "bad"]), tmp_path / "out"
    command = ["fetch", "--accounts", str(accounts), "--out", str(out), "--output", output, "--concurrency", "1"]
    assert run(*command).returncode == 7
    error = "account 'bad': HTTP 403 Forbidden"
    if output == "json":
        full, empty, bad = json.loads(out.read_text())
        assert (full["audiences"], empty["audiences"]) == (list(EXAMPLE_AUDIENCES), [])
        assert bad["error"]["message"].startswith(error)
    else:
        first, second, empty, bad = csv.DictReader(out.read_text().splitlines())
        assert (first["account"], second["account"]) == ("full", "full")
        assert (first["id"], second["type"]) == (EXAMPLE_AUDIENCES[0]["id"], "Dynamic")
        assert set(empty.values()) == {"empty", ""}
        assert bad["error"].startswith(error)
    assert run(*command).returncode == 2
    assert run(*command, "--resume").returncode == 0
    assert "Forbidden" not in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--concurrency", "0"], "concurrency must be a whole number"),
        (["--rate", "0"], "rate must be a finite number above 0"),
        (["--timeout", "0"], "timeout must be"),
        (["--max-attempts", "0"], "max_attempts"),
        (["--base-url", "http://example.com"], "allow_http"),
        (["--accounts", "none.csv"], "--accounts"),
        (["--output", "xml"], "output"),
    ],
)
def test_wrong_usage_leaves_no_file(
    run: Callable[..., Done], tmp_path: Path, sandbox: Sandbox, arguments: list[str], told: str
) -> None:
    """Exit with 2 on a usage error, before anything is sent or written."""
    accounts, out = account_file(tmp_path, ["north"]), tmp_path / "out.ndjson"
    done = run("fetch", "--accounts", str(accounts), "--out", str(out), *arguments)
    assert (done.returncode, out.exists(), sandbox.requests) == (2, False, [])
    assert told in done.stderr


def test_a_name_that_comes_twice_is_refused(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """Refuse a file with a duplicate name, since the output is keyed by name, with its line; nothing is sent."""
    accounts = account_file(tmp_path, ["north", "south", "north"])
    done = run("fetch", "--accounts", str(accounts), "--out", str(tmp_path / "out"))
    assert (done.returncode, sandbox.requests) == (2, [])
    assert "line 4, column 1 (name): duplicate name 'north', first defined in line 2" in done.stderr
    assert KEY not in done.stderr


def test_the_rate_holds_for_all_accounts_together(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """Requests of all accounts are spaced by the rate, and no account times out by waiting."""
    accounts = opened(sandbox, tmp_path, 21)
    done = run("fetch", "--accounts", str(accounts), "--out", str(tmp_path / "o"), "--rate", "50", "--timeout", "0.35")
    assert done.returncode == 0
    assert sandbox.requests[-1].at - sandbox.requests[0].at >= 20 / 50 * 0.9


@pytest.mark.parametrize("name", ["out.ndjson", "out.csv"])
def test_a_folder_that_does_not_exist(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    """Name the folder, and promise nothing, if the output cannot be begun."""
    folder = tmp_path / "none"
    done = run("fetch", "--accounts", str(opened(sandbox, tmp_path, 1)), "--out", str(folder / name))
    assert done.stderr == f"error: cannot write {folder}: No such directory\nhint: choose another --out\n"


@pytest.mark.measured
def test_a_check_whose_reader_has_gone(tmp_path: Path) -> None:
    """End in silence if the output of --check is piped into a program that reads no further."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text("name,api_key\n" + "north,\n" * 20)
    command = [*COMMAND, "fetch", "--accounts", str(accounts), "--check"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, told = process.communicate(timeout=50)
    assert (process.returncode, told) == (1, "")


def test_a_pipe_whose_reader_has_gone(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """Name the output if it is a pipe that nothing reads any more."""
    pipe = tmp_path / "out"
    os.mkfifo(pipe)
    accounts = opened(sandbox, tmp_path, 1)
    sandbox.script("a0", Answer(delay=0.2))
    reader = threading.Thread(target=lambda: pipe.open("rb").close())
    reader.start()
    done = run("fetch", "--accounts", str(accounts), "--out", str(pipe))
    reader.join()
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"error: cannot write {pipe}: Broken pipe")


def test_a_disk_that_is_full(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """End the job at once, with one line, if an output cannot be written."""
    accounts = opened(sandbox, tmp_path, 3)
    done = run("fetch", "--accounts", str(accounts), "--out", "/dev/full")
    assert (done.returncode, done.stdout) == (1, "")
    hint = "hint: fetched accounts are kept; use --resume to continue\n"
    told = f"error: cannot write /dev/full: No space left on device\n{hint}"
    assert done.stderr == told


@pytest.mark.slow
def test_progress_on_a_terminal(sandbox: Sandbox, tmp_path: Path) -> None:
    """Show the number of finished accounts, their rate, and the number of failures on a terminal."""
    accounts = opened(sandbox, tmp_path, 5)
    sandbox.script("a0", Answer(403))
    parent, child = pty.openpty()
    command = [*COMMAND, "fetch", "--accounts", str(accounts), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(sandbox), stderr=child, timeout=50, check=False)
    os.close(child)
    shown = os.read(parent, 100_000).decode()
    os.close(parent)
    assert done.returncode == 7
    assert "5 of 5 accounts" in shown
    assert "1 failed" in shown
    assert "accounts/s" in shown


def environment(sandbox: Sandbox) -> Mapping[str, str]:
    """Return the environment of a command that calls the sandbox."""
    return {**os.environ, "AUDIENCES_BASE_URL": sandbox.base_url}


@contextlib.contextmanager
def started(sandbox: Sandbox, accounts: Path, out: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a fetch in its own process."""
    command = [*COMMAND, "fetch", "--accounts", str(accounts), "--out", str(out), *arguments]
    with subprocess.Popen(command, env=environment(sandbox), stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(sandbox: Sandbox, tmp_path: Path) -> None:
    """Print the progress and how to continue when interrupted; the file has exactly those accounts."""
    accounts, out = opened(sandbox, tmp_path, 10), tmp_path / "out.ndjson"
    sandbox.script("a5", Answer(delay=60.0))
    with started(sandbox, accounts, out, "--concurrency", "1") as process:
        sandbox.wait_for_requests(6)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told == (
        "error: interrupted; 5 of 10 accounts are fetched and kept\n"
        "hint: run the same command with --resume to continue\n"
    )
    assert fetched(out) == expected(5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.once
def test_kill_9_at_any_moment_loses_and_doubles_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    """Killed three times during 2,500 accounts, and resumed, it writes every account exactly once."""
    accounts, out = opened(sandbox, tmp_path, 2_500), tmp_path / "out.ndjson"
    moments = random.Random(4).sample(range(100, 600), 3)
    for moment in moments:
        with started(sandbox, accounts, out, "--resume") as process:
            sandbox.wait_for_requests(len(sandbox.requests) + moment)
            process.send_signal(signal.SIGKILL)
        assert 0 < len(list(outcome_files.lines(out))) < 2_500
    with started(sandbox, accounts, out, "--resume") as process:
        _, told = process.communicate(timeout=50)
    assert (process.returncode, counted(told)) == (0, "2,500 of 2,500 accounts fetched, 0 failed")
    assert fetched(out) == expected(2_500)
    # At most the requests in flight at each kill were repeated.
    assert len(sandbox.requests) <= 2_500 + 3 * 200


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timeout(180)  # with coverage, beside other tests
def test_thousands_of_accounts_with_faults(tmp_path: Path) -> None:
    """Write 3,000 lines, each with its own audiences, for 3,000 accounts with a tenth of all answers wrong."""
    accounts, out = account_file(tmp_path, [f"a{number}" for number in range(3_000)]), tmp_path / "out.ndjson"
    serve = [*COMMAND, "sandbox", "--accounts", str(accounts), "--audiences", "3", "--fault-rate", "0.1"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        stack.callback(server.kill)  # or a fetch that fails would have the test wait for ever
        assert server.stdout is not None
        address = server.stdout.readline().strip().partition("=")[2]
        command = [*COMMAND, "fetch", "--accounts", str(accounts), "--out", str(out), "--base-url", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
        server.send_signal(signal.SIGINT)
        printed, _ = server.communicate(timeout=30)
    assert (done.returncode, counted(done.stderr)) == (0, "3,000 of 3,000 accounts fetched, 0 failed")
    assert fetched(out) == expected(3_000)
    assert KEY not in printed


def test_what_a_job_meets_of_the_service_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show an outage and a shared limit while they last, and sum them up at the end with a hint."""
    now = 1000.0
    monkeypatch.setattr("audiences_async.cli.summary.time.monotonic", lambda: now)
    log = summary.ServiceLog()
    assert (log.now(), list(log.advice())) == ("", [])
    log(events.ServicePaused("", 0.3, asked=False, state="out"))
    now += 5.0
    log(events.ServicePaused("", 2.0, asked=False, state="out"))
    assert log.now() == "no answer for 5 s, next probe in 2 s"
    refused = events.Attempt(1, None, "cannot connect to 127.0.0.1", 0.1, 0.0, "final")
    log(events.AttemptFinished("a0", refused, call_id="id"))
    assert log.now() == "no answer for 5 s (cannot connect to 127.0.0.1), next probe in 2 s"
    assert next(log.advice()).startswith("  no answer from the service for 5 s in total (cannot connect to 127.0.0.1);")
    assert log.learned() == {"outage_seconds": 5.0}
    log(events.ServiceResumed(""))
    log(events.ServiceResumed(""))
    log(events.ServiceRateLearned("", 49.7, per=10.0))
    assert log.now() == "limited to 49.7/s"
    assert "49.7 requests/s, in windows of 10 s" in "\n".join(log.advice())
    log(events.ServiceRateLearned("", 49.7))
    told = "\n".join(log.advice())
    assert "no answer from the service for 5 s in total" in told
    assert "use --rate 50 to stay within it" in told
    log(events.CallStarted("north"))
    log(events.ServiceConcurrencyLearned("", 10))
    assert "use --concurrency 10 to stay within it" in "\n".join(log.advice())
    assert log.now() == ""
