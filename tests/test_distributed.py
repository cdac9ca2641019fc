"""Several workers on a real Redis: every account exactly once, even if a process dies, and no key in Redis."""

import asyncio
import contextlib
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, KEY, Done, counted, runner
from docket import Docket, Worker
from services import free_port, missing, redis_server

from audiences_async import Account, AudiencesClient, ConfigurationError, RateLimit, RetryPolicy, distributed
from audiences_async._jobs import results
from audiences_async._jobs.results import OutcomeFile
from audiences_async.distributed import DocketError, RedisLimiter
from audiences_async.sandbox import Answer, Sandbox, many_audiences

A0 = b'{"account": "a0", "ok": true, "audiences": []}\n'

pytestmark = pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed")


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Redis server and return its URL."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check for parts and lost chunks at every turn."""
    monkeypatch.setattr(distributed, "_LOOK_EVERY", 0.01)
    monkeypatch.setattr(distributed, "_ASK_EVERY", 0.02)
    monkeypatch.setattr(distributed, "_RETRY_AFTER", timedelta(0))


def opened(sandbox: Sandbox, count: int) -> dict[str, Account]:
    """Return *count* accounts by name, with 3 audiences each."""
    names = [f"a{number}" for number in range(count)]
    return {
        name: sandbox.add_account(name, api_key=f"{KEY}-{name}", audiences=many_audiences(name, 3)) for name in names
    }


def expected(count: int) -> dict[str, list[str]]:
    """Return the audience ids of each account."""
    return {f"a{number}": [f"a{number}-{audience}" for audience in range(3)] for number in range(count)}


def fetched(out: Path) -> dict[str, list[str]]:
    """Return the ids of each account of an output, in which each occurs once."""
    told = [json.loads(line) for line in out.read_text().splitlines()]
    ids = {one["account"]: [audience["id"] for audience in one["audiences"]] for one in told}
    assert len(ids) == len(told)
    return ids


@contextlib.asynccontextmanager
async def worker(url: str, accounts: dict[str, Account], out: Path, sandbox: Sandbox) -> AsyncIterator[None]:
    """Run a worker in this process inside the block."""
    client = AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(max_attempts=1))
    task = asyncio.create_task(distributed.work(url, accounts, out, client, concurrency=10))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def submitted(url: str, names: list[str], parts: Path, out: Path, **settings: Any) -> list[str]:
    """Submit with *resume*; return the merged accounts."""
    merged: list[str] = []
    settings = {"resume": True, "on_idle": lambda: None, **settings}
    with OutcomeFile(out, resume=settings["resume"]) as file:
        await distributed.submit(
            url, names, parts, file, chunk_size=4, on_merged=lambda line: merged.append(line.account), **settings
        )
    return merged


@contextlib.asynccontextmanager
async def other_worker(url: str, parts: Path, *wrote: bytes) -> AsyncIterator[None]:
    """Run a foreign worker: for any chunk, its part has the same lines."""

    async def fetch_chunk(part: str, names: list[str]) -> None:
        results.write_whole(parts / part, wrote)

    async with Docket("audiences", url) as docket:
        docket.register(fetch_chunk)
        async with Worker(docket) as one:
            task = asyncio.create_task(one.run_forever())
            yield
            task.cancel()
            await asyncio.wait({task})


