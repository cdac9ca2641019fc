"""Host name resolution: concurrent callers share one look-up, and addresses that failed come last."""

import asyncio
import socket
from time import monotonic
from weakref import WeakValueDictionary

from aiohttp import DefaultResolver
from aiohttp.abc import AbstractResolver, ResolveResult

_KEPT = 64  # number of failed addresses to remember


class _LookUp:
    """One look-up and its result."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.found: list[ResolveResult] | None = None
        # Not the exception: its frames would keep this object alive.
        self.failure: tuple[type[OSError], tuple[object, ...]] | None = None


class SharedResolver(AbstractResolver):
    """aiohttp's resolver, called once for concurrent callers. Nothing is cached: each look-up ends with its callers.

    A lock instead of a shared task: if the caller that holds it is cancelled, the next one takes over.
    """

    def __init__(self) -> None:
        """Create the resolver inside the event loop that will use it."""
        self._resolver: AbstractResolver = DefaultResolver()
        self._look_ups: WeakValueDictionary[tuple[str, int, int], _LookUp] = WeakValueDictionary()
        self._failed_at: dict[str, float] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of *host*; the most recently failed ones come last.

        Raises:
            OSError: The name cannot be resolved.
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
        """Move *address* to the end of later look-ups, because a connection to it has failed."""
        if len(self._failed_at) >= _KEPT:
            self._failed_at.clear()
        self._failed_at[address] = monotonic()

    async def close(self) -> None:
        """Close aiohttp's resolver."""
        await self._resolver.close()
