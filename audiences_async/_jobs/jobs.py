"""Jobs over many accounts: outcomes as they complete, in bounded memory, exactly one per account."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Generic, NoReturn, Self, TypeAlias, TypeVar

from audiences_async._base import checks
from audiences_async._jobs.places import Place, Places
from audiences_async.errors import ClientClosedError
from audiences_async.models import Account

Accounts: TypeAlias = Iterable[Account] | AsyncIterable[Account]
"""The accounts of a job; read one by one, when there is room for them."""

T = TypeVar("T")
R = TypeVar("R")


@asynccontextmanager
async def stream(
    items: AsyncGenerator[T, None],
    work: Callable[[T, Place], Awaitable[R]],
    concurrency: int,
    patience: float = math.inf,
) -> AsyncIterator["Results[T, R]"]:
    """Yield results as they complete; when the block is left, all tasks have ended, or soon do if that is cancelled.

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
        self._done: deque[R] = deque()  # with an event, which costs less than a queue
        self._arrived = asyncio.Event()  # a result, or the end
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = self._start(self._read())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> R:
        while not self._done:
            if not self._tasks:
                self._raise_end()
            self._arrived.clear()
            await self._arrived.wait()
        self._places.consume()
        return self._done.popleft()

    def _raise_end(self) -> NoReturn:
        failure = self._failure
        if failure is None:
            raise StopAsyncIteration
        # An exception that is raised twice shows the frames of both.
        self._failure = ClientClosedError("the stream failed before its end; another consumer has the error")
        raise failure

    async def leave(self) -> None:
        """End every task at once. Consumers that still iterate get a `ClientClosedError`."""
        if self._tasks:
            self._failure = ClientClosedError("the stream was closed before its end")
            self._places.lift_limits()
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    async def _read(self) -> None:
        """Start a task for each item, when there is a place for it."""
        async with aclosing(self._items):
            while True:
                while self._places.is_full():
                    await self._places.wait()
                try:
                    item = await anext(self._items)
                except StopAsyncIteration:
                    return
                while self._places.is_full():  # others may have returned while the source was slow
                    await self._places.wait()
                self._check()
                self._places.begin()
                self._start(self._run(item))

    def _check(self) -> None:
        """Cancel the reader again if the job has failed: the source may have lost the first cancellation."""
        if self._failure is not None:
            raise asyncio.CancelledError

    async def _run(self, item: T) -> None:
        place = Place(self._places, self._patience)
        result = await self._work(item, place)
        if not place.held:
            await place.enter()
        self._places.finish()
        self._done.append(result)
        self._arrived.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.Task(work)  # never an eager one: tasks start together, and so send their requests
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        failure = asyncio.CancelledError() if task.cancelled() else task.exception()
        if failure is not None and self._failure is None:
            self._failure = failure
            if task is not self._reader:  # the others may wait for a place that it had
                self._reader.cancel()
                self._places.lift_limits()
        if not self._tasks:
            self._arrived.set()
