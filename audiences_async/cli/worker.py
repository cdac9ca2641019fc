"""``audiences worker``: fetch chunks with one client per process until SIGTERM or Ctrl-C."""

import asyncio
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from attrs import field, frozen, validators

from audiences_async._base import checks
from audiences_async.client import AudiencesClient
from audiences_async.models import Account
from audiences_async.policies import RateLimit, RetryPolicy


@frozen
class Settings:
    """Settings of a worker.

    Attributes:
        docket: URL of the Redis; hidden from ``repr`` because it may contain a password.
        accounts: Accounts with their keys, by name.
        out: Directory for the parts.
        concurrency: Maximum number of accounts in flight.
        account_rate: Requests per second of each account, over all workers; ``None`` means that each account's rate is
            learned.
        timeout: Seconds for each account.
        patience: Longest outage in seconds; then the remaining accounts fail.
        max_attempts: Maximum number of requests per account, the first included.
        base_url: URL of the service; ``None`` means the client's default.
    """

    docket: str = field(repr=False)
    accounts: Mapping[str, Account]
    out: Path
    concurrency: int = field(validator=checks.is_count)
    account_rate: float | None = field(validator=validators.optional(checks.is_positive))
    timeout: float
    patience: float
    max_attempts: int
    base_url: str | None


async def run(settings: Settings) -> None:
    """Fetch chunks until SIGTERM or Ctrl-C; accounts in flight are finished first."""
    from audiences_async import distributed  # noqa: PLC0415 - of an optional extra

    this = asyncio.current_task()
    assert this is not None
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(this.cancel))
    async with AsyncExitStack() as stack:
        limiter = None
        if settings.account_rate is not None:
            redis = await stack.enter_async_context(distributed.connect(settings.docket, settings.concurrency))
            limiter = distributed.RedisLimiter(redis, RateLimit(settings.account_rate))
        client = AudiencesClient(
            base_url=settings.base_url,
            timeout=settings.timeout,
            retry=RetryPolicy(max_attempts=settings.max_attempts),
            rate_limit=limiter,
            max_connections=settings.concurrency,
        )
        with suppress(asyncio.CancelledError):
            await distributed.work(
                settings.docket,
                settings.accounts,
                settings.out,
                client,
                concurrency=settings.concurrency,
                patience=settings.patience,
            )
