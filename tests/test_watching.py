"""Watching a job: progress without a terminal, the summary, metrics, the client's log, and completion."""

import asyncio
import json
import logging
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import KEY, Done, runner
from prometheus_client.parser import text_string_to_metric_families

from audiences_async import events
from audiences_async.cli import app as cli
from audiences_async.cli import progress as showing
from audiences_async.cli import summary
from audiences_async.cli.log import Log
from audiences_async.cli.progress import Watch, progress
from audiences_async.cli.summary import Tally
from audiences_async.cli.timing import Distribution, Timing
from audiences_async.sandbox import Answer, Sandbox, many_audiences

NAMES = ["a0", "a1", "a2"]


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line in this process, with three accounts."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    for name in NAMES:
        sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=many_audiences(name, 2))
    return runner(monkeypatch, capsys)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Return the arguments for an accounts file and an output."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text("name,api_key\n" + "".join(f"{name},{KEY}-{name}\n" for name in NAMES))
    return ["--accounts", str(accounts), "--out", str(tmp_path / "out"), "--concurrency", "1"]


def metrics(text: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a metrics file by name and label values, as Prometheus reads them."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


# Progress.


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_from_time_to_time(
    run: Callable[..., Done],
    files: list[str],
    sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_format: str,
) -> None:
    """Without a terminal, report the progress from time to time, also while no account is finished."""
    monkeypatch.setattr(showing, "EVERY", 0.05)
    sandbox.script("a1", Answer(delay=0.4))
    done = run("fetch", *files, "--log-format", log_format, "--metrics-file", str(tmp_path / "job.prom"))
    first, *_, last = done.stderr.splitlines()
    assert len(done.stderr.splitlines()) >= 4
    if log_format == "text":
        assert first.startswith(("0 of 3 accounts fetched, 0 failed; ", "1 of 3 accounts fetched, 0 failed; "))
        assert "accounts/s" in first
        assert last.startswith("3 of 3 accounts fetched, 0 failed; 6 audiences in ")
    else:
        told = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["event"] for line in told] == ["progress"] * (len(told) - 1) + ["summary"]
        assert (told[0]["accounts"], told[-1]["fetched"], told[-1]["audiences"]) == (3, 3, 6)
        assert [len(values) for values in told[-1]["times"].values()] == [3, 3, 3]


def test_a_progress_with_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Report counts, rate, time left and the state of the service in one line."""
    monkeypatch.setattr("audiences_async.cli.summary.time.monotonic", lambda: 110.0)
    tally = Tally(total=1000, earlier=100, now=190, audiences=5, started=100.0)
    tally.failures["ServerError (HTTP 500)", "try again later"] = ["a"] * 10
    tally.hear(events.ServiceRateLearned("", 20.0))
    showing.report(tally, Log())
    text = "290 of 1,000 accounts fetched, 10 failed; 20.0 accounts/s; 35 s left; limited to 20/s"
    assert capsys.readouterr().err == f"{text}\n"


def test_a_summary_of_a_resumed_job() -> None:
    """Tell the accounts of the output from the audiences of this run."""
    (line,) = summary.text(Tally(total=200, earlier=190, now=10, audiences=70), Path("out"))
    assert line.startswith("200 of 200 accounts fetched, 0 failed; 70 audiences of 10 accounts in this run, in ")


async def test_the_terminal_has_a_bar_unless_the_log_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no lines beside the bar, but lines instead of it if the client's log shares the terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(showing, "EVERY", 0.01)
    lines: list[Tally] = []
    monkeypatch.setattr(showing, "report", lambda tally, _: lines.append(tally))
    saved: list[None] = []
    watch = Watch(Log(), lambda: saved.append(None))
    with progress(Tally(total=1), watch):
        await asyncio.sleep(0.05)
    assert (lines, bool(saved)) == ([], True)
    monkeypatch.setenv("AUDIENCES_LOG", "info")
    with progress(Tally(total=1), watch):
        await asyncio.sleep(0.05)
    assert lines


# Where the time went.


def test_quantiles_are_close() -> None:
    """Know the quantiles of any number of values to within 3 %, in constant memory."""
    times = Distribution()
    assert times.quantile(0.5) == 0.0
    for number in range(1, 10_001):
        times.add(number / 1000)
    assert [times.quantile(share) for share in (0.5, 0.95, 0.99)] == pytest.approx([5.0, 9.5, 9.9], rel=0.03)
    assert times.count == 10_000
    assert times.total == pytest.approx(50_005.0)
    times = Distribution()
    for value in (0.0, 0.0, 0.0, 2.0):
        times.add(value)
    assert times.quantile(0.5) == 0.0
    assert times.quantile(0.99) == pytest.approx(2.0, rel=0.03)


def test_where_the_time_went() -> None:
    """Add up the waits for a turn, the time on the wire and the backoff of each account's call."""
    timing = Timing()
    assert timing.quantiles() == {}
    for event in (
        events.CallStarted("a"),
        events.AttemptStarted("a", 1, 0.25),
        events.AttemptStarted("b", 1, 9.0),
        events.AttemptFinished("a", events.Attempt(1, 503, "HTTP 503", 0.5, 4.0, "backoff")),
        events.AttemptStarted("a", 2, 0.75),
        events.AttemptFinished("a", events.Attempt(2, 200, None, 1.5, 0.0, "success")),
        events.CallFinished("a", 2, 7.0, None),
    ):
        timing(event)
    assert {phase: each.total for phase, each in timing.phases.items()} == {"turn": 1.0, "wire": 2.0, "backoff": 4.0}
    assert timing.quantiles()["backoff"] == pytest.approx((4.0, 4.0, 4.0), rel=0.03)


