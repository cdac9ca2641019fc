"""Many accounts: outcomes as they complete, in bounded memory, and exactly one for every account."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

from audiences_async import checks
from audiences_async.errors import ClientClosedError
from audiences_async.models import Account

Accounts: TypeAlias = Iterable[Account] | AsyncIterable[Account]
"""Where a job's accounts come from; read one by one, as there is room for them."""

T = TypeVar("T")
R = TypeVar("R")

# Times the concurrency:
_HELD: Final = 2  # calls in their places, and results that the consumer has not taken yet
_AWAY: Final = 10  # calls that wait to retry, without a place
_UNPAID: Final = 10  # the part of the concurrency that retries without tokens have


@asynccontextmanager
async def stream(
    items: AsyncGenerator[T, None],
    work: Callable[[T, "Place"], Awaitable[R]],
    concurrency: int,
    patience: float = math.inf,
) -> AsyncIterator["Results[T, R]"]:
    """Results as they complete; whichever way the block is left, every task has ended by then.

    Args:
        items: What to work on.
        work: Called once for each item, with its place in the job; must turn what goes wrong with the item into a
            result.
        concurrency: Items under way at the same time, those that wait without a place not counted.
        patience: Seconds that an item waits while the service answers nobody.
    """
    results = Results(items, work, concurrency, patience)
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


class Place:
    """One item's place in a job: it leaves while it only waits, and another item is begun.

    Args:
        job: The job.
        patience: Seconds that it waits while the service answers nobody.
    """

    def __init__(self, job: "Results[Any, Any]", patience: float) -> None:
        self.held: bool = True
        self.patience: float = patience
        self._job = job
        self._borrows = False

    def leave(self) -> None:
        """Let another item take the place; keep it if too many wait already."""
        if self.held and self._job.vacate():
            self.held = False

    async def enter(self) -> None:
        """Return when there is a place again; at once if it is held."""
        if not self.held:
            await self._job.occupy()
            self.held = True

    async def borrow(self) -> None:
        """Return when one of the job's places for retries without tokens is free.

        Return at once if the item could not leave its own place: those who have borrowed wait for one.
        """
        if not self.held:
            await self._job.unpaid.acquire()
            self._borrows = True

    def give_back(self) -> None:
        """Let the next retry without tokens go, if this item has borrowed."""
        if self._borrows:
            self._borrows = False
            self._job.unpaid.release()


class Results(AsyncIterator[R], Generic[T, R]):
    """Results as they complete, to be iterated once, by one task or by several."""

    def __init__(
        self,
        items: AsyncGenerator[T, None],
        work: Callable[[T, Place], Awaitable[R]],
        concurrency: int,
        patience: float,
    ) -> None:
        """Must run inside the event loop that will use it."""
        self.unpaid: asyncio.Semaphore = asyncio.Semaphore(max(1, concurrency // _UNPAID))
        self._items = items
        self._work = work
        self._concurrency = concurrency
        self._patience = patience
        self._reading = asyncio.Lock()
        self._exhausted = False
        self._is_left = False
        self._places = asyncio.Semaphore(concurrency)
        self._away = 0  # items that wait without a place
        self._surplus: set[asyncio.Task[None]] = set()  # workers that end because there are too many
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
        for semaphore in (self.unpaid, self._room, self._places):
            for _ in range(self._away):  # a request that others share goes on, and waits for no place of this job
                semaphore.release()
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

    def vacate(self) -> bool:
        """Give up a place; ``False`` if too many items wait without one."""
        if self._away >= _AWAY * self._concurrency:
            return False
        self._away += 1
        self._places.release()
        self._room.release()
        if not self._exhausted:
            self._start_worker()
        return True

    async def occupy(self) -> None:
        """Take a place again."""
        await self._room.acquire()
        try:
            await self._places.acquire()
        except BaseException:
            self._room.release()
            raise
        self._away -= 1

    async def _run(self) -> None:
        while not self._has_been_left() and not self._is_surplus():
            await self._room.acquire()
            await self._places.acquire()
            item = await self._next()
            if item is None or self._has_been_left():
                self._places.release()
                self._room.release()
                return
            if len(self._workers) - len(self._surplus) < self._concurrency + self._away:
                self._start_worker()  # one by one: a job of three accounts starts no hundred tasks
            place = Place(self, self._patience)
            result = await self._work(item[0], place)
            await place.enter()
            self._places.release()
            self._done.put_nowait((result,))
            await asyncio.sleep(0)  # what else is ready goes first: replies are read together, and requests sent so

    def _is_surplus(self) -> bool:
        """Return whether the worker that asks is one too many, since an item has come back to a place; it then ends."""
        if len(self._workers) - len(self._surplus) <= self._concurrency + self._away:
            return False
        task = asyncio.current_task()
        assert task is not None
        self._surplus.add(task)
        return True

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
        self._surplus.discard(worker)
        failure = asyncio.CancelledError() if worker.cancelled() else worker.exception()
        if failure is not None:
            self._exhausted = True
            self._failure = self._failure or failure
        if not self._workers:
            self._done.put_nowait(None)
