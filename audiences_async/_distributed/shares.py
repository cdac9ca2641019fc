"""Divide a limit that all workers meet: none of them may starve, or be the last one for long."""

from collections.abc import Mapping
from typing import Final, Protocol

_SMALL_SHARE: Final = 1 / 3  # of the mean rate; a worker below it has been crowded out
_NEXT: Final = 1 / 2  # of the mean, at which it goes on; its share in full would have to be taken from the others
_MUCH: Final = 3 / 2  # of the mean; a worker above it crowds the others out


class Pace(Protocol):
    """The pace that a client has learned of a limit of all accounts."""

    @property
    def learned_rate(self) -> float | None:
        """Requests per second; ``None`` if none is learned."""

    def adopt(self, rate: float) -> None:
        """Keep to *rate* requests per second, as if it had been learned."""


class Share:
    """One worker's share.

    Args:
        pace: The pace of its client.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._rates: dict[str, float] = {}  # at the last look, of those that were busy

    @property
    def rate(self) -> float | None:
        """Requests per second; ``None`` if no limit was met."""
        return self._pace.learned_rate

    def adjust(self, name: str, busy: Mapping[str, float | None]) -> None:
        """Adapt the pace to those of other workers.

        Args:
            name: The name of this worker.
            busy: Rates of the workers that have accounts to fetch; ``None`` if one has learned none.
        """
        before, rates = self._rates, {name: rate for name, rate in busy.items() if rate is not None}
        self._rates = rates
        if name not in busy or 2 * len(rates) < len(busy):
            return  # what few of them met may be the limit of their address
        own, mean = self.rate, sum(rates.values()) / len(rates)
        if own is None:
            self._pace.adopt(mean)
        elif before.keys() > rates.keys():
            self._pace.adopt(max(own, sum(before.values()) / len(rates)))  # takes over from those that are done
        elif own < _SMALL_SHARE * mean:
            self._pace.adopt(_NEXT * mean)
        elif own > _MUCH * mean:
            self._pace.adopt(mean)
