"""Jobs on several machines, by the command line: every account exactly once, even if a process dies."""

import contextlib
import itertools
import json
import logging
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, KEY, Done, counted, runner
from redis import Redis
from services import create_bucket, missing, nginx, redis_server, s3_server
from workers import accounts_file, expected, fetch, fetched, opened, ready, started, work

from audiences_async.cli import worker as working
from audiences_async.sandbox import Answer, Sandbox

BODY = b'{"status": "200", "data": []}'

pytestmark = pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed")


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis server and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line against the sandbox."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    return runner(monkeypatch, capsys)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timeout(180)  # six processes start, beside other tests
@pytest.mark.parametrize(
    "storage", [pytest.param("directory", marks=pytest.mark.long), "s3 that refuses every tenth put"]
)
def test_a_killed_worker_is_made_up_for(
    redis: str,
    sandbox: Sandbox,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
) -> None:
    """Kill one of two workers in the middle of 2,500 accounts: each account once, and no key in Redis."""
    opened(sandbox, 2_500)
    sandbox.script("a50", Answer(delay=60.0))  # delays the first chunk, which is still in flight at the kill
    accounts = accounts_file(tmp_path / "accounts.csv", (f"a{number}" for number in range(2_500)))
    out = tmp_path / "out.ndjson"
    with contextlib.ExitStack() as stack:
        parts = str(tmp_path / "parts") if storage == "directory" else _bucket(stack, monkeypatch)
        refused = _refuse_every_tenth_put(monkeypatch) if "refuses" in storage else ["no put"]
        submitter = stack.enter_context(started(fetch(redis, accounts, parts, out), stderr=subprocess.PIPE))
        doomed = stack.enter_context(ready(work(redis, accounts, parts, sandbox)))
        sandbox.wait_for_requests(100, timeout=30.0)
        survivor = stack.enter_context(started(work(redis, accounts, parts, sandbox, "--account-rate", "1000")))
        sandbox.wait_for_requests(1_000, timeout=30.0)
        doomed.send_signal(signal.SIGKILL)
        _, told = submitter.communicate(timeout=120)
        survivor.send_signal(signal.SIGTERM)
        assert survivor.wait(timeout=20) == 0
    assert (submitter.returncode, counted(told)) == (0, "2,500 of 2,500 accounts fetched, 0 failed")
    assert fetched(out) == expected(2_500)
    assert refused
    assert len(sandbox.seen("a0")) == len(sandbox.seen("a50")) == 2  # the chunk in flight was taken over
    assert not (tmp_path / "parts").exists() or list((tmp_path / "parts").iterdir()) == []
    written = b"".join(file.read_bytes() for file in tmp_path_factory.getbasetemp().rglob("*.aof"))
    assert b"a2499" in written
    assert KEY.encode() not in written


def _run(command: list[str]) -> str:
    """Run a command to its end, and return what it writes to stderr."""
    return subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr


