"""The command line in use: it destroys no file, loses no account, and ends cleanly, with or without a terminal."""

import contextlib
import csv
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import SIG_DFL, SIGHUP, SIGINT, SIGTERM, Signals
from subprocess import PIPE
from typing import Any

import pytest
from attrs import define
from command import COMMAND, KEY, Done, counted, runner

from audiences_async.sandbox import Answer, Sandbox

FORMATS = ["ndjson", "csv", "json"]
NAMES = ["a0", "a1", "a2", "a3"]
TRICKY = ["eu:id:42", "[red]x[/red]", ":smile:", "[/]", r"\[b]"]
UUIDS = ["31e7a1c4-6f0b-4d5e-9b1a-2f6c8d7e9a01", "31e7a1c4-6f0b-4d5e-9b1a-2f6c8d7e9a02"]
ONE_AUDIENCE = {"name": "n", "created_time": "2025-10-01T09:10:00Z", "type": "Dynamic"}
KEYS = b'{"name":"a0","api_key":"k0"}\n{"name":"a1","api_key":"k1"}\n'
NOT_OUTCOMES = [
    *(b'{"name":"a0"}\n', b'{"account":"a0","balance":3}\n', b"[]\n", b"\n", b"precious\n", b"\x89PNG\r\n\x1a\n\x00"),
    *(b'{"account":"a0","ok":true,"balance":3}\n', b'{"account":"a0","ok":false,"note":"precious"}\n'),
    *(b"precious", b'{"account":"a0","balance":3}', b'{"account": "a0", "balance'),  # not the beginning of an outcome
]
OTHERS = {
    "csv": [b"name,plan\nnorth,pro\n", b"account,id,name\nnorth,1,p\n", b'{"account":"a0","ok":true}\n'],
    "json": [b'{"precious": 1}\n', b"[1, 2]\n", b'[\n{"name":"a0"}\n]\n', b"account,id,name,type\r\n"],
}
NO_INT = "trap '' INT"  # as a shell starts a background job


