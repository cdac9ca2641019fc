"""``audiences worker``: fetch chunks with one client per process until SIGTERM or Ctrl-C."""

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from audiences_async._base import checks
from audiences_async.accounts import AccountFile
from audiences_async.cli.log import notify_production
from audiences_async.cli.output import notify
from audiences_async.client import AudiencesClient
from audiences_async.errors import printable
from audiences_async.policies import Limiter, RateLimit, RetryPolicy

if TYPE_CHECKING:
    from redis.asyncio import Redis

_CONNECTIONS = 2  # to Redis, for limits; each request needs one for a round trip


@frozen
class Settings:
    """Settings of a worker.

    Attributes:
        docket: URL of the Redis; hidden from ``repr`` because it may contain a password.
        accounts: Accounts with their keys.
        out: Directory for the parts, or URL of a bucket.
        queue: Name of the queue; ``None`` means the usual one.
        concurrency: Maximum number of accounts in flight.
        rate: Requests per second of all workers together; ``None`` means that the service's limit is learned.
        account_rate: Requests per second of each account, over all workers; ``None`` means that each account's rate is
            learned.
        timeout: Seconds for each account.
        patience: Longest outage in seconds; then the remaining accounts fail.
        grace: Seconds for accounts in flight after SIGTERM or Ctrl-C.
        max_attempts: Maximum number of requests per account, the first included.
        base_url: URL of the service; ``None`` means the client's default.
    """

    docket: str = field(repr=False)
    accounts: AccountFile
    out: str
    queue: str | None
    concurrency: int = field(validator=checks.is_count)
    rate: float | None = field(validator=validators.optional(checks.is_positive))
    account_rate: float | None = field(validator=validators.optional(checks.is_positive))
    timeout: float
    patience: float
    grace: float = field(validator=checks.is_not_negative)
    max_attempts: int
    base_url: str | None


async def run(settings: Settings) -> None:
    """Fetch chunks until SIGTERM or Ctrl-C; then no further account is started."""
    from audiences_async import distributed  # noqa: PLC0415 - of an optional extra

    this = asyncio.current_task()
    assert this is not None
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(this.cancel))
    queue = settings.queue or distributed.QUEUE
    notify_production(settings.base_url)
    async with AsyncExitStack() as stack:
        stack.enter_context(_logged())
        redis: Redis | None = None
        if settings.rate is not None or settings.account_rate is not None:
            redis = await stack.enter_async_context(distributed.connect(settings.docket, _CONNECTIONS))
        peers = distributed.Peers(settings.patience, _limiter(redis, settings.rate, queue))
        client = AudiencesClient(
            base_url=settings.base_url,
            timeout=settings.timeout,
            retry=RetryPolicy(max_attempts=settings.max_attempts),
            rate_limit=_limiter(redis, settings.account_rate, None),
            service_rate_limit=peers,
            max_connections=settings.concurrency,
            on_event=peers,
        )
        with suppress(asyncio.CancelledError):
            await distributed.work(
                settings.docket,
                distributed.by_name(settings.accounts),
                settings.out,
                client,
                concurrency=settings.concurrency,
                patience=settings.patience,
                queue=queue,
                grace=settings.grace,
                peers=peers,
                on_ready=lambda name: notify(f"worker {name} is ready: queue {queue}, parts go to {settings.out}"),
            )


def _limiter(redis: "Redis | None", rate: float | None, name: str | None) -> Limiter | None:
    from audiences_async import distributed  # noqa: PLC0415 - of an optional extra

    return None if redis is None or rate is None else distributed.RedisLimiter(redis, RateLimit(rate), name=name)


@contextmanager
def _logged() -> Iterator[None]:
    """Show warnings inside the block."""
    handler = OneLine(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("audiences_async", "docket")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class OneLine(logging.Handler):
    """Log each record on one line, without the traceback of a Redis that is away."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record to stderr."""
        error = record.exc_info[1] if record.exc_info else None
        reason = "" if error is None else f": {type(error).__name__}: {error}"
        notify(f"{record.levelname.lower()}: {printable(record.getMessage() + reason, limit=500)}")
