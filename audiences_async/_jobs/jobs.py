"""Jobs over many accounts: outcomes as they complete, in bounded memory, exactly one per account."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from heapq import heappop, heappush
from typing import Any, Final, Generic, NamedTuple, Self, TypeAlias, TypeVar

from audiences_async._base import checks
from audiences_async.errors import ClientClosedError
from audiences_async.models import Account

Accounts: TypeAlias = Iterable[Account] | AsyncIterable[Account]
"""The accounts of a job; read one by one, when there is room for them."""

T = TypeVar("T")
R = TypeVar("R")

# Multiples of the concurrency:
_HELD: Final = 2  # items in their places, plus results that the consumer has not taken yet
_AWAY: Final = 10  # items without a place, which wait for a retry
_PASSING: Final = 50  # new items that may pass one that wants its place again
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


class Places:
    """The places of a job, which bound the items in flight and the results that the consumer has not taken yet.

    New items go first, so that those that fail again and again do not slow the others down.

    Args:
        concurrency: Number of places.
    """

    def __init__(self, concurrency: int) -> None:
        self.unpaid: asyncio.Semaphore = asyncio.Semaphore(max(1, concurrency // _UNPAID))
        """Places for retries without tokens."""
        self._most = float(concurrency)  # places that may be taken
        self._most_held = float(_HELD * concurrency)
        self._taken = 0  # places
        self._held = 0  # places, and results that the consumer has not taken
        self._away = 0  # items that wait without a place
        self._begun = 0  # items so far
        self._returned = 0  # times that an item wanted its place again
        self._next: asyncio.Future[None] | None = None  # waits for a place for a new item
        self._returning: list[_Returning] = []  # a heap; waits for places too

    async def wait(self) -> None:
        """Return when there is a place for a new item, and take none: others may need it while the source is slow."""
        while self._taken >= self._most or self._held >= self._most_held:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            try:
                await self._next
            finally:
                self._next = None
                loop.call_soon(self._offer)  # what the new items leave

    def begin(self) -> None:
        """Take a place for a new item."""
        self._begun += 1
        self._take()

    def finish(self) -> None:
        """Return the place of an item that has a result."""
        self._taken -= 1
        self._offer()

    def consume(self) -> None:
        """Return the room of a result that was taken."""
        self._held -= 1
        self._offer()

    def vacate(self) -> bool:
        """Give up a place; return ``False`` if too many items wait without one."""
        if self._away >= _AWAY * self._most:
            return False
        self._leave()
        return True

    async def occupy(self, *, lets_pass: bool) -> None:
        """Take a place again; with *lets_pass* after the new items, for a while."""
        returned = asyncio.get_running_loop().create_future()
        self._returned += 1
        due = self._begun + (_PASSING * self._most if lets_pass else 0)
        heappush(self._returning, _Returning(due, self._returned, returned))
        self._offer()
        try:
            await returned
        except asyncio.CancelledError:
            if not returned.cancelled():  # but had its place already
                self._leave()
            raise

    def open(self) -> None:
        """Let all go that wait without a place: a shared request continues after the job, and must not wait for it."""
        self._most = self._most_held = math.inf
        self._offer()
        for _ in range(self._away):
            self.unpaid.release()

    def _take(self) -> None:
        self._taken += 1
        self._held += 1

    def _leave(self) -> None:
        self._away += 1
        self._taken -= 1
        self._held -= 1
        self._offer()

    def _offer(self) -> None:
        """Give the free places to those that wait for one."""
        while self._taken < self._most and self._held < self._most_held:
            if self._next is not None and not self._is_overdue:
                if not self._next.done():
                    self._next.set_result(None)
                return
            if not self._returning:
                return
            returned = heappop(self._returning).future
            if not returned.done():
                self._away -= 1
                self._take()
                returned.set_result(None)

    @property
    def _is_overdue(self) -> bool:
        """Whether enough new items have passed one that wants its place again."""
        return bool(self._returning) and self._begun >= self._returning[0].due


class _Returning(NamedTuple):
    """An item that wants its place again.

    Attributes:
        due: When so many items have begun, it goes before the next one.
        number: In the order of their return.
        future: Done when it has its place.
    """

    due: float
    number: int
    future: asyncio.Future[None]


class Place:
    """One item's place in a job. The item gives it up while it only waits, so that another item can start.

    Args:
        places: The job's.
        patience: Seconds that the item waits during an outage.
    """

    __slots__ = ("_borrows", "_places", "held", "patience")

    def __init__(self, places: Places, patience: float) -> None:
        self.held: bool = True
        self.patience: float = patience
        self._places = places
        self._borrows = False

    def leave(self) -> None:
        """Give up the place to another item; keep it if too many items wait already."""
        if self.held and self._places.vacate():
            self.held = False

    async def enter(self, *, lets_pass: bool = False) -> None:
        """Wait for a place, with *lets_pass* behind new items; return at once if the item still has one."""
        if not self.held:
            await self._places.occupy(lets_pass=lets_pass)
            self.held = True

    async def borrow(self) -> None:
        """Wait for one of the job's places for retries without tokens.

        Return at once if the item could not give up its own place, because borrowers wait for a place of the job too.
        """
        if not self.held:
            await self._places.unpaid.acquire()
            self._borrows = True

    def give_back(self) -> None:
        """Return the borrowed place, if any, to the next retry without tokens."""
        if self._borrows:
            self._borrows = False
            self._places.unpaid.release()


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
        self._items = items
        self._work = work
        self._patience = patience
        self._places = Places(concurrency)
        self._done: asyncio.Queue[tuple[R] | None] = asyncio.Queue()
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._read())

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
        self._places.consume()
        return result[0]

    async def leave(self) -> None:
        """End every task at once. Consumers that still iterate get a `ClientClosedError`."""
        if self._tasks:
            self._failure = ClientClosedError("the stream was closed before its end")
            self._places.open()
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        await self._items.aclose()

    async def _read(self) -> None:
        """Start a task for each item, when there is a place for it."""
        while True:
            await self._places.wait()
            try:
                item = await anext(self._items)
            except StopAsyncIteration:
                return
            await self._places.wait()  # others may have returned while the source was slow
            if self._failure is not None:  # the source may have lost this task's cancellation
                return
            self._places.begin()
            self._start(self._run(item))

    async def _run(self, item: T) -> None:
        place = Place(self._places, self._patience)
        result = await self._work(item, place)
        await place.enter()
        self._places.finish()
        self._done.put_nowait((result,))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.Task(work)  # never an eager one: tasks start together, and so send their requests
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure = asyncio.CancelledError() if task.cancelled() else task.exception()
        if failure is not None:
            self._failure = self._failure or failure
        if not self._tasks:
            self._done.put_nowait(None)
