"""The places of a job: which of its items may go, and which wait."""

import asyncio
import math
from heapq import heappop, heappush
from typing import Final, NamedTuple

# Multiples of the concurrency:
_HELD: Final = 2  # items in their places, plus results that the consumer has not taken yet
_AWAY: Final = 10  # items without a place, which wait for a retry
_PASSING: Final = 50  # new items that may pass one that wants its place again

_PER_UNPAID: Final = 10  # places, for each one that retries without tokens may use


class Places:
    """The places of a job, which bound the items in flight and the results that the consumer has not taken yet.

    New items go first, so that those that fail again and again do not slow the others down.

    Args:
        concurrency: Number of places.
    """

    def __init__(self, concurrency: int) -> None:
        self.unpaid: asyncio.Semaphore = asyncio.Semaphore(max(1, concurrency // _PER_UNPAID))
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

    def is_full(self) -> bool:
        """Whether there is no place for a new item."""
        return self._taken >= self._most or self._held >= self._most_held

    async def wait(self) -> None:
        """Return when there may be a place for a new item, and take none: others may need it if the source is slow."""
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

    def lift_limits(self) -> None:
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
        while not self.is_full():
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
        due: The number of items begun from which on it goes before the next new one.
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

    __slots__ = ("_borrows", "_places", "_stays", "held", "patience")

    def __init__(self, places: Places, patience: float) -> None:
        self.held: bool = True
        """Whether the item is in its place."""
        self.patience: float = patience
        """Seconds that the item waits during an outage."""
        self._places = places
        self._borrows = False
        self._stays = False

    def stay(self) -> None:
        """Keep the place from now on: items that share this one's request keep theirs until it has a result."""
        self._stays = True

    def leave(self) -> None:
        """Give up the place to another item; keep it if too many items wait already."""
        if self.held and not self._stays and self._places.vacate():
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
        if not self.held or self._stays:
            await self._places.unpaid.acquire()
            self._borrows = True

    def give_back(self) -> None:
        """Return the borrowed place, if any, to the next retry without tokens."""
        if self._borrows:
            self._borrows = False
            self._places.unpaid.release()
