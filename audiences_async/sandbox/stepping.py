"""Time that a test steps, so that waits take none."""

import asyncio

from attrs import define, field

from audiences_async.clock import Clock


@define
class SteppedTime:
    """Time that moves only if a task sleeps or a test moves it; for ``AudiencesClient(clock=time.clock)``.

    What the client waits between attempts, for a pause or for a turn then takes no time at all. What it bounds by
    ``timeout`` and ``attempt_timeout`` while a peer is silent is real time still.

    Attributes:
        now: Seconds; to be moved by a test.
        draw: What every draw of jitter gives, from 0.0 to 1.0: 1.0 is the longest wait.
        slept: Seconds of each sleep, in order.
    """

    now: float = 1000.0
    draw: float = 1.0
    slept: list[float] = field(factory=list[float])

    @property
    def clock(self) -> Clock:
        """The clock for a client."""
        return Clock(monotonic=lambda: self.now, wall=lambda: self.now, sleep=self.sleep, random=lambda: self.draw)

    async def sleep(self, seconds: float) -> None:
        """Move the time on, and let others run."""
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)
