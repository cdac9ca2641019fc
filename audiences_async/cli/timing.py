"""Where the time of a job's accounts goes, in constant memory."""

import math
from collections import Counter, defaultdict
from typing import Final, Literal, TypeAlias

from audiences_async.events import AttemptFinished, AttemptStarted, CallFinished, Event

Phase: TypeAlias = Literal["turn", "wire", "backoff"]

PHASES: Final[tuple[Phase, ...]] = ("turn", "wire", "backoff")
"""Waiting for a turn in the pace and for a connection; sending and receiving; waiting after failures."""

QUANTILES: Final = (0.5, 0.95, 0.99)

_PER_E: Final = 20  # classes of values for each factor of e: their middle is within 3 % of each value
_LEAST: Final = 1e-4  # s; less counts as 0


class Distribution:
    """Seconds, of which quantiles are known to within 3 %.

    Attributes:
        count: Number of values.
        total: Their sum.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.total: float = 0.0
        self._classes: Counter[int | None] = Counter()

    def add(self, seconds: float) -> None:
        """Add a value."""
        self.count += 1
        self.total += seconds
        self._classes[None if seconds < _LEAST else round(math.log(seconds) * _PER_E)] += 1

    def quantile(self, share: float) -> float:
        """Return the value that *share* of all values do not exceed; 0.0 without values."""
        left = math.ceil(share * self.count)
        for each, count in sorted(self._classes.items(), key=lambda item: -math.inf if item[0] is None else item[0]):
            left -= count
            if left <= 0:
                return 0.0 if each is None else math.exp(each / _PER_E)
        return 0.0


class Timing:
    """Adds up the phases of each account's call from the client's events."""

    def __init__(self) -> None:
        self.phases: dict[Phase, Distribution] = {phase: Distribution() for phase in PHASES}
        self._calls: dict[str, dict[Phase, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        match event:
            case AttemptStarted():
                self._calls[event.account]["turn"] += event.waited
            case AttemptFinished():
                self._calls[event.account]["wire"] += event.attempt.elapsed
                self._calls[event.account]["backoff"] += event.attempt.wait
            case CallFinished():
                for phase, seconds in self._calls.pop(event.account, {}).items():
                    self.phases[phase].add(seconds)

    def quantiles(self) -> dict[Phase, tuple[float, ...]]:
        """Return p50, p95 and p99 of each phase in seconds; empty if no call has ended."""
        known = {phase: each for phase, each in self.phases.items() if each.count}
        return {phase: tuple(map(each.quantile, QUANTILES)) for phase, each in known.items()}
