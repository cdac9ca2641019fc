"""A limit of requests in flight at the same time, such as a proxy's limit of connections."""

import math
from typing import Final

_SURE: Final = 4  # refusals, less grants, with at least as many others in flight
_LEAST: Final = 2  # others in flight; a refusal with fewer of them is of another kind
_IN_VAIN: Final = 2  # refusals in a row; a limit in flight grants as soon as others have come back
_LOOK_AGAIN: Final = 500  # grants, after which the limit is tried again


class LearnedConcurrency:
    """A limit that is recognized by refusals that come only while many others are in flight."""

    __slots__ = ("_grants", "_in_vain", "_lowest", "_refusals", "limit")

    def __init__(self) -> None:
        self.limit: float = math.inf
        """Requests in flight at the same time; ``inf`` if no such limit is recognized."""
        self._lowest: float = math.inf  # the fewest others in flight when a request was refused
        self._refusals = 0
        self._grants = 0  # since the limit was recognized
        self._in_vain = 0  # refusals since the latest grant

    def granted(self, others: int) -> None:
        """Note that a request was granted that was sent while *others* were in flight."""
        self._in_vain = 0
        if self.limit < math.inf:
            self._grants += 1
            if self._grants % _LOOK_AGAIN == 0:
                self.limit += 1
        elif others >= self._lowest:
            self._refusals -= 1
            if not self._refusals:
                self._lowest = math.inf

    def refused(self, others: int) -> bool:
        """Note that a request was refused; return whether this limit is why."""
        self._in_vain += 1
        if others < _LEAST or (self.limit < math.inf and self._in_vain > _IN_VAIN):
            self.limit = self._lowest = math.inf
            return False
        if self.limit < math.inf:
            self.limit = min(self.limit, others)
            return True
        if others < self._lowest:
            self._lowest, self._refusals = others, 0
        self._refusals += 1
        if self._refusals < _SURE:
            return False
        self.limit, self._grants = self._lowest, 0
        return True
