"""The command line, as a process of its own."""

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, KEY, Done, runner

import audiences_async
from audiences_async.cli import main
from audiences_async.cli.exits import exit_code
from audiences_async.errors import ClientClosedError, DeadlineExceededError, InvalidResponseError, status_error
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox

pytestmark = pytest.mark.measured


@pytest.fixture
def environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Return an environment that leads to the sandbox, with a key."""
    sandbox.add_account(api_key=KEY)
    monkeypatch.setenv("AUDIENCES_API_KEY", KEY)
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    return os.environ


@pytest.fixture
def run(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Return a function that runs the command line in this process."""
    return runner(monkeypatch, capsys)


def test_list_gives_ndjson_when_piped(run: Callable[..., Done]) -> None:
    """Piped, the list is one record per line, as the service sent it, and stderr is empty."""
    done = run("list")
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(EXAMPLE_AUDIENCES)
    assert (done.returncode, done.stderr) == (0, "")


def test_list_as_json(run: Callable[..., Done]) -> None:
    """Write JSON as one array."""
    assert json.loads(run("list", "--output", "json").stdout) == list(EXAMPLE_AUDIENCES)


def test_list_as_csv_loses_nothing(run: Callable[..., Done], sandbox: Sandbox) -> None:
    """Write the documented fields as CSV, and all others as JSON in the last column."""
    odd = {"type": "New", "id": "9", "note": "a,b\n"}
    sandbox.script("default", Answer(body={"status": "200", "data": [*EXAMPLE_AUDIENCES, odd]}))
    rows = list(csv.DictReader(io.StringIO(run("list", "--output", "csv").stdout)))
    assert rows[0] == {**{k: str(v) for k, v in EXAMPLE_AUDIENCES[0].items()}, "extra": ""}
    assert rows[1]["user_count"] == ""
    assert (rows[2]["type"], json.loads(rows[2]["extra"])) == ("New", {"note": "a,b\n"})


def test_list_as_table_escapes_what_a_terminal_would_act_on(run: Callable[..., Done], sandbox: Sandbox) -> None:
    """Show names in the table unchanged, markup and control characters included, without interpreting them."""
    row = {**EXAMPLE_AUDIENCES[1], "name": "[red]\x1b[2J"}
    sandbox.script("default", Answer(body={"status": "200", "data": [EXAMPLE_AUDIENCES[0], row, {"type": "New"}]}))
    shown = run("list", "--output", "table").stdout
    assert r"[red]\x1b[2J" in shown
    assert "2025-11-01 08:30" in shown
    assert "\x1b" not in shown


@pytest.mark.slow
def test_list_gives_a_table_on_a_terminal(environment: Mapping[str, str]) -> None:
    """Print the list as a table on a terminal."""
    parent, child = pty.openpty()
    done = subprocess.run([*COMMAND, "list"], env=environment, stdout=child, timeout=50, check=False)
    os.close(child)
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert done.returncode == 0
    assert "NE_USA-above50" in shown
    assert "created" in shown


def test_the_key_can_come_from_a_file(run: Callable[..., Done], tmp_path: Path) -> None:
    """Accept a key file that ends in a line break; an unreadable one is a usage error."""
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert run("list", "--api-key-file", str(file), AUDIENCES_API_KEY="").returncode == 0
    done = run("list", "--api-key-file", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot read" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "changes", "answer", "code", "told"),
    [
        (["list"], {"AUDIENCES_API_KEY": ""}, None, 4, "no API key"),
        (["list"], {"AUDIENCES_API_KEY": "wrong"}, None, 4, "HTTP 401"),
        (["list"], {}, Answer(403), 4, "HTTP 403"),
        (["list"], {}, Answer(400), 1, "HTTP 400"),
        (["list"], {}, Answer(404), 1, "HTTP 404"),
        (["list"], {}, Answer(200, "<html>"), 1, "cannot be read"),
        (["list"], {}, Answer(429, retry_after=99), 5, "retry after 99 s"),
        (["list", "--max-attempts", "1"], {}, Answer(500), 5, "HTTP 500"),
        (["list", "--timeout", "0.2"], {}, Answer(delay=9), 5, "timeout=0.2 s"),
        (["list", "--max-attempts", "1"], {"AUDIENCES_BASE_URL": "http://127.0.0.1:1/"}, None, 5, "cannot connect"),
        (["list", "--base-url", "http://example.com"], {}, None, 2, "allow_http"),
        (["list", "--max-attempts", "0"], {}, None, 2, "max_attempts"),
        (["list", "--timeout=-1"], {}, None, 2, "timeout"),
        (["list", "--output", "xml"], {}, None, 2, "output"),
        (["lost"], {}, None, 2, "lost"),
        (["list", "--api-key", KEY], {}, None, 2, "Unknown option"),
        (["list"], {}, Answer(408, retry_after=99), 5, "HTTP 408"),
        (["sandbox", "--port", "99999"], {}, None, 1, "99999"),
        (["sandbox", "--rate", "0"], {}, None, 2, "rate"),
        (["sandbox", "--fault-rate", "7"], {}, None, 2, "fault_rate"),
        (["sandbox", "--account", ""], {}, None, 2, "name"),
    ],
)
def test_exit_codes(
    run: Callable[..., Done],
    sandbox: Sandbox,
    arguments: list[str],
    changes: dict[str, str],
    answer: Any,
    code: int,
    told: str,
) -> None:
    """Exit with the code for each kind of failure, and report it on stderr without a traceback."""
    if answer is not None:
        sandbox.script("default", answer)
    done = run(*arguments, **changes)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line_and_a_hint(run: Callable[..., Done]) -> None:
    """Print a message and a hint; the traceback appears with --debug only, and never with the key."""
    done = run("list", AUDIENCES_API_KEY="wrong-key")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: account 'default': HTTP 401 Unauthorized")
    assert hint == "hint: check the account's API key in the management console"
    debugged = run("list", "--debug", AUDIENCES_API_KEY="wrong-key").stderr
    assert "Traceback" in debugged
    assert "wrong-key" not in debugged


