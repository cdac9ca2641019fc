"""How many requests of all accounts may be in flight: as many as the service finishes in time."""

import math
from typing import Final

from audiences_async._pace.concurrency import LearnedConcurrency
from audiences_async._pace.pacing import REFUSALS, Turn, Verdict

_FIRST_LIMIT: Final = 32.0  # requests in flight; three times as many a round trip later
_REOPEN: Final = 8.0  # requests in flight after an outage; then three times as many a round trip later
_LEAST_LIMIT: Final = 4.0  # requests in flight, however slow the service is
_FAST_STEP: Final = 2.0  # for each answer
_SLOW_STEP: Final = 0.2
_ANSWERS_PER_STEP: Final = 50  # answers after which growth may be faster
_QUICK_ANSWER: Final = 1 / 8  # of the attempt timeout
_SLOW_ANSWER: Final = 1 / 2
_AFTER_TIMEOUT: Final = 0.5  # of the limit
_AFTER_SLOW: Final = 0.8
_AFTER_REFUSAL: Final = 0.25
_FADING: Final = 0.999  # of the slowest answer, with each later one


class Load:
    """A limit of requests in flight that grows with answers, and shrinks with timeouts and slow answers.

    Args:
        connections: Requests that may be in flight at most.
        attempt_timeout: Seconds for one attempt.
    """

    __slots__ = (
        "_attempt_timeout", "_cut_at", "_growth", "_in_flight", "_learned", "_sent", "concurrency", "connections",
        "limit", "peak", "quick_answers", "slowest",
    )  # fmt: skip

    def __init__(self, connections: int, attempt_timeout: float) -> None:
        self.connections: int = connections
        self.limit: float = min(_FIRST_LIMIT, float(connections))
        """Requests that may be in flight now."""
        self.concurrency: float = math.inf
        """The service's own limit of requests in flight; ``inf`` if none is known."""
        self.peak: int = 0
        """The most requests that were in flight at the same time."""
        self.quick_answers: int = 0
        """Number of answers within a small part of the attempt timeout."""
        self.slowest: float = 0.0
        """Seconds of the slowest answer, fading with later ones."""
        self._attempt_timeout = attempt_timeout
        self._learned: LearnedConcurrency | None = None  # from the first refusal on
        self._in_flight: dict[int, int] = {}  # by the number of each request: how many others were in flight
        self._sent = 0
        self._growth = Growth(_FAST_STEP)
        self._cut_at = -math.inf

    def sent(self) -> int:
        """Note that a request goes now; return its number."""
        others = len(self._in_flight)
        if others >= self.peak:
            self.peak = others + 1
        self._sent += 1
        self._in_flight[self._sent] = others
        return self._sent

    def follow(self, now: float, turn: Turn, verdict: Verdict) -> bool:
        """Adapt the limit to the reply to the request of *turn*.

        Returns:
            Whether it shows that the service limits the requests in flight, to fewer than was known.
        """
        before = self.concurrency
        others = self._in_flight.pop(turn.number)
        took = now - turn.sent_at
        if verdict == "answered":
            if self._learned is not None:
                self._learned.granted(now, turn.sent_at, others)
            self._answered(now, turn, took)
        elif verdict == "timed out":
            self._shrink(now, turn, _AFTER_TIMEOUT)
        elif verdict in {"failed", "unavailable"} and self.limit < self.connections:
            self._grow(took)
        if verdict in REFUSALS:
            self._learned = self._learned or LearnedConcurrency()
            self._learned.refused(now, turn.sent_at, sum(number < turn.number for number in self._in_flight))
        if self._learned is None:
            return False
        self.concurrency = self._learned.limit
        self.limit = min(self.limit, self.concurrency)
        return self.concurrency < before

    def _answered(self, now: float, turn: Turn, took: float) -> None:
        if took > _SLOW_ANSWER * self._attempt_timeout:
            self._shrink(now, turn, _AFTER_SLOW)
        elif self.limit < self.connections:
            self._grow(took)
        self.slowest = max(_FADING * self.slowest, took)
        self.quick_answers += took <= _QUICK_ANSWER * self._attempt_timeout

    def _shrink(self, now: float, turn: Turn, share: float) -> None:
        others_were_quick = self.quick_answers - turn.quick_answers >= self.limit
        if turn.sent_at >= self._cut_at and not others_were_quick:
            self.ignore_until(now)
            limit = share * min(self.limit, len(self._in_flight) + 1)
            # One request that hangs must not block the others.
            self.cut(max(limit, min(_LEAST_LIMIT, self.connections)))

    def _grow(self, took: float) -> None:
        step = self._growth.step()
        if took > _QUICK_ANSWER * self._attempt_timeout:
            step = min(step, _SLOW_STEP)
        self.limit = min(float(self.connections), self.concurrency, self.limit + step)

    def cut(self, limit: float) -> None:
        """Set a lower limit, from which growth is slow."""
        self.limit = max(1.0, limit)
        self._growth = Growth(_SLOW_STEP)

    def shrink(self) -> bool:
        """Lower the limit to the current number of requests in flight; return whether one of them will come back.

        For a machine that cannot open another socket.
        """
        if not self._in_flight:
            return False
        self.cut(float(len(self._in_flight)))
        return True

    def refused(self) -> None:
        """Note a refusal of a shared limit whose rate is unknown."""
        self.limit = max(2.0, _AFTER_REFUSAL * self.limit)

    def reopen(self, now: float) -> None:
        """Begin anew with a few requests, in or after an outage: it may be a limit, which a flood would meet again."""
        self.ignore_until(now)
        self.limit = min(self.limit, _REOPEN)
        self._growth = Growth(_FAST_STEP)

    def ignore_until(self, now: float) -> None:
        """Ignore timeouts of requests that were sent before *now*."""
        self._cut_at = now


class Growth:
    """How much the limit grows with an answer, which is faster after many.

    Args:
        step: Requests in flight, for each answer at first.
    """

    __slots__ = ("_answers", "_step")

    def __init__(self, step: float) -> None:
        self._step = step
        self._answers = 0

    def step(self) -> float:
        """Note an answer; return by how many requests in flight the limit grows."""
        self._answers += 1
        if self._answers % _ANSWERS_PER_STEP == 0:
            self._step = min(_FAST_STEP, 2 * self._step)
        return self._step
