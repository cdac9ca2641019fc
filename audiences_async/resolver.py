"""Host names to addresses: one look-up for all who ask at once, and failed addresses last."""

import asyncio
import socket
from time import monotonic
from weakref import WeakValueDictionary

from aiohttp import DefaultResolver
from aiohttp.abc import AbstractResolver, ResolveResult

_KEPT = 64  # failed addresses that are remembered


class _LookUp:
    """One look-up, and what it came to."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.found: list[ResolveResult] | None = None
        self.failure: tuple[type[OSError], tuple[object, ...]] | None = None  # no error: its frames would hold this


class SharedResolver(AbstractResolver):
    """aiohttp's resolver, asked once for concurrent callers. Nothing is cached: each look-up ends with its callers.

    A lock and no shared task: a caller that is cancelled while it asks leaves the asking to the next one.
    """

    def __init__(self) -> None:
        """Create it inside the event loop that will use it."""
        self._resolver: AbstractResolver = DefaultResolver()
        self._look_ups: WeakValueDictionary[tuple[str, int, int], _LookUp] = WeakValueDictionary()
        self._failed_at: dict[str, float] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of *host*, those that failed last at the end.

        Raises:
            OSError: The name cannot be looked up.
        """
        look_up = self._look_ups.setdefault((host, port, family), _LookUp())
        async with look_up.lock:
            if look_up.found is None and look_up.failure is None:
                try:
                    look_up.found = await self._resolver.resolve(host, port, family)
                except OSError as error:
                    look_up.failure = type(error), error.args
        if look_up.found is None:
            assert look_up.failure is not None
            kind, args = look_up.failure
            raise kind(*args)
        return sorted(look_up.found, key=lambda result: self._failed_at.get(result["host"], 0.0))

    def failed(self, address: str) -> None:
        """Put *address* at the end of later look-ups: a connection to it has failed."""
        if len(self._failed_at) >= _KEPT:
            self._failed_at.clear()
        self._failed_at[address] = monotonic()

    async def close(self) -> None:
        """Close aiohttp's resolver."""
        await self._resolver.close()