def test_what_was_learned_is_in_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the summary with the learned limits and the output."""
    from audiences_async.cli import summary

    tally = Tally(total=1, now=1)
    tally.hear(events.ServiceRateLearned("", 49.7, per=10.0))
    assert [*summary.text(tally, Path("o"))][-1].endswith("; limit 49.7 requests/s in windows of 10 s; written to o")
    tally.hear(events.ServiceRateLearned("", 49.7))
    assert [*summary.text(tally, Path("o"))][-1].endswith("; limit 49.7 requests/s; written to o")
    tally.hear(events.ServiceConcurrencyLearned("", 8))
    assert [*summary.text(tally, Path("o"))][-1].endswith("; limit 8 requests at the same time; written to o")
    assert summary.fields(tally, Path("o"))["learned"] == {"concurrency": 8}


# Metrics.


def test_metrics_of_a_job(run: Callable[..., Done], files: list[str], sandbox: Sandbox, tmp_path: Path) -> None:
    """Write counts, failures and times in the Prometheus text format, and replace those of an earlier job."""
    sandbox.script("a1", Answer(403))
    path = tmp_path / "job.prom"
    assert run("fetch", *files, "--metrics-file", str(path)).returncode == 7
    found = metrics(path.read_text())
    assert [found["audiences_job_accounts", state] for state in ("fetched", "failed", "pending")] == [2, 1, 0]
    assert found["audiences_job_failures", "ForbiddenError"] == 1
    assert (found["audiences_job_audiences",], found["audiences_job_running",]) == (4, 0)
    assert found["audiences_job_account_seconds_count", "wire"] == 3
    assert 0 < found["audiences_job_account_seconds", "wire", "0.99"] < 10
    assert abs(clock.time() - found["audiences_job_updated_timestamp_seconds",]) < 60
    assert run("fetch", *files, "--metrics-file", str(path), "--resume").returncode == 0
    assert metrics(path.read_text())["audiences_job_accounts", "fetched"] == 3
    assert {each.name for each in tmp_path.iterdir()} == {"accounts.csv", "out", ".out.lock", "job.prom"}


def test_metrics_during_a_job(tmp_path: Path) -> None:
    """Report that the job runs, an outage, and a learned limit."""
    from audiences_async.cli import metrics as files

    tally = Tally(total=5, now=1)
    tally.hear(events.ServiceRateLearned("", 49.5))
    tally.hear(events.ServicePaused("", 1.0, asked=False, state="out"))
    files.save(tmp_path / "m", tally, running=True)
    found = metrics((tmp_path / "m").read_text())
    assert (found["audiences_job_running",], found["audiences_job_service_out",]) == (1, 1)
    assert (found["audiences_job_service_rate",], found["audiences_job_accounts", "pending"]) == (49.5, 4)


@pytest.mark.parametrize(("name", "content"), [("mine", b"precious"), ("accounts.csv", None), ("folder", None)])
def test_metrics_never_replace_another_file(
    run: Callable[..., Done], files: list[str], sandbox: Sandbox, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Refuse a metrics file that is something else, before the first request."""
    (tmp_path / "folder").mkdir()
    if content:
        (tmp_path / name).write_bytes(content)
    assert run("fetch", *files, "--metrics-file", str(tmp_path / name)).returncode == 2
    assert sandbox.requests == []
    assert not content or (tmp_path / name).read_bytes() == content


