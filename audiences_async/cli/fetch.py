"""``audiences fetch``: fetch every account of a file into another file, and resume after a crash."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from attrs import define, field, frozen, validators
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from audiences_async import errors
from audiences_async._base import checks
from audiences_async._jobs.results import Line, OutcomeFile, check_new
from audiences_async.accounts import AccountFile
from audiences_async.cli.output import FileFormat, check_target, convert, notices, notify
from audiences_async.client import AudiencesClient
from audiences_async.errors import AudiencesError, ConfigurationError, StatusError, printable
from audiences_async.events import Event, ServiceConcurrencyLearned, ServicePaused, ServiceRateLearned, ServiceResumed
from audiences_async.models import Failed, Outcome
from audiences_async.policies import RateLimit, RetryPolicy

_NAMED: Final = 3  # accounts shown per reason
_MIN_OUTAGE: Final = 2.0  # s; a shorter gap without answers is not reported


@frozen
class Job:
    """A job's accounts, output and settings.

    Attributes:
        accounts: All accounts, including those fetched by an earlier run.
        out: The output file.
        output: Its format.
        resume: Whether to continue an existing output.
        concurrency: Maximum number of accounts in flight.
        rate: Requests per second of all accounts together; ``None`` means that a limit is learned if there is one.
        timeout: Seconds for each account.
        patience: Longest outage in seconds; then the remaining accounts fail.
        max_attempts: Maximum number of requests per account, the first included.
        base_url: URL of the service; ``None`` means the client's default.
    """

    accounts: AccountFile
    out: Path
    output: FileFormat
    resume: bool
    concurrency: int = field(validator=checks.is_count)
    rate: float | None = field(validator=validators.optional(checks.is_positive))
    timeout: float
    patience: float
    max_attempts: int
    base_url: str | None

    @property
    def checkpoint(self) -> Path:
        """The NDJSON file that the job appends to: the output itself, or a file beside it."""
        return self.out if self.output == "ndjson" else self.out.with_name(f"{self.out.name}.ndjson")


class ServiceLog:
    """Record the service's limits and outages from the client's events."""

    def __init__(self) -> None:
        self._out_since: float | None = None
        self._next_probe = 0.0
        self._out_for = 0.0
        self._rate: ServiceRateLearned | None = None
        self._concurrency: int | None = None

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        now = time.monotonic()
        match event:
            case ServicePaused(state="out"):
                self._out_since = now if self._out_since is None else self._out_since
                self._next_probe = now + event.seconds
            case ServiceResumed():
                self._out_for += 0.0 if self._out_since is None else now - self._out_since
                self._out_since = None
            case ServiceRateLearned():
                self._rate = event
            case ServiceConcurrencyLearned():
                self._rate, self._concurrency = None, event.limit

    def now(self) -> str:
        """Return the state of the service for the progress bar; empty if it answers."""
        if self._out_since is None:
            return "" if self._rate is None else f"limited to {self._rate.rate:.3g}/s"
        now = time.monotonic()
        return f"no answer for {now - self._out_since:.0f} s, next probe in {max(0.0, self._next_probe - now):.0f} s"

    def summary(self) -> Iterator[str]:
        """Yield lines about outages and learned limits; none if there were none."""
        if self._out_for >= _MIN_OUTAGE:
            yield f"  no answer from the service for {self._out_for:.0f} s in total; --patience bounds each outage"
        if self._rate is not None:
            window = "" if self._rate.per is None else f", in windows of {self._rate.per:.2g} s"
            yield f"  the service limits all accounts together to about {self._rate.rate:.3g} requests/s{window}"
            yield f"    hint: use --rate {self._rate.rate:.2g} to stay within it"
        if self._concurrency is not None:
            yield f"  the service takes about {self._concurrency} requests at the same time"
            yield f"    hint: use --concurrency {self._concurrency} to stay within it"


@define
class Tally:
    """Counts and failures of a job so far.

    Attributes:
        total: Accounts of the job.
        fetched: Accounts fetched, by this run or an earlier one.
        failures: Names of the accounts that failed in this run, by reason and hint.
        service: The service's rate limit and outages.
    """

    total: int = 0
    fetched: int = 0
    failures: dict[tuple[str, str], list[str]] = field(factory=lambda: defaultdict(list))
    service: ServiceLog = field(factory=ServiceLog)

    @property
    def failed(self) -> int:
        """Number of accounts that failed in this run."""
        return sum(map(len, self.failures.values()))

    def count(self, outcome: Outcome) -> None:
        """Count one account's outcome."""
        if isinstance(outcome, Failed):
            error = outcome.error
            self._fail(outcome.account.name, type(error), error.status if isinstance(error, StatusError) else None)
        else:
            self.fetched += 1

    def count_line(self, line: Line) -> None:
        """Count one account's outcome that a worker has written."""
        if line.ok:
            self.fetched += 1
        else:
            error = msgspec.json.decode(line.text)["error"]
            self._fail(line.account, getattr(errors, error["type"], AudiencesError), error["status"])

    def _fail(self, name: str, kind: type[AudiencesError], status: int | None) -> None:
        reason = kind.__name__ if status is None else f"{kind.__name__} (HTTP {status})"
        self.failures[reason, kind.hint].append(name)

    def summary(self) -> Iterator[str]:
        """Yield the totals, then each reason for failure with its accounts, the most frequent first."""
        yield f"{self.fetched:,} of {self.total:,} accounts fetched, {self.failed:,} failed"
        for (reason, hint), names in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(printable(name) for name in names[:_NAMED])
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            yield f"  {len(names):,} × {reason}: {shown}{more}"
            if hint:
                yield f"    hint: {hint}"
        yield from self.service.summary()


