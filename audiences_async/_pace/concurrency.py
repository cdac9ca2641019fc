"""A limit of requests in flight at the same time, such as a proxy's limit of connections."""

import math
from typing import Final

_SURE: Final = 4  # refusals, less grants, with at least as many others in flight
_LEAST: Final = 2  # others in flight; a refusal with fewer of them is of another kind
_QUICK_REFUSAL: Final = 1 / 4  # of the time of a grant, in which a request is refused that does not find a place
_IN_VAIN: Final = 2  # refusals in a row; a limit in flight grants as soon as others have come back
_RARELY: Final = 500  # grants


class LearnedConcurrency:
    """A limit that is recognized by quick refusals that come only while many others are in flight.

    One more is tried after a number of grants, which doubles each time that it is refused.
    """

    __slots__ = ("_changed_at", "_grants", "_in_vain", "_lowest", "_patience", "_refusals", "_took", "limit")

    def __init__(self) -> None:
        self.limit: float = math.inf
        """Requests in flight at the same time; ``inf`` if no such limit is recognized."""
        self._forget()
        self._changed_at = -math.inf  # when the limit was recognized or lowered
        self._grants = 0  # since one more was tried
        self._patience = 0.0  # grants until the next try

    def _forget(self) -> None:
        self.limit = self._lowest = math.inf  # the lowest: of others in flight when a request was refused
        self._refusals = 0  # with at least as many, less the grants
        self._took = 0.0  # s; the slowest of these refusals
        self._in_vain = 0  # refusals since the latest grant

    def granted(self, now: float, sent_at: float, others: int) -> None:
        """Note that a request was granted that was sent while *others* were in flight."""
        self._in_vain = 0
        if self.limit < math.inf:
            self._grants += 1
            if self._grants >= self._patience:
                self.limit += 1
                self._grants = 0
        elif others >= self._lowest:
            self._refusals -= 1
            if not self._refusals:
                self._forget()
        elif self._refusals >= _SURE and self._took <= _QUICK_REFUSAL * (now - sent_at):
            self.limit = self._patience = self._lowest
            self._changed_at, self._grants = now, 0

    def refused(self, now: float, sent_at: float, others: int) -> None:
        """Note that a request was refused.

        Args:
            now: The time.
            sent_at: When it was sent.
            others: Requests that were sent before it and are still in flight.
        """
        if self.limit < math.inf:
            if sent_at >= self._changed_at:
                self._refused_again(now, others)
            return
        if others < _LEAST:
            self._forget()
            return
        if others < self._lowest:
            self._forget()
            self._lowest = others
        self._refusals += 1
        self._took = max(self._took, now - sent_at)

    def _refused_again(self, now: float, others: int) -> None:
        self._in_vain += 1
        if others < _LEAST or self._in_vain > _IN_VAIN:
            self._forget()
            return
        self.limit = min(self.limit, others)
        self._changed_at, self._grants = now, 0
        self._patience = min(_RARELY, 2 * self._patience)
