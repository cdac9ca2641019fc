"""Time that a test steps, so that waits take none."""

import asyncio
from bisect import insort

from attrs import define, field

from audiences_async.clock import Clock


@define
class SteppedTime:
    """Time that moves only if a task sleeps or a test moves it; for ``AudiencesClient(clock=time.clock)``, on one loop.

    What the client waits between attempts, for a pause or for a turn then takes no time at all. Sleeps of several tasks
    at the same time overlap. Requests under way do not hold the time back, so a job over many accounts sees them take
    longer than they do. What the client bounds by ``timeout`` and ``attempt_timeout`` while a peer is silent is real
    time still.

    Attributes:
        now: Seconds; to be moved by a test.
        draw: What every draw of jitter gives, from 0.0 to 1.0: 1.0 is the longest wait.
        slept: Seconds of each sleep, in order.
    """

    now: float = 1000.0
    draw: float = 1.0
    slept: list[float] = field(factory=list[float])
    _ends: list[float] = field(factory=list[float], init=False)  # of the sleeps under way, in order

    @property
    def clock(self) -> Clock:
        """The clock for a client."""
        return Clock(monotonic=lambda: self.now, wall=lambda: self.now, sleep=self.sleep, random=lambda: self.draw)

    async def sleep(self, seconds: float) -> None:
        """Let others run, and move the time on to the end of this sleep, unless another one ends earlier."""
        self.slept.append(seconds)
        end = self.now + seconds
        insort(self._ends, end)
        try:
            await asyncio.sleep(0)
            while end > self._ends[0]:  # noqa: ASYNC110 - one turn of the loop for each sleep that ends earlier
                await asyncio.sleep(0)
            self.now = max(self.now, end)
        finally:
            self._ends.remove(end)
