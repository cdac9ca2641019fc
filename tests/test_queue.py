"""A queue of calls in virtual time: its order, and what ends a wait."""

import asyncio
import math
from typing import Any

import pytest
import virtual

from audiences_async import ConfigurationError, DeadlineExceededError, TransportError
from audiences_async._base.deadlines import Deadlines
from audiences_async._pace.queue import Queue

pytestmark = [pytest.mark.once, pytest.mark.simulated]


class Line(Queue):
    """A queue whose head may go every *interval* seconds."""

    def __init__(self, interval: float = 1.0, limiter: Any = None) -> None:
        super().__init__(virtual.clock(), Deadlines(), limiter)
        self.interval = interval
        self.next_at = 1000.0
        self.served: list[tuple[float, int]] = []

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go."""
        return self.next_at - now

    async def come(self, number: int, deadline: float = math.inf, patience: float = math.inf) -> None:
        """Wait for a turn, and note when it came."""
        async with self.head(deadline, patience):
            await self.opened()
            self.next_at = self.clock.monotonic() + self.interval
            self.served.append((round(virtual.now(), 6), number))

    def all_come(self, count: int) -> list["asyncio.Task[None]"]:
        """Start calls that come one after the other."""
        return [asyncio.create_task(self.come(number)) for number in range(count)]


def test_first_come_first_served() -> None:
    """Serve callers in the order in which they came, one for each turn."""

    async def main() -> list[tuple[float, int]]:
        line = Line()
        await asyncio.gather(*line.all_come(4))
        return line.served

    assert virtual.run(main()) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_cancelled_waiter_gives_up_its_place() -> None:
    """Give the place of a cancelled waiter, at the head or behind it, to the next one without delay."""

    async def main() -> list[tuple[float, int]]:
        line = Line()
        tasks = line.all_come(6)
        await asyncio.sleep(0.5)
        for number in (1, 3, 5):
            tasks[number].cancel()
        await asyncio.wait(tasks)
        assert line.waiting == 0
        return line.served

    assert virtual.run(main()) == [(0, 0), (1, 2), (2, 4)]


def test_a_queue_is_free_if_no_call_waits() -> None:
    """Report a queue as free only if no call waits and a request may go now."""

    async def main() -> None:
        line = Line()
        assert line.is_free(1000.0)
        assert not line.is_free(999.0)
        tasks = line.all_come(2)
        await asyncio.sleep(0.5)
        assert (line.waiting, line.is_free(1001.0)) == (1, False)
        await asyncio.wait(tasks)

    virtual.run(main())


def test_a_turn_that_waits_for_a_reply_comes_with_it() -> None:
    """Wake the head when a reply changes the delay, for which no time was known."""

    async def main() -> list[tuple[float, int]]:
        line = Line()
        line.next_at = math.inf
        tasks = line.all_come(2)
        await asyncio.sleep(3)
        line.changed()  # nothing has: it waits on
        await asyncio.sleep(4)
        line.next_at = 1000.0
        line.changed()
        await asyncio.wait(tasks)
        return line.served

    assert virtual.run(main()) == [(7, 0), (8, 1)]


@pytest.mark.parametrize("error", [DeadlineExceededError("too late"), TransportError("no patience")])
def test_a_refused_waiter_leaves_with_the_reason(error: DeadlineExceededError | TransportError) -> None:
    """End a wait at once with the error that refused it; the others wait on."""

    async def main() -> list[Any]:
        line = Line()
        tasks = [*line.all_come(2), asyncio.create_task(line.come(2, 1001.0, 5.0)), asyncio.create_task(line.come(3))]
        await asyncio.sleep(0.5)
        (waiter,) = (waiter for waiter in line.waiters() if waiter.deadline == 1001.0)
        assert waiter.patience == 5.0
        waiter.refuse(error)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert line.served == [(0, 0), (1, 1), (2, 3)]
        return results

    assert virtual.run(main()) == [None, None, error, None]


def test_a_timeout_of_the_block_is_not_a_refusal() -> None:
    """Let a `TimeoutError` of the caller's own code through unchanged."""

    async def main() -> None:
        with pytest.raises(TimeoutError, match="its own"):
            async with Line().head(math.inf):
                raise TimeoutError("its own")

    virtual.run(main())


class Broken:
    """A limiter that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def acquire(self, account_name: str) -> None:
        """Raise the error."""
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ZeroDivisionError(), ConfigurationError),
        (asyncio.CancelledError(), TransportError),
        (OSError(), TransportError),
    ],
    ids=["a mistake", "cancelled inside", "may pass"],
)
def test_a_limiter_that_raises_is_named(error: BaseException, raised: type[Exception]) -> None:
    """Name the setting whose limiter raised; a cancellation inside it is not the caller's."""

    async def main() -> None:
        line = Line(limiter=Broken(error))
        assert not line.is_free(1000.0), "the limiter is asked first"
        with pytest.raises(raised, match=r"rate_limit\.acquire\(\)"):
            await line.ask_limiter("rate_limit", "north")

    virtual.run(main())