def _bucket(stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch) -> str:
    """Start an S3, set the credentials as users do, and return the URL of a bucket."""
    endpoint = stack.enter_context(s3_server())
    create_bucket(endpoint, "bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    return "s3://bucket/parts"


def _refuse_every_tenth_put(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have moto answer 503 to every tenth PUT; return their paths, which grow."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication

    answer, numbers, refused = DomainDispatcherApplication.__call__, itertools.count(1), []

    def refusing(self: Any, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] != "PUT" or next(numbers) % 10:
            return answer(self, environ, start_response)
        refused.append(environ["PATH_INFO"])
        start_response("503 Service Unavailable", [("Content-Length", "0")])
        return [b""]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", refusing)
    return refused


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(missing("nginx"), reason="nginx is not installed")
@pytest.mark.timed
@pytest.mark.long
def test_workers_behind_a_limit_of_their_address(redis: str, tmp_path: Path) -> None:
    """Three workers with defaults learn a limit that they share: nothing fails, and few requests are refused."""
    accounts = accounts_file(tmp_path / "accounts.csv", (f"a{number}" for number in range(1_800)))
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(nginx(tmp_path, BODY, rate=300, burst=20, key="$binary_remote_addr"))
        for _ in range(3):
            stack.enter_context(ready(work(redis, accounts, tmp_path / "parts", service)))
        told = _run(fetch(redis, accounts, tmp_path / "parts", tmp_path / "out"))
        assert counted(told) == "1,800 of 1,800 accounts fetched, 0 failed"
        requests = len(service.log.read_text().splitlines())
    assert requests <= 1.2 * 1_800


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timed
def test_one_rate_of_all_workers(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """With --rate, workers together never send more, whatever second is looked at."""
    opened(sandbox, 150)
    accounts = accounts_file(tmp_path / "accounts.csv", (f"a{number}" for number in range(150)))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(ready(work(redis, accounts, tmp_path / "parts", sandbox, "--rate", "50")))
        _run(fetch(redis, accounts, tmp_path / "parts", tmp_path / "out"))
    assert fetched(tmp_path / "out") == expected(150)
    times = sorted(request.at for request in sandbox.requests)
    assert len(times) == 150
    # One request of each worker may be late by a little.
    assert all(later - earlier >= 0.98 for earlier, later in zip(times, times[53:], strict=False))
    assert times[-1] - times[0] < 1.2 * 150 / 50


@pytest.mark.once
@pytest.mark.slow
def test_a_redis_with_room_for_few_clients(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Two workers with limits need fewer than 20 connections, together with the submitter and the status."""
    opened(sandbox, 300)
    accounts = accounts_file(tmp_path / "accounts.csv", (f"a{number}" for number in range(300)))
    with contextlib.ExitStack() as stack, Redis.from_url(redis) as client:
        client.config_set("maxclients", 20)
        for _ in range(2):
            limits = ("--rate", "200", "--account-rate", "5")
            stack.enter_context(ready(work(redis, accounts, tmp_path / "parts", sandbox, *limits)))
        submitter = stack.enter_context(started(fetch(redis, accounts, tmp_path / "parts", tmp_path / "out")))
        sandbox.wait_for_requests(50, timeout=30.0)
        _run([*COMMAND, "status", "--docket", redis])
        assert submitter.wait(timeout=30) == 0
    assert fetched(tmp_path / "out") == expected(300)
    assert len(sandbox.requests) == 300


@pytest.mark.slow
@pytest.mark.measured
def test_the_command_line_of_both_sides(
    redis: str, run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the keys in the worker's environment only; sum up failures on the submitting side."""
    for name in ("north", "south"):
        sandbox.add_account(name, api_key=f"{KEY}-{name}")
    sandbox.script("south", Answer(403))
    accounts, out = tmp_path / "accounts.csv", tmp_path / "out"
    accounts.write_text("name,api_key_env\nnorth,NORTH\nsouth,SOUTH\n")
    with monkeypatch.context() as patch:
        patch.setenv("NORTH", f"{KEY}-north")
        patch.setenv("SOUTH", f"{KEY}-south")
        process = subprocess.Popen(
            work(redis, accounts, f"{out}.parts", sandbox, "--queue", "q"), stderr=subprocess.PIPE, text=True
        )
    with process:
        done = run("fetch", "--docket", redis, "--queue", "q", "--accounts", str(accounts), "--out", str(out))
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert (process.returncode, told.endswith(f" is ready: queue q, parts go to {out}.parts\n")) == (0, True)
    summary = [line for line in done.stderr.splitlines() if not line.startswith("no worker yet")]
    assert (done.returncode, summary[0]) == (7, "  1 × ForbiddenError (HTTP 403): south")
    assert counted(done.stderr) == "1 of 2 accounts fetched, 1 failed"
    assert not (tmp_path / ".out.job").exists()


@pytest.mark.slow
def test_the_submitting_side_interrupted(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Print how to start a worker if none runs, and on Ctrl-C how to continue; the job is then the same."""
    accounts, out = tmp_path / "accounts.csv", tmp_path / "out"
    accounts.write_text("name,api_key_env\nnorth,NORTH\n")
    command = fetch(redis, accounts, tmp_path / "parts", out)
    with started(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("no worker yet; start one: audiences worker --docket")
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert "error: interrupted; 0 of 1 accounts are fetched and kept\nhint: run the same command with --resume" in told
    job = json.loads((tmp_path / ".out.job").read_text())["job"]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [job]


@pytest.mark.slow
def test_a_worker_without_redis(sandbox: Sandbox, tmp_path: Path) -> None:
    """A worker whose Redis goes away writes a line for each failure, without a traceback, and ends on SIGTERM."""
    accounts = accounts_file(tmp_path / "accounts.csv", ["a0"])
    with contextlib.ExitStack() as stack:
        with redis_server(tmp_path) as url:
            worker = stack.enter_context(ready(work(url, accounts, tmp_path / "parts", sandbox)))
        assert worker.stderr is not None
        first = worker.stderr.readline()
        worker.send_signal(signal.SIGTERM)
        lines = [first, *worker.communicate(timeout=20)[1].splitlines()]
    assert worker.returncode == 0
    assert {line.partition(":")[0] for line in lines} <= {"warning", "error"}


@pytest.mark.slow
def test_a_submitter_without_redis(tmp_path: Path) -> None:
    """A submitter whose Redis goes away reports it once, with the reason, in a log for programs too."""
    accounts = accounts_file(tmp_path / "accounts.csv", ["a0"])
    with contextlib.ExitStack() as stack:
        with redis_server(tmp_path) as url:
            command = fetch(url, accounts, tmp_path / "parts", tmp_path / "out", "--log-format", "json")
            submitter = stack.enter_context(started(command, stderr=subprocess.PIPE))
            assert submitter.stderr is not None
            lines = [submitter.stderr.readline()]
        lines.append(submitter.stderr.readline())
        submitter.send_signal(signal.SIGINT)
        lines += submitter.communicate(timeout=20)[1].splitlines()
    first, second, last = (json.loads(line) for line in lines)
    assert first["message"].startswith("no worker yet")
    assert second["message"].startswith("Redis is unavailable")
    assert last["event"] == "error"


def test_a_worker_interrupted_before_it_has_begun(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the accounts are read ends the worker silently, as later."""

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("audiences_async.cli.app.AccountFile", interrupted)
    done = run("worker", "--docket", "redis://h", "--accounts", "accounts.csv", "--out", str(tmp_path))
    assert done == Done(0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["fetch", "--docket", "nonsense", "--out", "{}/out"], 2, "invalid Redis URL"),
        (["fetch", "--docket", "redis://h", "--out", ""], 2, "--out must name a file"),
        (["fetch", "--docket", "memory://", "--out", "{}/out"], 2, "invalid Redis URL"),
        (["worker", "--docket", "redis+sentinel://h/m", "--out", "{}"], 2, "invalid Redis URL"),
        (["worker", "--docket", "redis://h?ssl_cert_reqs=none", "--out", "{}"], 2, "invalid Redis URL"),
        (["fetch", "--docket", "redis://h/one", "--out", "{}/out"], 2, "invalid Redis URL"),
        (["fetch", "--docket", "redis://h", "--queue", "a b", "--out", "{}/out"], 2, "queue must be"),
        (
            ["fetch", "--docket", "redis://h", "--parts", "ftp://h", "--out", "{}/out"],
            2,
            "parts must be in a directory",
        ),
        (["fetch", "--queue", "q", "--out", "{}/out"], 2, "--queue and --parts need --docket"),
        (["fetch", "--parts", "p", "--out", "{}/out"], 2, "--queue and --parts need --docket"),
        (
            ["fetch", "--docket", "redis://h", "--out", "{}/out", "--rate", "5"],
            2,
            "set these limits on `audiences worker`",
        ),
        (["worker", "--docket", "nonsense", "--out", "{}"], 2, "invalid Redis URL"),
        (["worker", "--docket", "nonsense", "--out", "{}", "--account-rate", "5"], 2, "invalid Redis URL"),
        (["worker", "--docket", "redis://127.0.0.1:1", "--out", "{}"], 5, "Redis is unavailable"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--concurrency", "0"], 2, "concurrency must be"),
        (
            ["worker", "--docket", "redis://h", "--out", "{}", "--concurrency", "1.5"],
            2,
            "expected an integer, got '1.5'",
        ),
        (["worker", "--docket", "redis://h", "--out", "{}", "--rate", "0"], 2, "rate must be"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--account-rate", "0"], 2, "account_rate must be"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--timeout", "0"], 2, "timeout must be"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--grace", "-1"], 2, "grace must be"),
        (["worker", "--docket", "redis://h", "--out", "/dev/null/parts"], 1, "cannot write to /dev/null/parts"),
        (["worker", "--docket", "redis://h", "--out", "ftp://h"], 2, "parts must be in a directory"),
    ],
)
def test_wrong_usage(run: Callable[..., Done], tmp_path: Path, arguments: list[str], code: int, told: str) -> None:
    """Report a usage error on one line, with the exit code for its kind."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text(f"name,api_key\nnorth,{KEY}\n")
    done = run(*(argument.format(tmp_path) for argument in arguments), "--accounts", str(accounts))
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr


@pytest.mark.parametrize("command", ["fetch", "worker", "status"])
def test_without_the_extra(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Name the extra to install if Docket is missing."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text(f"name,api_key\nnorth,{KEY}\n")
    monkeypatch.setattr("audiences_async.cli.app.find_spec", lambda name: None)
    options = [] if command == "status" else ["--accounts", str(accounts), "--out", str(tmp_path / "out")]
    done = run(command, "--docket", "redis://h", *options)
    assert done.returncode == 2
    assert "pip install 'audiences_async[docket]'" in done.stderr


def test_a_line_for_each_hiccup(capsys: pytest.CaptureFixture[str]) -> None:
    """Log a failure of Redis on one line, without its traceback."""
    handler = working.OneLine()
    logger = logging.getLogger("hiccup")
    logger.addHandler(handler)
    logger.error("no heartbeat", exc_info=ConnectionError("refused\nby Redis"))
    assert capsys.readouterr().err == "error: no heartbeat: ConnectionError: refused\\nby Redis\n"
