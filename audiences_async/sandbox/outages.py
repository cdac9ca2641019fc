"""Outages of the sandbox: times in which every request gets the same answer."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from attrs import frozen


@frozen
class Outage:
    """An outage in progress, which `Sandbox.outage` has begun; used as a context manager, it ends with the block."""

    _end: Callable[[], object]

    def end(self) -> None:
        """End the outage, from any thread; calling it again has no effect."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()
