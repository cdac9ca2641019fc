"""Many accounts: outcomes as they complete, in bounded memory, and exactly one for every account."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Final, Generic, Self, TypeAlias, TypeVar

from audiences_async import checks
from audiences_async.errors import ClientClosedError
from audiences_async.models import Account

Accounts: TypeAlias = Iterable[Account] | AsyncIterable[Account]
"""Where a job's accounts come from; read one by one, as there is room for them."""

T = TypeVar("T")
R = TypeVar("R")

_HELD: Final = 2  # times the concurrency: calls under way, and results that the consumer has not taken yet


@asynccontextmanager
async def stream(
    items: AsyncGenerator[T, None], work: Callable[[T], Awaitable[R]], concurrency: int
) -> AsyncIterator["Results[T, R]"]:
    """Results as they complete; whichever way the block is left, every task has ended by then.

    Args:
        items: What to work on.
        work: Called once for each item; must turn what goes wrong with the item into a result.
        concurrency: Items under way at the same time.
    """
    results = Results(items, work, concurrency)
    try:
        yield results
    finally:
        await results.leave()


async def checked(accounts: Accounts) -> AsyncGenerator[Account, None]:
    """The same accounts, one by one.

    Raises:
        ConfigurationError: Something among them is no `Account`.
    """
    number = 0
    async with aclosing(each(accounts)) as given:
        async for account in given:
            checks.instance(f"accounts[{number}]", account, Account)
            yield account
            number += 1


async def each(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """The same items, one by one."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class Results(AsyncIterator[R], Generic[T, R]):
    """Results as they complete, to be iterated once, by one task or by several."""

    def __init__(self, items: AsyncGenerator[T, None], work: Callable[[T], Awaitable[R]], concurrency: int) -> None:
        """Must run inside the event loop that will use it."""
        self._items = items
        self._work = work
        self._concurrency = concurrency
        self._reading = asyncio.Lock()
        self._exhausted = False
        self._is_left = False
        self._room = asyncio.Semaphore(_HELD * concurrency)
        self._done: asyncio.Queue[tuple[R] | None] = asyncio.Queue()
        self._failure: BaseException | None = None
        self._workers: set[asyncio.Task[None]] = set()
        self._start_worker()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        result = await self._done.get()
        if result is None:
            self._done.put_nowait(None)  # for whoever else asks, or asks again
            failure = self._failure
            if failure is None:
                raise StopAsyncIteration
            # An exception that is raised twice shows the frames of both.
            self._failure = ClientClosedError("the stream ended before its end; another consumer was told why")
            raise failure
        self._room.release()
        return result[0]

    async def leave(self) -> None:
        """End every task at once. Whoever still iterates is told that the results are not whole."""
        self._is_left = True  # also for a worker whose cancellation is lost in somebody else's code
        for worker in self._workers:
            worker.cancel()
        if self._workers:
            self._failure = ClientClosedError("the stream was left before its end")
            await asyncio.wait(self._workers)
        await self._items.aclose()

    def _has_been_left(self) -> bool:
        return self._is_left

    def _start_worker(self) -> None:
        # Never an eager one, which would start the next before it counts itself.
        worker = asyncio.Task(self._run())
        self._workers.add(worker)
        worker.add_done_callback(self._finished)

    async def _run(self) -> None:
        while not self._has_been_left():
            await self._room.acquire()
            item = await self._next()
            if item is None or self._has_been_left():
                return
            if len(self._workers) < self._concurrency:
                self._start_worker()  # one by one: a job of three accounts starts no hundred tasks
            self._done.put_nowait((await self._work(item[0]),))
            await asyncio.sleep(0)  # what else is ready goes first: replies are read together, and requests sent so

    async def _next(self) -> tuple[T] | None:
        async with self._reading:
            if not self._exhausted:
                try:
                    return (await anext(self._items),)
                except StopAsyncIteration:
                    self._exhausted = True
        return None

    def _finished(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        failure = asyncio.CancelledError() if worker.cancelled() else worker.exception()
        if failure is not None:
            self._exhausted = True
            self._failure = self._failure or failure
        if not self._workers:
            self._done.put_nowait(None)