@pytest.mark.once
@pytest.mark.slow
def test_a_killed_worker_is_made_up_for(
    redis: str, sandbox: Sandbox, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Kill one of two workers in the middle of 5,000 accounts: each account once, within 30 s, no key in Redis."""
    opened(sandbox, 5_000)
    sandbox.script("a50", Answer(delay=60.0))  # delays the first chunk, which is still in flight at the kill
    accounts, out, parts = tmp_path / "accounts.csv", tmp_path / "out.ndjson", tmp_path / "parts"
    accounts.write_text("name,api_key\n" + "".join(f"a{number},{KEY}-a{number}\n" for number in range(5_000)))
    common = ["--docket", redis, "--accounts", str(accounts)]
    work = [*COMMAND, "worker", *common, "--out", str(parts), "--base-url", sandbox.base_url]
    fetch = [*COMMAND, "fetch", *common, "--out", str(out), "--parts", str(parts)]
    with contextlib.ExitStack() as stack:
        submitter = stack.enter_context(started(fetch, stderr=subprocess.PIPE, text=True))
        doomed = stack.enter_context(started(work))
        sandbox.wait_for_requests(100, timeout=30.0)
        survivor = stack.enter_context(started([*work, "--account-rate", "1000"]))
        sandbox.wait_for_requests(2_500, timeout=30.0)
        doomed.send_signal(signal.SIGKILL)
        _, told = submitter.communicate(timeout=30)
        survivor.send_signal(signal.SIGTERM)
        assert survivor.wait(timeout=20) == 0
    assert (submitter.returncode, counted(told)) == (0, "5,000 of 5,000 accounts fetched, 0 failed")
    assert fetched(out) == expected(5_000)
    assert len(sandbox.seen("a0")) == len(sandbox.seen("a50")) == 2  # the chunk in flight was taken over
    assert list(parts.iterdir()) == []
    written = b"".join(file.read_bytes() for file in tmp_path_factory.getbasetemp().rglob("*.aof"))
    assert b"a4999" in written
    assert KEY.encode() not in written


@contextlib.contextmanager
def started(command: list[str], **settings: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that ends with the block."""
    with subprocess.Popen(command, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
async def test_what_a_worker_cannot_do_is_an_error_of_the_account(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Write an account that fails, and one missing from the worker's own file, as lines with errors."""
    accounts = opened(sandbox, 6)
    sandbox.script("a1", Answer(403))
    known = {name: account for name, account in accounts.items() if name != "a2"}
    async with worker(redis, known, tmp_path / "parts", sandbox):
        merged = await submitted(redis, list(accounts), tmp_path / "parts", tmp_path / "out")
    assert sorted(merged) == sorted(accounts)
    lines = {line.account: json.loads(line.text) for line in results.lines(tmp_path / "out")}
    assert [name for name, told in lines.items() if not told["ok"]] == ["a2", "a1"]
    assert lines["a1"]["error"]["status"] == 403
    assert lines["a2"]["error"]["message"] == "account 'a2': missing from the worker's accounts file"


@pytest.mark.slow
async def test_resuming_has_only_the_rest_fetched(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Parts that were written without a submitter are merged, and only the rest is fetched."""
    accounts = opened(sandbox, 8)
    sandbox.script("a1", Answer(403))
    parts, out = tmp_path / "parts", tmp_path / "out"
    first = asyncio.create_task(submitted(redis, list(accounts), parts, out))
    async with worker(redis, accounts, parts, sandbox):
        await asyncio.to_thread(sandbox.wait_for_requests, 1)
        first.cancel()
        await asyncio.wait({first})
        await asyncio.to_thread(sandbox.wait_for_requests, 8)
    assert sorted(sandbox_names(sandbox)) == sorted(accounts)
    async with worker(redis, accounts, parts, sandbox):
        await submitted(redis, list(accounts), parts, out)
    assert fetched(out) == expected(8)
    assert sorted(sandbox_names(sandbox)[8:]) == ["a1"]
    assert list(parts.iterdir()) == []


def sandbox_names(sandbox: Sandbox) -> list[str]:
    """Return the account of each request, in order."""
    return [str(request.account) for request in sandbox.requests]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
async def test_a_part_that_is_nowhere_is_asked_for_again(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """If workers write elsewhere, the chunk is repeated, and then its accounts fail with that reason."""
    accounts = opened(sandbox, 2)
    async with worker(redis, accounts, tmp_path / "elsewhere", sandbox):
        await submitted(redis, list(accounts), tmp_path / "parts", tmp_path / "out")
    lines = [json.loads(line.text) for line in results.lines(tmp_path / "out")]
    assert [line["account"] for line in lines] == ["a0", "a1"]
    assert lines[0]["error"]["message"].endswith("no worker could write its chunk: the part is missing")
    assert len(sandbox.requests) == 2 * 3


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
async def test_a_worker_that_cannot_write(redis: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """Fail a chunk whose part cannot be written after some attempts, and give its accounts the reason."""
    accounts = opened(sandbox, 1)
    async with worker(redis, accounts, Path("/proc"), sandbox):  # a directory that cannot hold files
        await submitted(redis, list(accounts), tmp_path / "parts", tmp_path / "out")
    (line,) = results.lines(tmp_path / "out")
    assert "no worker could write its chunk: " in json.loads(line.text)["error"]["message"]
    assert sandbox.requests == []


@pytest.mark.slow
async def test_a_part_that_lacks_an_account(redis: str, tmp_path: Path) -> None:
    """Write one line for every account, even if a part lacks it or has it twice."""
    async with other_worker(redis, tmp_path, A0, A0):
        await submitted(redis, ["a0", "a1"], tmp_path, tmp_path / "out")
    first, second = (json.loads(line.text) for line in results.lines(tmp_path / "out"))
    assert (first["account"], first["ok"]) == ("a0", True)
    assert second["error"]["message"] == "account 'a1': missing from its chunk's part"


@pytest.mark.slow
@pytest.mark.parametrize("resume", [True, False])
async def test_only_a_job_that_goes_on_takes_in_what_is_there(
    redis: str, sandbox: Sandbox, tmp_path: Path, *, resume: bool
) -> None:
    """Merge an earlier job's part with --resume, and ignore it without."""
    accounts = opened(sandbox, 1)
    parts = tmp_path / "parts"
    parts.mkdir()
    (chunk,) = distributed._chunks(accounts, 4)
    results.write_whole(parts / chunk.part, [A0])
    async with worker(redis, accounts, parts, sandbox):
        await submitted(redis, list(accounts), parts, tmp_path / "out", resume=resume)
    assert fetched(tmp_path / "out") == ({"a0": []} if resume else expected(1))


@pytest.mark.slow
async def test_what_a_killed_worker_left_half_written_is_removed(redis: str, tmp_path: Path) -> None:
    """Remove a job's own temporary files at its end, and no others."""
    (chunk,) = distributed._chunks(["a0"], 4)
    ours, others = tmp_path / f".{chunk.part}.0123456789abcdef.tmp", tmp_path / ".other.ndjson.0123456789abcdef.tmp"
    ours.touch()
    others.touch()
    async with other_worker(redis, tmp_path, A0):
        await submitted(redis, ["a0"], tmp_path, tmp_path / "out")
    assert (ours.exists(), others.exists()) == (False, True)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
async def test_without_a_worker_it_says_so(redis: str, tmp_path: Path) -> None:
    """Report missing workers once, and keep waiting."""
    told: list[None] = []
    waiting = asyncio.Event()

    def idle() -> None:
        told.append(None)
        waiting.set()

    job = asyncio.create_task(submitted(redis, ["a0"], tmp_path / "parts", tmp_path / "out", on_idle=idle))
    await asyncio.wait_for(waiting.wait(), 30)
    job.cancel()
    await asyncio.wait({job})
    assert (job.cancelled(), len(told)) == (True, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
async def test_a_redis_that_goes_away(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """While Redis is down, a submitter waits for parts, and does not end."""
    asked = asyncio.Event()
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        waiting = {"on_idle": asked.set}
        job = asyncio.create_task(submitted(url, ["a0"], tmp_path, tmp_path / "out", **waiting))
        await asyncio.wait_for(asked.wait(), 30)
    for _ in range(3):
        assert not job.done()
        await asyncio.sleep(0.03)
    (chunk,) = distributed._chunks(["a0"], 4)
    results.write_whole(tmp_path / chunk.part, [A0])
    assert await job == ["a0"]


@pytest.mark.parametrize("url", ["nonsense", "redis://u:s3cr3t@[/0", "redis://:s3cr3t@127.0.0.1:1/0?max_connections=x"])
async def test_a_url_that_cannot_be_used(url: str, tmp_path: Path) -> None:
    """Report an invalid URL as a usage error, without repeating it."""
    with pytest.raises(ConfigurationError, match="invalid Redis URL") as caught:
        await submitted(url, ["a0"], tmp_path, tmp_path / "out")
    assert caught.value.__cause__ is caught.value.__context__ is None
    with pytest.raises(ConfigurationError, match="invalid Redis URL"):
        distributed.connect(url, 5)


async def test_a_redis_that_is_not_there(tmp_path: Path) -> None:
    """If Redis does not listen, both sides end with an error and a hint."""
    url = f"redis://127.0.0.1:{free_port()}/0?max_connections=5"
    with pytest.raises(DocketError, match="Redis is unavailable: .*check the Redis URL"):
        await submitted(url, ["a0"], tmp_path, tmp_path / "out")
    with pytest.raises(DocketError):
        await distributed.work(url, {}, tmp_path, AudiencesClient())


@pytest.mark.slow
async def test_one_rate_for_all_processes(redis: str) -> None:
    """Clients that share a Redis share each account's rate, bursts included; other accounts are not delayed."""
    async with distributed.connect(redis, 10) as one, distributed.connect(redis, 10) as other:
        limiters = [RedisLimiter(client, RateLimit(rate=5, burst=3)) for client in (one, other)]
        now = asyncio.get_running_loop().time
        started = now()
        times: list[float] = []

        async def ask(number: int) -> None:
            await limiters[number % 2].acquire("north")
            times.append(now() - started)

        await asyncio.gather(*map(ask, range(9)))
        before = now()
        await limiters[0].acquire("south")
        assert now() - before < 0.2, "less than north would have to wait"
    times.sort()
    assert times[2] < 0.2, "the burst at once"
    assert all(time >= (number - 2) / 5 - 0.002 for number, time in enumerate(times))


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line against the sandbox."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    return runner(monkeypatch, capsys)


@pytest.mark.slow
def test_the_command_line_of_both_sides(
    redis: str, run: Callable[..., Done], sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the keys in the worker's environment only; sum up failures on the submitting side."""
    for name in ("north", "south"):
        sandbox.add_account(name, api_key=f"{KEY}-{name}")
    sandbox.script("south", Answer(403))
    accounts, out = tmp_path / "accounts.csv", tmp_path / "out"
    accounts.write_text("name,api_key_env\nnorth,NORTH\nsouth,SOUTH\n")
    work = [*COMMAND, "worker", "--docket", redis, "--accounts", str(accounts), "--out", f"{out}.parts"]
    with monkeypatch.context() as patch:
        patch.setenv("NORTH", f"{KEY}-north")
        patch.setenv("SOUTH", f"{KEY}-south")
        process = subprocess.Popen(work, stderr=subprocess.PIPE, text=True)
    with process:
        done = run("fetch", "--docket", redis, "--accounts", str(accounts), "--out", str(out))
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "")
    summary = [line for line in done.stderr.splitlines() if not line.startswith("no worker yet")]
    assert (done.returncode, summary[0]) == (7, "  1 × ForbiddenError (HTTP 403): south")
    assert counted(done.stderr) == "1 of 2 accounts fetched, 1 failed"


@pytest.mark.slow
def test_the_submitting_side_interrupted(redis: str, tmp_path: Path) -> None:
    """Print how to start a worker if none runs, and on Ctrl-C how to continue."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text("name,api_key_env\nnorth,NORTH\n")
    fetch = [*COMMAND, "fetch", "--docket", redis, "--accounts", str(accounts), "--out", str(tmp_path / "out")]
    with started(fetch, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("no worker yet; start one: audiences worker --docket")
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(timeout=30) == 130
    assert "error: interrupted; 0 of 1 accounts are fetched and kept\nhint: run the same command with --resume" in told


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
        (
            ["fetch", "--docket", "redis://h", "--out", "{}/out", "--rate", "5"],
            2,
            "set these limits on `audiences worker`",
        ),
        (["worker", "--docket", "nonsense", "--out", "{}"], 2, "invalid Redis URL"),
        (["worker", "--docket", "nonsense", "--out", "{}", "--account-rate", "5"], 2, "invalid Redis URL"),
        (["worker", "--docket", "redis://127.0.0.1:1", "--out", "{}"], 5, "Redis is unavailable"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--concurrency", "0"], 2, "concurrency must be"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--account-rate", "0"], 2, "account_rate must be"),
        (["worker", "--docket", "redis://h", "--out", "{}", "--timeout", "0"], 2, "timeout must be"),
        (["worker", "--docket", "redis://h", "--out", "/dev/null/parts"], 1, "cannot write to /dev/null/parts"),
    ],
)
def test_wrong_usage(run: Callable[..., Done], tmp_path: Path, arguments: list[str], code: int, told: str) -> None:
    """Report a usage error on one line, with the exit code for its kind."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text(f"name,api_key\nnorth,{KEY}\n")
    done = run(*(argument.format(tmp_path) for argument in arguments), "--accounts", str(accounts))
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr


@pytest.mark.parametrize("command", ["fetch", "worker"])
def test_without_the_extra(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Name the extra to install if Docket is missing."""
    accounts = tmp_path / "accounts.csv"
    accounts.write_text(f"name,api_key\nnorth,{KEY}\n")
    monkeypatch.setattr("audiences_async.cli.app.find_spec", lambda name: None)
    done = run(command, "--docket", "redis://h", "--accounts", str(accounts), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "pip install 'audiences_async[docket]'" in done.stderr