@define
class Job:
    """A fetch of some accounts, and its files."""

    command: Callable[..., Done]
    sandbox: Sandbox
    folder: Path
    accounts: Path
    out: Path

    def checkpoint(self, output: str) -> Path:
        """Return the file that ``--resume`` reads for this format."""
        return self.out if output == "ndjson" else self.folder / "out.ndjson"

    def open(self, names: Sequence[str] = NAMES) -> None:
        """Write the accounts file, and open its accounts in the sandbox with one audience each."""
        self.accounts.write_text("name,api_key\n" + "".join(f"{name},{KEY}-{name}\n" for name in names))
        for name in names:
            self.sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=[{"id": f"id-{name}", **ONE_AUDIENCE}])

    def arguments(self, output: str, *more: str) -> list[str]:
        """Return the command's arguments."""
        return ["fetch", "--accounts", str(self.accounts), "--out", str(self.out), "--output", output, *more]

    def run(self, output: str = "ndjson", *more: str) -> Done:
        """Fetch in this process."""
        return self.command(*self.arguments(output, *more))

    def end(self, *arguments: str, before: str = ":", redirection: str = "") -> Done:
        """Run a command to its end in a process of its own."""
        with self.start(*arguments, before=before, redirection=redirection, stdout=PIPE, stderr=PIPE) as process:
            told = process.communicate(timeout=30)
        return Done(process.returncode, *told)

    @contextlib.contextmanager
    def start(
        self, *arguments: str, before: str = ":", redirection: str = "", **streams: Any
    ) -> Iterator["subprocess.Popen[str]"]:
        """Start a command as a shell does, after *before* and with *redirection*; it cannot outlive the block."""
        redirection = redirection if ">" in redirection else ""  # else a kind of `leaving`
        env = {**os.environ, "AUDIENCES_API_KEY": "refused"}
        shell = ["sh", "-c", f'{before} && exec "$@" {redirection}', "sh", *COMMAND, *arguments]
        with subprocess.Popen(shell, env=env, text=True, start_new_session=True, **streams) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def job(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Job]:
    """Yield a job of four accounts; its processes do not ignore SIGHUP, even if the tests do."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    job = Job(runner(monkeypatch, capsys), sandbox, tmp_path, tmp_path / "accounts.csv", tmp_path / "out")
    job.open()
    before = signal.signal(SIGHUP, SIG_DFL)
    yield job
    signal.signal(SIGHUP, before)


def fetched(out: Path, output: str = "ndjson") -> list[tuple[str, str]]:
    """Return each account with the id of its audience, sorted."""
    text = out.read_text()
    if output == "csv":
        return sorted((row["account"], row["id"]) for row in csv.DictReader(text.splitlines()))
    lines = json.loads(text) if output == "json" else [json.loads(line) for line in text.splitlines()]
    return sorted((line["account"], line["audiences"][0]["id"]) for line in lines)


def expected(names: Sequence[str] = NAMES) -> list[tuple[str, str]]:
    """Return the account and audience id of every row."""
    return sorted((name, f"id-{name}") for name in names)


@contextlib.contextmanager
def leaving(kind: str) -> Iterator[tuple[Callable[[], None], int]]:
    """Yield a function that makes a stream refuse further writes, and the stream."""
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    with os.fdopen(reader, "rb") as read, os.fdopen(writer, "wb", buffering=0) as stream:

        def leave() -> None:
            if kind == "full pipe":
                os.set_blocking(writer, False)
                while stream.write(bytes(4096)):
                    pass
            else:
                read.close()

        yield leave, writer


def other_path(file: Path, spelling: str) -> Path:
    """Return another path of the same file."""
    folder = file.parent / "sub"
    folder.mkdir()
    match spelling:
        case "relative":
            return Path(os.path.relpath(file))
        case "detour":
            return folder / ".." / file.name
        case "linked directory":
            (folder / "link").symlink_to(file.parent, target_is_directory=True)
            return folder / "link" / file.name
        case "symbolic link":
            (folder / "other.ndjson").symlink_to(file)
        case "hard link":
            (folder / "other.ndjson").hardlink_to(file)
        case _:
            return file
    return folder / "other.ndjson"


# Nothing is destroyed.


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
@pytest.mark.parametrize("spelling", ["same", "relative", "detour", "linked directory", "symbolic link", "hard link"])
@pytest.mark.parametrize(
    ("output", "beside"), [("ndjson", False), ("csv", False), ("json", False), ("csv", True), ("json", True)]
)
def test_the_accounts_file_is_never_written_to(
    job: Job, output: str, beside: bool, spelling: str, resume: list[str]
) -> None:
    """Refuse an output or a checkpoint that is the accounts file, by any path, before the first request."""
    job.accounts = job.folder / "accounts.ndjson"
    job.accounts.write_bytes(KEYS)
    path = other_path(job.accounts, spelling)
    job.out = path.with_suffix("") if beside else path
    done = job.run(output, *resume)
    assert (done.returncode, job.sandbox.requests, job.accounts.read_bytes()) == (2, [], KEYS)
    assert "accounts file" in done.stderr
    assert path.samefile(job.accounts)


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
@pytest.mark.parametrize(
    ("output", "name", "content"),
    [
        *(("ndjson", "out", content) for content in NOT_OUTCOMES),
        *(("csv", "out.ndjson", content) for content in NOT_OUTCOMES),
        *((output, "out", content) for output, contents in OTHERS.items() for content in contents),
    ],
)
def test_a_file_of_other_content_is_never_written_to(
    job: Job, output: str, name: str, content: bytes, resume: list[str]
) -> None:
    """Refuse an existing file that this command has not written as output or checkpoint, and keep it unchanged."""
    file = job.folder / name
    file.write_bytes(content)
    done = job.run(output, *resume)
    assert (done.returncode, job.sandbox.requests, file.read_bytes()) == (2, [], content)
    assert f"{file}" in done.stderr


@pytest.mark.parametrize("output", FORMATS)
def test_a_checkpoint_of_other_accounts_is_refused(job: Job, output: str) -> None:
    """Refuse a checkpoint with an account that the accounts file lacks; no outcome in it is lost."""
    assert job.run(output).returncode == 0
    job.open(NAMES[1:])
    files = (job.out, job.checkpoint(output))
    before = [file.read_bytes() for file in files]
    done = job.run(output, "--resume")
    assert (done.returncode, len(job.sandbox.requests)) == (2, len(NAMES))
    assert [file.read_bytes() for file in files] == before
    assert "'a0'" in done.stderr


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize("kept", [1, 12, 20, -40, -1])
def test_a_torn_checkpoint_is_continued(job: Job, output: str, kept: int) -> None:
    """Fetch a last line that a crash has cut anywhere again, and replace an earlier output of this command."""
    assert job.run(output, "--concurrency", "1").returncode == 0
    torn = job.checkpoint(output)
    *whole, last = torn.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(whole) + last[:kept])
    assert job.run(output, "--resume").returncode == 0
    assert fetched(job.out, output) == expected()
    assert len(job.sandbox.requests) == len(NAMES) + 1


# A file keeps its mode, its owner and its place.


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_resuming_keeps_mode_and_owner(job: Job, output: str, mode: int) -> None:
    """Keep the mode and the owner of an output that is resumed, or written again at the end."""
    job.sandbox.script("a1", Answer(403))
    assert job.run(output).returncode == 7
    owner = 12345 if os.geteuid() == 0 else os.geteuid()
    files = (job.out, job.checkpoint(output))
    for file in files:
        os.chown(file, owner, -1)
        file.chmod(mode)
    assert job.run(output, "--resume").returncode == 0
    assert {(oct(file.stat().st_mode & 0o7777), file.stat().st_uid) for file in files} == {(oct(mode), owner)}
    assert fetched(job.out, output) == expected()


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "link"])
def test_an_empty_file_is_filled_in_its_place(job: Job, output: str, linked: bool) -> None:
    """Keep the mode of an empty output with mode 0600; a symbolic link to one stays a link."""
    real = job.folder / "real" if linked else job.out
    real.touch(0o600)
    if linked:
        job.out.symlink_to(real)
    assert job.run(output).returncode == 0
    assert job.out.is_symlink() == linked
    assert (oct(real.stat().st_mode & 0o7777), fetched(real, output)) == ("0o600", expected())


# An unwritable output is detected first.


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    ("output", "name", "kind"),
    [
        *((output, "out", kind) for output in FORMATS for kind in ("directory", "no directory")),
        *((output, "out", kind) for output in ("csv", "json") for kind in ("device", "pipe")),
        *(("csv", "out.ndjson", kind) for kind in ("directory", "device", "pipe")),
        *((output, "/proc/out", "no permission") for output in FORMATS),
    ],
)
def test_a_target_that_cannot_be_written_costs_no_request(job: Job, output: str, name: str, kind: str) -> None:
    """Report an unwritable output or checkpoint before the first request."""
    file = job.folder / name
    match kind:
        case "directory":
            file.mkdir()
        case "no directory":
            file = file / "out"
        case "device":
            file.symlink_to("/dev/null")
        case "pipe":
            os.mkfifo(file)
    job.out = job.out if name == "out.ndjson" else file
    done = job.run(output)
    assert done.returncode in {1, 2}
    assert (job.sandbox.requests, done.stderr.startswith("error: ")) == ([], True)


@pytest.mark.parametrize("output", ["csv", "json"])
@pytest.mark.parametrize("length", [220, 240, 248, 255])
def test_a_name_that_is_almost_too_long(job: Job, output: str, length: int) -> None:
    """Write an output with a long name, or report an error before the first request; never after the last."""
    job.out = job.folder / ("o" * length)
    done = job.run(output)
    assert (done.returncode == 0, len(job.sandbox.requests)) in {(True, len(NAMES)), (False, 0)}


# Problems with the terminal never change the result.


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.measured
def test_a_fetch_without_its_streams(job: Job, redirection: str) -> None:
    """Fetch all accounts, write the CSV and exit with 0 if standard streams are closed or full."""
    done = job.end(*job.arguments("csv"), redirection=redirection)
    assert (done.returncode, done.stdout) == (0, "")
    assert fetched(job.out, "csv") == fetched(job.checkpoint("csv")) == expected()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["terminal", "pipe", "full pipe", "nohup"])
@pytest.mark.measured
def test_a_terminal_that_goes_away_during_a_fetch(job: Job, kind: str) -> None:
    """Keep output and exit code if stderr disappears or blocks, or on a SIGHUP under nohup."""
    job.sandbox.script("a2", Answer(delay=0.4))
    command, before = job.arguments("csv", "--concurrency", "1"), "trap '' HUP" if kind == "nohup" else ":"
    with leaving(kind) as (leave, stream), job.start(*command, before=before, stderr=stream) as process:
        job.sandbox.wait_for_requests(3, timeout=5)
        leave()
        if kind == "nohup":
            process.send_signal(SIGHUP)
        assert process.wait(timeout=20) == 0
    assert fetched(job.out, "csv") == expected()


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGHUP, SIGTERM, SIGINT])
@pytest.mark.parametrize("away", ["terminal", "2>&-"])
def test_a_signal_without_a_terminal(job: Job, away: str, number: Signals) -> None:
    """End a fetch by SIGHUP when its window closes: accounts are kept, and the exit code is the signal's."""
    job.sandbox.script("a2", Answer(delay=60.0))
    command = job.arguments("csv", "--concurrency", "1")
    with leaving(away) as (leave, stream), job.start(*command, stderr=stream, redirection=away) as process:
        job.sandbox.wait_for_requests(3, timeout=5)
        leave()
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
    assert fetched(job.checkpoint("csv")) == expected(NAMES[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("away", "arguments", "code"),
    [
        *((away, "", 4) for away in ("2>&-", "2>/dev/full", ">&- 2>&-", "terminal", "pipe", "full pipe")),
        *((away, "--debug", 4) for away in ("2>/dev/full", "pipe")),
        *((away, "--output xml", 2) for away in ("2>&-", "pipe")),
    ],
)
def test_an_error_that_cannot_be_shown(job: Job, away: str, arguments: str, code: int) -> None:
    """Exit with the code of a refused key or a usage error, whether or not the reason can be shown."""
    with leaving(away) as (leave, stream):
        leave()
        with job.start("list", *arguments.split(), stderr=stream, redirection=away) as process:
            assert process.wait(timeout=30) == code


# Names and arguments are shown unchanged.


@pytest.mark.parametrize(
    "names", [TRICKY, [f"customer-of-the-north-west-{each}" for each in UUIDS]], ids=["odd", "long"]
)
def test_names_are_shown_unchanged_in_the_summary(job: Job, names: list[str]) -> None:
    """Repeat names that look like markup or emoji unchanged, and show long names whole."""
    job.open(names)
    for name, status in zip(names, (400, 403, 404, 405, 409), strict=False):
        job.sandbox.script(name, Answer(status))
    done = job.run()
    assert done.returncode == 7
    assert [name for name in names if f": {name}\n" not in done.stderr] == []


@pytest.mark.parametrize("name", TRICKY)
@pytest.mark.parametrize(
    "command",
    [
        *("{}", "list {}", "list --{}", "list --output {}", "list --timeout {}", "list --api-key-file no/{}"),
        *("fetch --accounts no/{}.csv --out out", "doctor --api-key-file no/{}", "sandbox --account ok --rate {}"),
    ],
)
def test_arguments_are_repeated_unchanged(job: Job, command: str, name: str) -> None:
    """Repeat an argument in an error without interpreting it as markup or emoji."""
    done = job.command(*command.format(name).split(), AUDIENCES_API_KEY=KEY)
    assert done.returncode == 2
    assert name in done.stderr


@pytest.mark.parametrize("name", TRICKY)
def test_names_in_errors_and_tables_are_unchanged(job: Job, name: str) -> None:
    """Neither a table nor the message about a duplicate account changes a name or an id."""
    row = {**ONE_AUDIENCE, "id": name, "name": f"<{name}>", "type": f"!{name}"}
    job.sandbox.add_account(api_key=KEY, audiences=[row])
    shown = job.command("list", "--output", "table", AUDIENCES_API_KEY=KEY).stdout
    assert [text for text in (f" {name} ", f"<{name}>", f"!{name}") if text not in shown] == []
    job.open([name, name])
    assert f"duplicate name '{name}'" in job.run().stderr


@pytest.mark.parametrize("columns", ["80", "40"])
@pytest.mark.parametrize(
    "ids",
    [UUIDS, [f"{'x y ' * 30}{end}" for end in "ab"], [f"{'1' * 300}{end}" for end in "ab"]],
    ids=["uuid", "words", "300"],
)
def test_long_ids_are_whole_in_a_table(job: Job, ids: list[str], columns: str) -> None:
    """Fold an id or a name that is wider than its column instead of cutting it."""
    rows = [{**ONE_AUDIENCE, "id": each, "name": f"of {each}"} for each in ids]
    job.sandbox.add_account(api_key=KEY, audiences=rows)
    shown = job.command("list", "--output", "table", AUDIENCES_API_KEY=KEY, COLUMNS=columns).stdout
    cells = [line.split("│")[1:3] for line in shown.splitlines() if line.startswith("│")]
    for number, field in enumerate(("id", "name")):
        text = "".join(row[number] for row in cells).replace(" ", "")
        assert text == "".join(row[field] for row in rows).replace(" ", "")


# Rate, connections, signals.


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", ["1", "100"])
@pytest.mark.parametrize(("timeout", "first"), [("0.4", Answer()), ("0.9", Answer(500))], ids=["answered", "retried"])
def test_waiting_for_the_rate_takes_no_time(job: Job, concurrency: str, timeout: str, first: Answer) -> None:
    """Wait as long as needed for a turn with --rate, a retry's too, while the account's timeout does not run."""
    job.sandbox.script("a0", first)
    done = job.run("ndjson", "--rate", "2", "--timeout", timeout, "--concurrency", concurrency)
    assert (done.returncode, counted(done.stderr)) == (0, "4 of 4 accounts fetched, 0 failed")
    requests = job.sandbox.requests
    assert requests[-1].at - requests[0].at >= (len(requests) - 1) / 2 * 0.9


@pytest.mark.slow
@pytest.mark.parametrize("limit", [40, 20])
@pytest.mark.measured
def test_few_files_may_be_open(job: Job, limit: int) -> None:
    """Use fewer connections under a low limit on open files, and lose no account."""
    names = [f"a{number}" for number in range(300)]
    job.open(names)
    for name in names:
        job.sandbox.script(name, Answer(delay=0.05))
    done = job.end(*job.arguments("csv"), before=f"ulimit -n {limit}")
    assert (done.returncode, counted(done.stderr)) == (0, "300 of 300 accounts fetched, 0 failed")
    assert fetched(job.out, "csv") == expected(names)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["ndjson", "csv"])
@pytest.mark.parametrize(
    ("number", "before"), [(SIGINT, ":"), (SIGTERM, ":"), (SIGHUP, ":"), (SIGTERM, NO_INT), (SIGHUP, NO_INT)]
)
@pytest.mark.measured
def test_a_signal_ends_a_fetch_in_order(job: Job, number: Signals, before: str, output: str) -> None:
    """Print how to continue a fetch that a signal ended, in a background job too; --resume completes it."""
    job.sandbox.script("a2", Answer(delay=60.0))
    with job.start(*job.arguments(output, "--concurrency", "1"), before=before, stderr=PIPE) as process:
        job.sandbox.wait_for_requests(3, timeout=5)
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    hint = "hint: run the same command with --resume to continue\n"
    assert told == f"error: interrupted; 2 of 4 accounts are fetched and kept\n{hint}"
    assert fetched(job.checkpoint(output)) == expected(NAMES[:2])
    assert job.run(output, "--resume").returncode == 0
    assert fetched(job.out, output) == expected()
