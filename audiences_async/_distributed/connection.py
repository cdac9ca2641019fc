"""Connections to Redis, and the error that all its failures become."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Final, cast
from urllib.parse import parse_qs, urlsplit

from docket import Docket
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from audiences_async.errors import ConfigurationError, TransportError, printable

QUEUE: Final = "audiences"
"""Name of the queue that is used if none is given."""

_QUEUE_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
_DATABASE: Final = re.compile(r"/?\d*")  # redis-py takes any other path for database 0
_TIMEOUT: Final = 5.0  # s for an exchange with Redis, and for a free connection of a pool
_CONNECTIONS: Final = 16  # the maximum for a docket's own loops
_RETRY: Final = Retry(ExponentialBackoff(cap=0.5, base=0.05), 9)  # 3.7 s; within _TIMEOUT, so that the cause shows
_KEPT: Final = timedelta(seconds=30)  # a finished chunk's state; submitters look for late chunks more often


class DocketError(TransportError):
    """Redis is unreachable, full or unusable."""

    hint = "check the Redis URL, and that Redis is running"


def connect(url: str, connections: int) -> Redis:
    """Return a client of the Redis, for `RedisLimiter`; the caller closes it.

    An exchange that takes longer than 5 s fails. If all connections are in use, the next exchange waits up to 5 s for
    one.

    Args:
        url: URL of the Redis.
        connections: Maximum number of connections, unless the URL has ``max_connections``.

    Raises:
        ConfigurationError: The URL is invalid.
    """
    with suppress(ValueError, TypeError):
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=_TIMEOUT,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
        )
        cast("Any", pool).make_connection()  # without I/O; refuses options that do not exist
        if url.startswith("unix:") or _DATABASE.fullmatch(urlsplit(url).path):
            return Redis.from_pool(pool)
    # Without the original message, which may repeat a password.
    raise ConfigurationError("invalid Redis URL; expected a form such as redis://host:6379/0")


@asynccontextmanager
async def opened(url: str, queue: str, connections: int = 0) -> AsyncIterator[Docket]:
    """Yield a connected docket.

    Args:
        url: URL of the Redis. If it has ``max_connections``, that is the size of the pool.
        queue: Name of the queue.
        connections: Connections needed beyond the docket's own.

    Raises:
        ConfigurationError: The URL or the name is invalid.
        DocketError: Redis is unreachable.
    """
    if not _QUEUE_NAME.fullmatch(queue):
        raise ConfigurationError(f"queue must be 1 to 100 letters, digits, dots, hyphens or underscores, got {queue!r}")
    connect(url, 1)  # refuses what only Docket would take
    async with reached():
        docket = await Docket(queue, _sized(url, connections), execution_ttl=_KEPT).__aenter__()
    try:
        async with reached():
            await docket.workers()
        async with docket.redis() as client:
            # Otherwise a worker that loses a connection takes no chunk until all that it has in hand are done.
            cast("Redis", client).set_retry(_RETRY)
        yield docket
    finally:
        await docket.__aexit__(None, None, None)


def _sized(url: str, connections: int) -> str:
    query = urlsplit(url).query
    if "max_connections" in parse_qs(query):
        return url
    return f"{url}{'&' if query else '?'}max_connections={_CONNECTIONS + connections}"


@asynccontextmanager
async def reached() -> AsyncIterator[None]:
    """Bound the block by a few seconds, and turn the failures of Redis into one error.

    Raises:
        DocketError: Redis is unreachable, does not answer, or refuses.
    """
    try:
        async with asyncio.timeout(_TIMEOUT):  # the docket's own connections wait for ever
            yield
    except TimeoutError as error:
        raise DocketError(f"Redis is unavailable: no answer within {_TIMEOUT:g} s") from error
    except (RedisError, OSError) as error:
        raise unavailable(error) from error


def unavailable(error: BaseException | None) -> DocketError:
    """Return the error that stands for a failure of Redis."""
    return DocketError(f"Redis is unavailable: {printable(str(error or '') or type(error).__name__)}")


async def exchange(docket: Docket, commands: Callable[[Any], object]) -> list[Any]:
    """Return the replies to the commands that *commands* adds to a pipeline; one round trip.

    Raises:
        DocketError: Redis is unreachable, does not answer, or refuses.
    """
    async with reached(), docket.redis() as client:
        pipeline = cast("Redis", client).pipeline(transaction=False)
        async with pipeline:
            commands(pipeline)
            replies: list[Any] = await pipeline.execute()
    return replies
