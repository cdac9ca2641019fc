"""Use the store of the parts from a worker, which waits for it if it fails."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import IO, Final, TypeVar

from audiences_async._distributed.parts import PartsError, PartStore

_T = TypeVar("_T")
_log: Final = logging.getLogger("audiences_async")
_HOLD: Final = 30.0  # s for which a worker tries again before it gives up
_FIRST_WAIT: Final = 0.1  # s between two tries, doubled each time
_LONGEST_WAIT: Final = 5.0  # s


class PatientStore:
    """A store that tries again for a while; meanwhile the worker takes no chunks.

    Args:
        store: The store.
        on_change: Called when `is_ready` may have changed.
    """

    def __init__(self, store: PartStore, on_change: Callable[[], None]) -> None:
        new_future = asyncio.get_running_loop().create_future
        self.fault: asyncio.Future[PartsError] = new_future()
        """Set if the store could not be used for too long, or the machine's disk is at fault."""
        self.place: str = store.place
        self._store = store
        self._on_change = on_change
        self._failing = 0  # uses that wait for it
        self._closing: asyncio.Future[None] = new_future()  # `asyncio.wait` leaves no task, as it would for an event

    @property
    def is_ready(self) -> bool:
        """Whether the worker may take chunks."""
        return not self._failing and not self._closing.done()

    def close(self) -> None:
        """Try only once more. May be called once."""
        self._closing.set_result(None)

    async def put(self, name: str, content: IO[bytes]) -> None:
        """Write a part.

        Raises:
            PartsError: The store failed for too long, or fails while the worker is closing.
        """
        await self._persist(lambda: self._store.put(name, content))

    async def has(self, name: str) -> bool:
        """Return whether a part is there.

        Raises:
            PartsError: As from `put`.
        """
        file = await self._persist(lambda: self._store.get(name))
        if file is not None:
            file.close()
        return file is not None

    def give_up(self, error: PartsError) -> PartsError:
        """Have the worker end, because its machine or its store is at fault; return the error."""
        if not self.fault.done():
            self.fault.set_result(error)
        return error

    async def _persist(self, doing: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await doing()
        except PartsError as error:
            _log.warning("%s; this worker takes no chunks while it tries again", error.summary)
        self._failing += 1
        self._on_change()
        try:
            return await self._try_again(doing)
        finally:
            self._failing -= 1
            self._on_change()

    async def _try_again(self, doing: Callable[[], Awaitable[_T]]) -> _T:
        now = asyncio.get_running_loop().time
        until, wait = now() + _HOLD, _FIRST_WAIT
        while True:
            await asyncio.wait({self._closing}, timeout=wait)
            try:
                return await doing()
            except PartsError as error:
                if self._closing.done() or now() > until:
                    raise self.give_up(error) from None
            wait = min(2 * wait, _LONGEST_WAIT)
