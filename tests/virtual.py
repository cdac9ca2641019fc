"""Virtual time: an event loop whose clock jumps to the next timer, and a service that answers inside it."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from attrs import define, field
from conftest import EMPTY_ANSWER
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async._http.transport import TransportSettings
from audiences_async._http.wire import Reply
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.errors import AttemptTimeoutError, TransportError

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """A selector that never waits: it advances the time instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits, and no timer will wake it"
        self.now += max(0.0, timeout)
        return []


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jumping = _Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in virtual time, exactly and at once; no task may be left behind."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:

        async def checked() -> T:
            result = await main
            await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result

        return runner.run(checked())


def clock(draw: Callable[[], float] = lambda: 0.5) -> Clock:
    """Return a clock that reads the running loop's time."""
    loop = asyncio.get_running_loop()
    return Clock(monotonic=loop.time, wall=loop.time, random=draw)


def now() -> float:
    """Return the seconds since the virtual start."""
    return asyncio.get_running_loop().time() - 1000.0


@define
class Service:
    """A service in virtual time, in place of the transport.

    `decide` takes a key and the time, and returns a status, or a whole response's status and headers.
    """

    decide: Callable[[str, float], int | tuple[int, dict[str, str]]]
    round_trip: float = 0.001
    connections: int = 100
    seen: list[tuple[float, str, int]] = field(factory=list)

    def __call__(self, settings: TransportSettings) -> "Service":
        """Return itself in place of a `Transport`."""
        return self

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Answer after a round trip, as decided when the request arrived."""
        await asyncio.sleep(self.round_trip / 2)
        decided = self.decide(key.reveal(), now())
        status, headers = decided if isinstance(decided, tuple) else (decided, {})
        self.seen.append((now(), key.reveal(), status))
        await asyncio.sleep(self.round_trip / 2)
        return Reply(status, CIMultiDictProxy(CIMultiDict(headers)), EMPTY_ANSWER if status == 200 else b"")

    def abandon(self) -> None:
        """Do nothing: no attempt hangs."""

    async def close(self) -> None:
        """Do nothing."""

    def times(self, *statuses: int, key: str | None = None) -> list[float]:
        """Return the times of requests with these statuses (any by default) and this key."""
        return [at for at, of, status in self.seen if status in (statuses or (status,)) and key in {None, of}]


class LeakyBucket:
    """A limit like nginx's `limit_req` with `nodelay`: *burst* above the rate, then 429, per key."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = burst
        self._excess: dict[str, tuple[float, float]] = {}

    def __call__(self, key: str, at: float) -> int:
        """Return the status of a request that arrives *at* this second."""
        excess, last = self._excess.get(key, (-1.0, at))
        excess = max(-1.0, excess - self.rate * (at - last)) + 1.0
        if excess > self.burst:
            return 429
        self._excess[key] = (excess, at)
        return 200


class FixedWindow:
    """A limit of *limit* requests in each window of *window* seconds."""

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        self._used: dict[int, int] = {}

    def __call__(self, key: str, at: float) -> int:
        """Return the status of a request that arrives *at* this second."""
        number = int(at / self._window)
        self._used[number] = self._used.get(number, 0) + 1
        return 200 if self._used[number] <= self._limit else 429


class SlidingWindow:
    """A limit of *limit* requests in the last *window* seconds; refused ones do not count."""

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        self._granted: list[float] = []

    def __call__(self, key: str, at: float) -> int:
        """Return the status of a request that arrives *at* this second."""
        self._granted = [time for time in self._granted if time > at - self._window]
        if len(self._granted) >= self._limit:
            return 429
        self._granted.append(at)
        return 200


class TokenBucket:
    """A limit of *rate* tokens per second, up to *capacity*; full at the start."""

    def __init__(self, rate: float, capacity: int) -> None:
        self._rate = rate
        self._capacity = capacity
        self._tokens, self._last = float(capacity), 0.0

    def __call__(self, key: str, at: float) -> int:
        """Return the status of a request that arrives *at* this second."""
        self._tokens = min(self._capacity, self._tokens + (at - self._last) * self._rate)
        self._last = at
        if self._tokens < 1:
            return 429
        self._tokens -= 1
        return 200


def shared(limit: Callable[[str, float], int], refusal: int = 429) -> Callable[[str, float], int]:
    """Return the same limit for all keys together, with another refusal."""
    return lambda key, at: refusal if limit("", at) == 429 else 200


@define
class Workers(Service):
    """A service with a few workers and a queue before them; it also works on abandoned requests."""

    decide: Callable[[str, float], int | tuple[int, dict[str, str]]] = field(default=lambda key, at: 200)
    workers: int = 4
    takes: float = 1.0
    attempt_timeout: float = 15.0
    wasted: int = 0
    _free_at: list[float] = field(factory=list)

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Answer when a worker is done, or time out."""
        self._free_at = self._free_at or [0.0] * self.workers
        first = min(range(self.workers), key=self._free_at.__getitem__)
        done = self._free_at[first] = max(now(), self._free_at[first]) + self.takes
        self.seen.append((now(), key.reveal(), 200))
        if done - now() > self.attempt_timeout:
            await asyncio.sleep(self.attempt_timeout)
            self.wasted += 1
            return AttemptTimeoutError("no whole reply")
        await asyncio.sleep(done - now())
        return Reply(200, CIMultiDictProxy(CIMultiDict()), EMPTY_ANSWER)


@define
class ConnectionLimit(Service):
    """A service that refuses requests while too many are in flight."""

    decide: Callable[[str, float], int | tuple[int, dict[str, str]]] = field(default=lambda key, at: 200)
    limit: int = 10
    refusal: int = 429
    _under_way: int = 0

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Answer after a round trip, or refuse at once."""
        status = 200 if self._under_way < self.limit else self.refusal
        self.seen.append((now(), key.reveal(), status))
        if status != 200:
            await asyncio.sleep(0.001)
            return Reply(status, CIMultiDictProxy(CIMultiDict()), b"")
        self._under_way += 1
        try:
            await asyncio.sleep(self.round_trip)
        finally:
            self._under_way -= 1
        return Reply(200, CIMultiDictProxy(CIMultiDict()), EMPTY_ANSWER)
