"""The command line without POSIX-only features: a process from which they were removed, as on Windows."""

import csv
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from command import counted

from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox

pytestmark = [pytest.mark.once, pytest.mark.slow, pytest.mark.measured]

# The standard library and filelock are imported first: they have their own code for Windows.
WINDOWS = """
import asyncio, concurrent.futures, contextlib, logging, multiprocessing, os, select, selectors, signal, socket, ssl
import subprocess, sys, tempfile, threading, uuid
with contextlib.suppress(ImportError):
    import filelock
    filelock.FileLock = filelock.SoftFileLock

LACKING = {
    os: "chown fchmod fchown fork getegid geteuid getgid getuid killpg lchown mkfifo setsid sysconf uname",
    select: "epoll poll",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 pause pthread_sigmask setitimer sigwait",
}
for module, names in LACKING.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None

def refused(*_):
    raise NotImplementedError

asyncio.SelectorEventLoop.add_signal_handler = refused

def only_closed(change):
    def changed(*paths, **options):
        numbers = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ()
        in_use = {os.path.realpath(f"/proc/self/fd/{number}") for number in numbers}
        for path in paths:
            if os.path.realpath(path) in in_use and not os.fspath(path).endswith(".lock"):
                raise PermissionError(13, "The file is being used by another process", os.fspath(path))
        return change(*paths, **options)
    return changed

for name in ("remove", "rename", "replace", "unlink"):
    setattr(os, name, only_closed(getattr(os, name)))

from audiences_async.cli import main
main()
"""
Start: TypeAlias = Callable[..., "subprocess.Popen[str]"]
ON_WINDOWS = [sys.executable, "-c", WINDOWS]


@pytest.fixture(autouse=True)
def accounts(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Write a file with the accounts north and south; the environment leads to the sandbox, with the key of north."""
    keys = [sandbox.add_account(name).api_key for name in ("north", "south")]
    monkeypatch.setenv("AUDIENCES_API_KEY", str(keys[0]))
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    file = tmp_path / "accounts.csv"
    file.write_text(f"name,api_key\nnorth,{keys[0]}\nsouth,{keys[1]}\n")
    return file


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command of that process; it is killed at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*ON_WINDOWS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with process:
            process.kill()


def run(*arguments: str) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a command."""
    done = subprocess.run(
        [*ON_WINDOWS, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=50, check=False
    )
    return done.returncode, done.stdout, done.stderr


def fetch(accounts: Path, out: Path, *options: str) -> tuple[int, str, str]:
    """Fetch accounts; return the exit code, stdout and stderr."""
    return run("fetch", "--accounts", str(accounts), "--out", str(out), *options)


def test_list_and_doctor() -> None:
    """The audiences of an account are listed, and every check is made."""
    code, stdout, stderr = run("list")
    assert (code, [json.loads(line) for line in stdout.splitlines()], stderr) == (0, list(EXAMPLE_AUDIENCES), "")
    code, stdout, stderr = run("doctor")
    assert (code, [line.split()[1] for line in stdout.splitlines() if line.startswith("ok ")], stderr) == (
        *(0, ["key", "name", "connect", "request", "quota", "clock"], ""),
    )


@pytest.mark.parametrize("output", ["ndjson", "csv"])
def test_fetch_and_resume(sandbox: Sandbox, accounts: Path, tmp_path: Path, output: str) -> None:
    """Every account is fetched into a file; resumed, the job fetches only the failed one again."""
    sandbox.script("south", Answer(404))
    out = tmp_path / f"out.{output}"
    assert fetch(accounts, out, "--output", output)[0] == 7
    code, printed, told = fetch(accounts, out, "--output", output, "--resume")
    assert (code, printed, counted(told)) == (0, "", "2 of 2 accounts fetched, 0 failed")
    assert [request.account for request in sandbox.requests].count("north") == 1
    checkpoint = out if output == "ndjson" else tmp_path / "out.csv.ndjson"
    assert len(checkpoint.read_text("utf-8").splitlines()) == 2
    if output == "csv":
        rows = list(csv.DictReader(out.read_text("utf-8").splitlines()))
        assert sorted(row["account"] for row in rows) == ["north", "north", "south", "south"]


def test_one_process_at_a_time(sandbox: Sandbox, accounts: Path, tmp_path: Path, start: Start) -> None:
    """A second job on the same output is refused; Ctrl-C ends the first one, which can be resumed."""
    sandbox.script("south", Answer(delay=60))
    out = tmp_path / "out.ndjson"
    first = start("fetch", "--accounts", str(accounts), "--out", str(out))
    sandbox.wait_for_requests(2)
    code, stdout, stderr = fetch(accounts, out, "--resume")
    assert (code, stdout) == (2, "")
    assert "being written by another process" in stderr
    first.send_signal(signal.SIGINT)
    assert "--resume" in first.communicate(timeout=20)[1]
    assert first.returncode == 130
    assert fetch(accounts, out, "--resume")[0] == 0


def test_sandbox(start: Start) -> None:
    """The sandbox starts, answers, and ends on Ctrl-C."""
    server = start("sandbox")
    assert server.stdout is not None
    base_url, key = (server.stdout.readline().rstrip("\n").partition("=")[2] for _ in range(2))
    assert base_url, server.communicate()[1]
    request = urllib.request.Request(f"{base_url}audiences", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert len(json.load(answer)["data"]) == 20
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=20)
    assert server.returncode == 0
