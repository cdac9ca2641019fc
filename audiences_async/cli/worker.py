"""``audiences worker``: one client for the process, chunks until SIGTERM or Ctrl-C."""

import asyncio
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from attrs import field, frozen, validators

from audiences_async import checks
from audiences_async.client import AudiencesClient
from audiences_async.models import Account
from audiences_async.rates import RateLimit
from audiences_async.retrying import RetryPolicy


@frozen
class Settings:
    """How a worker fetches.

    Attributes:
        docket: URL of the Redis; not printed, for it may hold a password.
        accounts: By name, with their keys.
        out: The directory for the parts.
        concurrency: Accounts under way at the same time.
        account_rate: Requests per second of each account, of all workers together; ``None`` means that each account's
            rate is learned.
        timeout: Seconds for each account.
        patience: Seconds in a row in which the service may answer nobody.
        max_attempts: Requests for each account at the most, the first included.
        base_url: Where the service is; ``None`` means as the client has it.
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
    """Take chunks until SIGTERM or Ctrl-C; what is under way then is finished first."""
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