@pytest.mark.slow
def test_the_demo_absorbs_and_says_so(run: Callable[..., Done]) -> None:
    """End the demo with exit code 0 after a 429, a 500 and a reset; a seed gives the same output twice."""
    command = [*COMMAND, "demo", "--seed", "7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        here = run(*command[-3:])
        shown, said = process.communicate(timeout=50)
    assert (process.returncode, here.returncode) == (0, 0)
    assert (shown, said) == (here.stdout, here.stderr)
    flat = " ".join(shown.split())
    for absorbed in ("HTTP 429 Too Many Requests", "HTTP 500 Internal Server Error", "connection was closed or reset"):
        assert absorbed in flat
    for name in ("north", "east", "south", "NE_USA-above50"):
        assert name in shown


@pytest.mark.slow
def test_the_sandbox_serves_until_interrupted(run: Callable[..., Done]) -> None:
    """Print the variables that a client needs, serve, and end on Ctrl-C."""
    arguments = [*COMMAND, "sandbox", "--account", "north", "--account", "south", "--audiences", "3"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip().split("=", 1) for _ in range(3)]
        assert [name for name, _ in lines] == ["AUDIENCES_BASE_URL", "AUDIENCES_API_KEY", "AUDIENCES_API_KEY"]
        done = run("list", AUDIENCES_BASE_URL=lines[0][1], AUDIENCES_API_KEY=lines[2][1])
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["south-0", "south-1", "south-2"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


@pytest.mark.slow
def test_ctrl_c_ends_a_list_with_130(environment: Mapping[str, str], sandbox: Sandbox) -> None:
    """Exit an interrupted list with 130 and no traceback."""
    sandbox.script("default", Answer(delay=30))
    with subprocess.Popen([*COMMAND, "list"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        sandbox.wait_for_requests(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=20) == 130


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(environment: Mapping[str, str]) -> None:
    """End the command quietly if the pipe is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "list"], env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=50, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(environment: Mapping[str, str]) -> None:
    """Report an unwritable stdout."""
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "list"], env=environment, stdout=full, stderr=subprocess.PIPE, timeout=50, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"error: cannot write: [Errno 28] No space left on device\n")


@pytest.mark.slow
def test_a_closed_stdout_is_one_line(environment: Mapping[str, str]) -> None:
    """Fail a command that has data to write if stdout is closed."""
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "list"], env=environment, capture_output=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"error: cannot write: [Errno 9] Bad file descriptor\n")


@pytest.mark.slow
def test_a_table_in_a_locale_without_its_letters(environment: Mapping[str, str]) -> None:
    """Print a table in a locale without its characters."""
    narrow = {**environment, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*COMMAND, "list", "--output", "table"], env=narrow, capture_output=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"NE_USA-above50" in done.stdout


def test_ctrl_c_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit with 130 on an interrupt while the command is still being imported."""

    class Interrupted:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "audiences_async.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "audiences_async.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130


def test_version_and_help(run: Callable[..., Done]) -> None:
    """Version and help go to stdout."""
    assert run("--version").stdout == "0.2.0\n"
    assert "sandbox" in run("--help").stdout


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Name the missing extra if cyclopts or rich is not installed."""
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    monkeypatch.delitem(sys.modules, "audiences_async.cli.app", raising=False)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "audiences_async[cli]" in capsys.readouterr().err


def test_a_broken_installation_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another module is missing, its own error is raised."""
    monkeypatch.setitem(sys.modules, "tenacity", None)
    for name in [name for name in sys.modules if name.startswith("audiences_async")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="tenacity"):
        main()


def test_the_rest_of_the_exit_codes() -> None:
    """Return the exit codes of the other errors too."""
    met = [DeadlineExceededError("x"), InvalidResponseError("x"), ClientClosedError("x"), status_error(302, "")]
    assert [exit_code(error) for error in met] == [5, 1, 1, 1]


def test_help_lists_the_pages_and_prints_one(run: Callable[..., Done]) -> None:
    """List the pages with their titles; print a page as it is if piped, and formatted on a terminal."""
    assert "exit-codes     Exit codes\n" in run("help").stdout
    page = (Path(audiences_async.__file__).parent / "help" / "exit-codes.md").read_text(encoding="utf-8")
    assert run("help", "exit-codes").stdout == page
    formatted = run("help", "exit-codes", FORCE_COLOR="1").stdout
    assert "Exit codes" in formatted
    assert "# Exit" not in formatted


def test_help_of_an_unknown_topic_names_the_others(run: Callable[..., Done]) -> None:
    """Exit with 2, and list the topics."""
    done = run("help", "nothing")
    assert (done.returncode, "the pages are agents, architecture" in done.stderr) == (2, True)
