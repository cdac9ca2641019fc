"""``audiences fetch``: fetch every account of a file into another file, and resume after a crash."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attrs import field, frozen, validators

from audiences_async._base import checks
from audiences_async._jobs.outcome_files import Line, OutcomeFile
from audiences_async.accounts import AccountFile
from audiences_async.cli import failures, metrics
from audiences_async.cli.log import Log, notify_production
from audiences_async.cli.progress import Watch, progress
from audiences_async.cli.summary import Tally
from audiences_async.cli.target import Target
from audiences_async.client import AudiencesClient
from audiences_async.errors import ConfigurationError, printable
from audiences_async.policies import RateLimit, RetryPolicy


@frozen
class Limits:
    """Limits of a job.

    Attributes:
        concurrency: Maximum number of accounts in flight.
        rate: Requests per second of all accounts together; ``None`` means that a limit is learned if there is one.
        timeout: Seconds for each account.
        patience: Longest outage in seconds; then the remaining accounts fail.
        max_attempts: Maximum number of requests per account, the first included.
    """

    concurrency: int = field(default=100, validator=checks.is_count)
    rate: float | None = field(default=None, validator=validators.optional(checks.is_positive))
    timeout: float = 60.0
    patience: float = 900.0
    max_attempts: int = 5


@frozen
class Job:
    """A job's accounts, output and settings.

    Attributes:
        accounts: All accounts, including those fetched by an earlier run.
        target: The output.
        resume: Whether to continue an existing output.
        limits: Limits on requests and time.
        base_url: URL of the service; ``None`` means the client's default.
        errors: Account file for the failed accounts; ``None`` means none.
        metrics: File for metrics; ``None`` means none.
        log: Where the progress is reported.
    """

    accounts: AccountFile
    target: Target
    resume: bool
    limits: Limits
    base_url: str | None
    errors: Path | None
    metrics: Path | None
    log: Log


def run(job: Job, tally: Tally) -> None:
    """Fetch the accounts that are missing from the output, in this process.

    *tally* is up to date even if this raises.

    Raises:
        AudiencesError: The job cannot begin.
        OSError: The output cannot be written.
        KeyboardInterrupt: Ctrl-C; fetched accounts are kept.
    """
    limits = job.limits
    client = AudiencesClient(
        base_url=job.base_url,
        timeout=limits.timeout,
        retry=RetryPolicy(max_attempts=limits.max_attempts),
        service_rate_limit=None if limits.rate is None else RateLimit(limits.rate),
        on_event=tally.hear,
    )

    async def fetch(file: OutcomeFile, watch: Watch) -> None:
        notify_production(job.base_url, job.log)
        rest = (account for account in job.accounts if account.name not in file.fetched)
        stream = client.stream(rest, concurrency=limits.concurrency, patience=limits.patience)
        async with client, stream as outcomes:
            with progress(tally, watch) as show:
                async for outcome in outcomes:
                    file.write(outcome)
                    tally.count(outcome)
                    show()

    _run(job, tally, fetch)


def run_distributed(job: Job, tally: Tally, url: str, queue: str | None, parts: str) -> None:
    """Do the same as `run` with the workers of a queue, which write to the directory or bucket *parts*."""
    from audiences_async import distributed  # noqa: PLC0415 - of an optional extra

    logging.getLogger("docket").addHandler(logging.NullHandler())  # failures of Redis are notices, in the log's format
    names = (account.name for account in job.accounts)

    async def submit(file: OutcomeFile, watch: Watch) -> None:
        with progress(tally, watch) as show:

            def merged(line: Line) -> None:
                tally.count_line(line)
                show()

            with distributed.recorded(job.target.checkpoint, resume=job.resume) as identity:
                await distributed.submit(
                    url,
                    names,
                    parts,
                    file,
                    job=identity,
                    queue=queue or distributed.QUEUE,
                    total=tally.total - tally.earlier,
                    on_merged=merged,
                    on_notice=lambda text: job.log.write("waiting", text, message=text),
                )

    _run(job, tally, submit)


def _run(job: Job, tally: Tally, fetch: Callable[[OutcomeFile, Watch], Coroutine[Any, Any, None]]) -> None:
    _check_paths(job)
    names = {account.name for account in job.accounts} if job.resume else None
    with OutcomeFile(job.target.checkpoint, resume=job.resume, accounts=names) as file:
        tally.total = len(job.accounts)
        tally.earlier = sum(account.name in file.fetched for account in job.accounts)
        with _metrics(job, tally) as save_metrics:
            asyncio.run(fetch(file, Watch(job.log, save_metrics)))
    job.target.convert()
    if job.errors is not None:
        failures.write(job.errors, job.target.checkpoint, job.accounts)


@contextmanager
def _metrics(job: Job, tally: Tally) -> Iterator[Callable[[], None]]:
    """Write the metrics file before and after the block; yield a function that writes it, if it can, in between."""
    path = job.metrics
    if path is None:
        yield lambda: None
        return

    def save(*, running: bool) -> None:
        with suppress(OSError):  # the job goes on if its metrics cannot be written
            metrics.save(path, tally, running=running)

    metrics.save(path, tally, running=True)
    try:
        yield lambda: save(running=True)
    finally:
        save(running=False)


def _check_paths(job: Job) -> None:
    """Refuse files that could not be written at the end, that must not be replaced, or that are one and the same."""
    target = job.target
    written = {
        "output": target.out,
        "checkpoint": target.checkpoint,
        "--errors": job.errors,
        "--metrics-file": job.metrics,
    }
    files = {name: path for name, path in written.items() if path is not None}
    for name, path in files.items():
        if _is_same(path, job.accounts.path):
            raise ConfigurationError(f"{name} is the accounts file: {printable(str(path))}; choose another file")
    others = [files.pop(name) for name in ("--errors", "--metrics-file") if name in files]
    for number, path in enumerate(others):
        if any(_is_same(path, other) for other in [*files.values(), *others[:number]]):
            raise ConfigurationError(f"two files of the job are the same: {printable(str(path))}; choose another file")
    target.check(resume=job.resume)
    if job.metrics is not None:
        metrics.check(job.metrics)
    if job.errors is not None:
        failures.check(job.errors)
        if target.checkpoint.exists() and not target.checkpoint.is_file():
            raise ConfigurationError(f"--errors needs an output that is a regular file: {printable(str(target.out))}")


def _is_same(path: Path, other: Path) -> bool:
    """Return whether both paths lead to the same file, resolving links."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()
