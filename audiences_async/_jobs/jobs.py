"""Jobs over many accounts: outcomes as they complete, in bounded memory, exactly one per account."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Generic, Self, TypeAlias, TypeVar

from audiences_async._base import checks
from audiences_async.errors import ClientClosedError
from audiences_async.models import Account

Accounts: TypeAlias = Iterable[Account] | AsyncIterable[Account]
"""The accounts of a job; read one by one, when there is room for them."""

T = TypeVar("T")
R = TypeVar("R")

# Multiples of the concurrency:
_HELD: Final = 2  # calls in their places, plus results that the consumer has not taken yet
_AWAY: Final = 10  # calls that wait for a retry, without a place
_UNPAID: Final = 10  # divisor: the share of the concurrency for retries without tokens


@asynccontextmanager
async def stream(
    items: AsyncGenerator[T, None],
    work: Callable[[T, "Place"], Awaitable[R]],
    concurrency: int,
    patience: float = math.inf,
) -> AsyncIterator["Results[T, R]"]:
    """Yield results as they complete; when the block is left, in any way, all tasks have ended.

    Args:
        items: The items to work on.
        work: Called once per item, with its place in the job; must turn an item's failure into a result.
        concurrency: Maximum number of items in flight, without those that wait without a place.
        patience: Seconds that an item waits during an outage.
    """
    results = Results(items, work, concurrency, patience)
    try:
        yield results
    finally:
        await results.leave()


async def checked(accounts: Accounts) -> AsyncGenerator[Account, None]:
    """Yield the accounts one by one.

    Raises:
        ConfigurationError: An item is not an `Account`.
    """
    number = 0
    async with aclosing(each(accounts)) as items:
        async for account in items:
            checks.instance(f"accounts[{number}]", account, Account)
            yield account
            number += 1


async def each(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """Yield the items one by one, from a sync or async iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class Place:
    """One item's place in a job. The item gives it up while it only waits, so that another item can start.

    Args:
        job: The job.
        patience: Seconds that the item waits during an outage.
    """

    def __init__(self, job: "Results[Any, Any]", patience: float) -> None:
        self.held: bool = True
        self.patience: float = patience
        self._job = job
        self._borrows = False

    def leave(self) -> None:
        """Give up the place to another item; keep it if too many items wait already."""
        if self.held and self._job.vacate():
            self.held = False

    async def enter(self) -> None:
        """Wait for a place; return at once if the item still has one."""
        if not self.held:
            await self._job.places.occupy()
            self.held = True

    async def borrow(self) -> None:
        """Wait for one of the job's places for retries without tokens.

        Return at once if the item could not give up its own place, because borrowers wait for a place of the job too.
        """
        if not self.held:
            await self._job.places.unpaid.acquire()
            self._borrows = True

    def give_back(self) -> None:
        """Return the borrowed place, if any, to the next retry without tokens."""
        if self._borrows:
            self._borrows = False
            self._job.places.unpaid.release()