def test_metrics_that_cannot_be_written(
    run: Callable[..., Done], files: list[str], sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Report an unwritable metrics file before the first request; later, it never ends a job."""
    done = run("fetch", *files, "--metrics-file", str(tmp_path / "none" / "m"))
    assert (done.returncode, sandbox.requests) == (1, [])
    assert "cannot write" in done.stderr
    from audiences_async.cli import metrics as files_of_metrics

    original = files_of_metrics.save
    saved: list[None] = []

    def save(*arguments: Any, **settings: Any) -> None:
        saved.append(None)
        if len(saved) > 1:
            raise OSError(28, "No space left on device")
        original(*arguments, **settings)

    monkeypatch.setattr(files_of_metrics, "save", save)
    assert run("fetch", *files, "--metrics-file", str(tmp_path / "m")).returncode == 0
    assert len(saved) == 2


# The log, errors and completion.


@pytest.mark.parametrize(
    ("level", "told", "untold"), [("info", "AccountPaused", "AttemptStarted"), ("debug", "AttemptStarted", "-")]
)
def test_the_log_of_the_client(
    run: Callable[..., Done], files: list[str], sandbox: Sandbox, level: str, told: str, untold: str
) -> None:
    """Show pauses, learned limits and failed calls at info, and all events at debug; never a key."""
    sandbox.script("a1", Answer(429, retry_after=0.01))
    sandbox.script("a2", Answer(403))
    done = run("fetch", *files, AUDIENCES_LOG=level.upper())
    assert done.returncode == 7
    assert told in done.stderr
    assert "ForbiddenError" in done.stderr.split("×")[0]
    assert untold not in done.stderr.split(" × ")[0] or untold == "-"
    assert KEY not in done.stderr
    assert logging.getLogger("audiences_async").level == logging.NOTSET


def test_a_log_level_that_does_not_exist(run: Callable[..., Done], files: list[str], sandbox: Sandbox) -> None:
    """Refuse another level, with the ones that exist."""
    done = run("fetch", *files, AUDIENCES_LOG="loud")
    assert (done.returncode, done.stderr) == (2, "error: AUDIENCES_LOG must be one of info, debug\n")
    assert sandbox.requests == []


def test_an_error_for_programs(run: Callable[..., Done], files: list[str]) -> None:
    """Report an error as JSON too, with its hint and exit code."""
    assert run("fetch", *files).returncode == 0
    told = json.loads(run("fetch", *files, "--log-format", "json").stderr)
    assert (told["event"], told["exit_code"], told["hint"]) == ("error", 2, "")
    assert "output already exists" in told["message"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: Any) -> None:
    """Complete commands and options in the usual shells."""
    script = cli.app.generate_completion(shell=shell)
    assert "fetch" in script
    assert "metrics-file" in script


# --check.


def test_check_prints_everything_at_once(run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path) -> None:
    """Print the separator, the header and every problem, up to 20, and send nothing; no output is needed."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text(f"name;api_key\neast;{KEY}\n" + f"north;{KEY}\n" * 30)
    done = run("fetch", "--accounts", str(accounts), "--check")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), sandbox.requests) == (2, 24, [])
    assert lines[0] == f"{accounts}: CSV separated by semicolons, header: name, api_key"
    assert "line 4, column 1 (name): duplicate name 'north', first defined in line 3" in lines[1]
    assert lines[-3:] == [
        "… and 9 more problems",
        f"note: {accounts}, line 2, line 3 and 29 more: the same key",
        "accounts: 2, problems: 29",
    ]
    assert KEY not in done.stdout


def test_check_of_a_sound_file(run: Callable[..., Done], files: list[str], tmp_path: Path) -> None:
    """Exit with 0 if nothing is wrong; without --check, an output is needed."""
    done = run("fetch", *files, "--check")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "accounts: 3, problems: 0")
    assert not (tmp_path / "out").exists()
    assert run("fetch", "--accounts", str(tmp_path / "none.csv"), "--check").returncode == 2
    done = run("fetch", *files[:2])
    assert (done.returncode, "--out is missing" in done.stderr) == (2, True)
