"""A rate that several processes share, kept in Redis."""

import asyncio
import math
from contextlib import suppress
from typing import Any, Final

from attrs import define, field
from redis.asyncio import Redis

from audiences_async._distributed.connection import unavailable
from audiences_async._pace.pacing import too_late
from audiences_async.policies import RateLimit

_AHEAD: Final = 1.0  # s; a turn that is further away is not reserved
_LATE: Final = 0.02  # s; a busy process that comes later than this, and than the interval, has missed its turn
_RETURN: Final = 0.1  # s for returning a turn, while its caller is cancelled


class RedisLimiter:
    """A `Limiter` for ``AudiencesClient(rate_limit=...)``: one rate per account, shared by several processes.

    It uses the generic cell rate algorithm, by the clock of Redis. A turn is reserved only when it is less than a
    second away, and returned if its caller gives up, so that callers that time out take nothing from others. A time in
    Redis that this rate cannot have led to is not trusted.

    Args:
        redis: A client, such as `connect` returns; the caller closes it. Each account that waits uses a connection for
            the length of a round trip, so that a pool of 10 that blocks when it is empty is enough.
        limit: Rate of each account.
        name: Name of a limit that all accounts share, for ``AudiencesClient(service_rate_limit=...)``; ``None`` means
            that each account has its own.

    Attributes:
        limit: The rate. No process can be faster, so that a client refuses a call behind many others at once.
    """

    def __init__(self, redis: Redis, limit: RateLimit, *, name: str | None = None) -> None:
        self.limit: RateLimit = limit
        self._name = name
        self._interval = limit.per / limit.rate
        self._tolerance = self._interval * (limit.burst - 1)
        self._take: Any = redis.register_script(_TAKE)
        self._give_back: Any = redis.register_script(_GIVE_BACK)
        self._lines: dict[str, _Line] = {}

    async def acquire(self, account_name: str) -> None:
        """Wait until the account may send.

        Raises:
            DocketError: Redis is unreachable, does not answer, or refuses. The client takes it for a failure that may
                pass, and tries again as after a failed connection.
        """
        await self.acquire_within(account_name, math.inf)

    async def acquire_within(self, account_name: str, timeout: float) -> None:
        """Wait until the account may send, if that is less than *timeout* seconds from now.

        Raises:
            DeadlineExceededError: The turn comes later; raised at once, with ``retry_after``.
            DocketError: As for `acquire`.
        """
        ends_at = asyncio.get_running_loop().time() + timeout
        key = f"audiences:pace:{account_name}" if self._name is None else f"audiences:rate:{self._name}"
        line = self._lines.setdefault(key, _Line())
        least = line.waiting * self._interval - self._tolerance - self._interval
        if least > timeout:
            raise too_late(least)
        line.waiting += 1
        try:
            async with asyncio.timeout_at(None if timeout == math.inf else ends_at), line.lock:
                await self._wait(key, ends_at)
        except TimeoutError:
            raise too_late(line.waiting * self._interval) from None
        finally:
            line.waiting -= 1
            if not line.waiting:
                self._lines.pop(key, None)

    async def _wait(self, key: str, ends_at: float) -> None:
        """Wait for the next turn of *key*; the callers of this process come one by one."""
        now = asyncio.get_running_loop().time
        while True:
            left = min(ends_at - now(), 1e9)
            wait, turn = await self._ask(key, left)
            if wait > left:
                raise too_late(wait)
            due = now() + wait
            if turn is None:
                await asyncio.sleep(wait - _AHEAD)
                continue
            await self._sleep(wait, key, turn)
            if now() - due < max(_LATE, self._interval):
                return

    async def _sleep(self, seconds: float, key: str, turn: bytes) -> None:
        """Wait for a turn, and return it if the caller gives up."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            with suppress(Exception):
                async with asyncio.timeout(_RETURN):
                    await self._give_back(keys=[key], args=[turn, _micro(self._interval)])
            raise

    async def _ask(self, key: str, left: float) -> tuple[float, bytes | None]:
        """Return the seconds until the next turn, and the turn if it was reserved."""
        numbers = (self._interval, self._tolerance, min(_AHEAD, left))
        try:
            wait, turn = await self._take(keys=[key], args=[_micro(number) for number in numbers])
        except Exception as error:  # after a lost connection, redis-py may raise an AttributeError
            raise unavailable(error) from error
        return int(wait) / 1e6, turn


@define(eq=False)
class _Line:
    """The callers of this process that wait for the same limit."""

    lock: asyncio.Lock = field(factory=asyncio.Lock)
    waiting: int = 0


def _micro(seconds: float) -> float:
    return seconds * 1e6


_TAKE: Final = """
local interval, tolerance, ahead = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local due = tonumber(redis.call('GET', KEYS[1]) or '') or now
local latest = now + tolerance + interval + 1000000
if due ~= due or due > latest then due = now + tolerance end
due = math.max(due, now)
local wait = math.max(0, due - tolerance - now)
if wait > ahead then return {math.ceil(wait), false} end
local turn = string.format('%.0f', due + interval)
redis.call('SET', KEYS[1], turn, 'PX', math.ceil((due + interval - now) / 1000) + 1)
return {math.ceil(wait), turn}
"""
_GIVE_BACK: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], string.format('%.0f', ARGV[1] - ARGV[2]), 'KEEPTTL')
end
"""