class Places:
    """The places of a job, which bound the items in flight and the results that the consumer has not taken yet.

    Args:
        concurrency: Number of places.
    """

    def __init__(self, concurrency: int) -> None:
        self.unpaid: asyncio.Semaphore = asyncio.Semaphore(max(1, concurrency // _UNPAID))
        """Places for retries without tokens."""
        self.away: int = 0
        """Number of items that wait without a place."""
        self._concurrency = concurrency
        self._free = asyncio.Semaphore(concurrency)
        self._room = asyncio.Semaphore(_HELD * concurrency)

    @property
    def workers(self) -> int:
        """Number of workers that the items in places, and those that wait without one, need."""
        return self._concurrency + self.away

    async def wait(self) -> None:
        """Return when there is a place, and take none."""
        async with self._room, self._free:
            pass

    async def take(self) -> None:
        """Take a place."""
        await self._room.acquire()
        try:
            await self._free.acquire()
        except BaseException:
            self._room.release()
            raise

    def finish(self) -> None:
        """Return the place of an item that has a result."""
        self._free.release()

    def consume(self) -> None:
        """Return the room of a result that was taken."""
        self._room.release()

    def vacate(self) -> bool:
        """Give up a place; return ``False`` if too many items wait without one."""
        if self.away >= _AWAY * self._concurrency:
            return False
        self.away += 1
        self._free.release()
        self._room.release()
        return True

    async def occupy(self) -> None:
        """Take a place again."""
        await self.take()
        self.away -= 1

    def open(self) -> None:
        """Let all go that wait without a place: a shared request continues after the job, and must not wait for it."""
        for semaphore in (self.unpaid, self._room, self._free):
            for _ in range(self.away):
                semaphore.release()


class Results(AsyncIterator[R], Generic[T, R]):
    """Results in order of completion; iterate once, from one task or from several."""

    def __init__(
        self,
        items: AsyncGenerator[T, None],
        work: Callable[[T, Place], Awaitable[R]],
        concurrency: int,
        patience: float,
    ) -> None:
        """Create it inside the event loop that will use it."""
        self.places: Places = Places(concurrency)
        self._items = items
        self._work = work
        self._patience = patience
        self._reading = asyncio.Lock()
        self._exhausted = False
        self._is_left = False
        self._surplus: set[asyncio.Task[None]] = set()  # workers that end because there are too many
        self._done: asyncio.Queue[tuple[R] | None] = asyncio.Queue()
        self._failure: BaseException | None = None
        self._workers: set[asyncio.Task[None]] = set()
        self._start_worker()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        result = await self._done.get()
        if result is None:
            self._done.put_nowait(None)  # for the other consumers, and for later calls
            failure = self._failure
            if failure is None:
                raise StopAsyncIteration
            # An exception that is raised twice shows the frames of both.
            self._failure = ClientClosedError("the stream failed before its end; another consumer has the error")
            raise failure
        self.places.consume()
        return result[0]

    async def leave(self) -> None:
        """End every task at once. Consumers that still iterate get a `ClientClosedError`."""
        self._is_left = True  # in case a worker's cancellation is lost in foreign code
        self.places.open()
        for worker in self._workers:
            worker.cancel()
        if self._workers:
            self._failure = ClientClosedError("the stream was closed before its end")
            await asyncio.wait(self._workers)
        await self._items.aclose()

    def _has_been_left(self) -> bool:
        return self._is_left

    def _start_worker(self) -> None:
        # Never an eager task, which would start the next one before it counts itself.
        worker = asyncio.Task(self._run())
        self._workers.add(worker)
        worker.add_done_callback(self._finished)

    def vacate(self) -> bool:
        """Give up a place; return ``False`` if too many items wait without one."""
        if not self.places.vacate():
            return False
        if not self._exhausted:
            self._start_worker()
        return True

    async def _run(self) -> None:
        while not self._has_been_left() and not self._is_surplus():
            item = await self._next()
            if item is None or self._has_been_left():
                return
            await self.places.take()
            if len(self._workers) - len(self._surplus) < self.places.workers:
                self._start_worker()  # one by one: a job of three accounts does not start a hundred tasks
            place = Place(self, self._patience)
            result = await self._work(item[0], place)
            await place.enter()
            self.places.finish()
            self._done.put_nowait((result,))
            await asyncio.sleep(0)  # other tasks go first: responses are read, and requests sent, in batches

    def _is_surplus(self) -> bool:
        """Return whether this worker should end because an item has returned to a place."""
        if len(self._workers) - len(self._surplus) <= self.places.workers:
            return False
        task = asyncio.current_task()
        assert task is not None
        self._surplus.add(task)
        return True

    async def _next(self) -> tuple[T] | None:
        async with self._reading:
            await self.places.wait()  # without taking one: items that return need it while the source is slow
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