def run(job: Job, tally: Tally) -> None:
    """Fetch the accounts that are missing from the output, in this process.

    *tally* is up to date even if this raises.

    Raises:
        AudiencesError: The job cannot begin.
        OSError: The output cannot be written.
        KeyboardInterrupt: Ctrl-C; fetched accounts are kept.
    """
    client = AudiencesClient(
        base_url=job.base_url,
        timeout=job.timeout,
        retry=RetryPolicy(max_attempts=job.max_attempts),
        service_rate_limit=None if job.rate is None else RateLimit(job.rate),
        on_event=tally.service,
    )
    _run(job, tally, lambda file: _fetch(job, tally, file, client))


def run_distributed(job: Job, tally: Tally, url: str, parts: Path) -> None:
    """Do the same as `run` with the workers of a docket, which write to the directory *parts*."""
    from audiences_async import distributed  # noqa: PLC0415 - of an optional extra

    names = (account.name for account in job.accounts)

    async def submit(file: OutcomeFile) -> None:
        with progress(tally) as show:

            def merged(line: Line) -> None:
                tally.count_line(line)
                show()

            def idle() -> None:
                notify("no worker yet; start one: audiences worker --docket URL --accounts FILE --out DIRECTORY")

            await distributed.submit(url, names, parts, file, resume=job.resume, on_merged=merged, on_idle=idle)

    _run(job, tally, submit)


def _run(job: Job, tally: Tally, fetch: Callable[[OutcomeFile], Coroutine[Any, Any, None]]) -> None:
    for target in {job.out, job.checkpoint}:
        if _is_same(target, job.accounts.path):
            raise ConfigurationError(f"output is the accounts file: {printable(str(target))}; choose another file")
    if not job.resume:
        check_new(job.out)
    if job.output != "ndjson":
        check_target(job.out, job.output, job.checkpoint)
    names = {account.name for account in job.accounts} if job.resume else None
    with OutcomeFile(job.checkpoint, resume=job.resume, accounts=names) as file:
        tally.total = len(job.accounts)
        tally.fetched = sum(account.name in file.fetched for account in job.accounts)
        asyncio.run(fetch(file))
    if job.output != "ndjson":
        convert(job.checkpoint, job.out, job.output)


async def _fetch(job: Job, tally: Tally, file: OutcomeFile, client: AudiencesClient) -> None:
    rest = (account for account in job.accounts if account.name not in file.fetched)
    async with client, client.stream(rest, concurrency=job.concurrency, patience=job.patience) as outcomes:
        with progress(tally) as show:
            async for outcome in outcomes:
                file.write(outcome)
                tally.count(outcome)
                show()


@contextmanager
def progress(tally: Tally) -> Iterator[Callable[[], None]]:
    """Show a progress bar if stderr is a terminal; yield a function to call after *tally* has changed."""
    console = Console(file=notices())
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
        _ServiceColumn(tally.service),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task("", total=tally.total, completed=tally.fetched, failed=0)
        yield lambda: bar.update(task, completed=tally.fetched + tally.failed, failed=tally.failed)


class _ServiceColumn(ProgressColumn):
    """The state of the service, as a column."""

    def __init__(self, log: ServiceLog) -> None:
        super().__init__()
        self._log = log

    def render(self, task: Task) -> Text:
        return Text(self._log.now())


class _RateColumn(ProgressColumn):
    """Accounts per second, as a column."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0.0:,.1f}/s")


def _is_same(path: Path, other: Path) -> bool:
    """Return whether both paths lead to the same file, resolving links."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()
