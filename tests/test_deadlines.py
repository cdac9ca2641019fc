"""Deadlines in virtual time: when a scope expires, and what stops or extends its clock."""

import asyncio
import math
from collections.abc import Coroutine
from contextlib import suppress

import pytest
import virtual

from audiences_async._base.deadlines import CallTime, Deadlines

pytestmark = [pytest.mark.once, pytest.mark.simulated]


async def ended(work: Coroutine[object, object, object]) -> float:
    """Await work that must time out; return the time at which it did."""
    with pytest.raises(TimeoutError):
        await work
    return virtual.now()


async def sleep_within(deadlines: Deadlines, seconds: float) -> None:
    """Sleep for an hour in a scope of *seconds*."""
    with deadlines.within(seconds):
        await asyncio.sleep(3600)


def test_a_scope_expires_at_its_deadline() -> None:
    """End each of several scopes with `TimeoutError` at its own deadline, in any order of creation."""

    async def main() -> list[float]:
        deadlines = Deadlines()
        return await asyncio.gather(*(ended(sleep_within(deadlines, seconds)) for seconds in (3.0, 1.0, 2.0)))

    assert virtual.run(main()) == pytest.approx([3.0, 1.0, 2.0])


def test_a_scope_that_is_left_in_time_has_no_effect() -> None:
    """Leave the task alone once the block is over, whatever its deadline was."""

    async def main() -> None:
        with Deadlines().within(1.0) as scope:
            await asyncio.sleep(0.5)
        await asyncio.sleep(10)
        scope.check()

    virtual.run(main())


def test_the_stage_hears_of_the_end_before_the_cancellation() -> None:
    """Tell the stage once, while the task still waits."""
    told: list[float] = []

    class Waiting:
        phase = "waiting"

        def out_of_time(self) -> None:
            told.append(virtual.now())

    async def main() -> None:
        async def work() -> None:
            with Deadlines().within(1.0) as scope:
                scope.stage = Waiting()
                try:
                    await asyncio.sleep(3600)
                finally:
                    assert len(told) == 1

        await ended(work())

    virtual.run(main())
    assert told == pytest.approx([1.0])


def test_a_cancellation_from_outside_takes_precedence() -> None:
    """Raise `CancelledError` if the task is cancelled in the moment in which its scope expires."""

    async def main() -> None:
        task = asyncio.create_task(sleep_within(Deadlines(), 1.0))
        asyncio.get_running_loop().call_later(1.0, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()

    virtual.run(main())


def test_a_swallowed_cancellation_is_noticed() -> None:
    """Raise the `TimeoutError` in `check` if foreign code caught the cancellation."""

    async def main() -> None:
        with Deadlines().within(1.0) as scope:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
            with pytest.raises(TimeoutError):
                scope.check()

    virtual.run(main())


def test_a_suspended_scope_keeps_its_remaining_time() -> None:
    """Stop the clock inside `suspended`, and continue with what was left."""

    async def main() -> float:
        async def work() -> None:
            with Deadlines().within(3.0) as scope:
                await asyncio.sleep(1)
                with scope.suspended():
                    await asyncio.sleep(100)
                await asyncio.sleep(3600)

        return await ended(work())

    assert virtual.run(main()) == pytest.approx(103.0, abs=0.01)


def test_an_extension_never_shortens() -> None:
    """Move a deadline to at least this time from now, and never to an earlier one."""

    async def main() -> float:
        async def work() -> None:
            with Deadlines().within(3.0) as scope:
                scope.extend(1.0)
                await asyncio.sleep(2)
                scope.extend(5.0)
                await asyncio.sleep(3600)

        return await ended(work())

    assert virtual.run(main()) == pytest.approx(7.0)


def test_end_expires_all_and_waits_for_them() -> None:
    """Return from `end` once every scope has been left, also one whose cleanup takes time."""

    async def main() -> None:
        deadlines, left = Deadlines(), list[float]()

        async def work() -> None:
            with deadlines.within(1000.0):
                try:
                    await asyncio.sleep(3600)
                finally:
                    await asyncio.sleep(2)
                    left.append(virtual.now())

        tasks = [asyncio.create_task(work()) for _ in range(3)]
        await asyncio.sleep(1)
        await deadlines.end()
        assert left == pytest.approx([3.0] * 3)
        assert all(isinstance(result, TimeoutError) for result in await asyncio.gather(*tasks, return_exceptions=True))

    virtual.run(main())


def test_end_inside_a_scope_does_not_wait_for_itself() -> None:
    """Let a task end all scopes from inside its own, which then expires in the task's next wait."""

    async def main() -> float:
        deadlines = Deadlines()

        async def work() -> None:
            with deadlines.within(1000.0):
                await deadlines.end()
                await asyncio.sleep(3600)

        return await ended(work())

    assert virtual.run(main()) == pytest.approx(0.0)


def test_a_calls_clock_stands_still_while_held() -> None:
    """Stop both of a call's clocks in `held`: the deadline that it plans by, and the scope that enforces it."""

    async def main() -> None:
        now = asyncio.get_running_loop().time
        deadlines = Deadlines()
        time = CallTime(now, deadlines.within(5.0), 5.0)
        with time.scope:
            await asyncio.sleep(1)
            with time.suspended():
                assert time.deadline == math.inf
                await asyncio.sleep(100)
            assert time.deadline - now() == pytest.approx(4.0)
            assert time.scope.ends_at - deadlines.loop.time() == pytest.approx(4.0)

    virtual.run(main())


def test_a_call_that_is_joined_gets_more_time() -> None:
    """Extend a call's deadline, its scope and the timeout that its error names."""

    async def main() -> None:
        now = asyncio.get_running_loop().time
        time = CallTime(now, Deadlines().within(5.0), 5.0)
        with time.scope:
            await asyncio.sleep(2)
            time.extend(1.0)
            assert (time.timeout, time.deadline - time.started) == (5.0, 5.0)
            time.extend(10.0)
            assert (time.timeout, time.deadline - time.started) == (12.0, 12.0)
            assert time.scope.ends_at == pytest.approx(time.deadline)

    virtual.run(main())


def test_a_call_that_is_joined_while_its_clock_stands_still_gets_more_time() -> None:
    """Extend what is left of a call that is held, which its error then names."""

    async def main() -> None:
        now = asyncio.get_running_loop().time
        deadlines = Deadlines()
        time = CallTime(now, deadlines.within(5.0), 5.0)

        async def work() -> None:
            with time.scope:
                await asyncio.sleep(2)
                with time.suspended():
                    await asyncio.sleep(100)
                    time.extend(1.0)
                    time.extend(10.0)
                assert (time.timeout, time.deadline - now()) == (112.0, 10.0)
                assert time.scope.ends_at - deadlines.loop.time() == pytest.approx(10.0)
                await asyncio.sleep(3600)

        assert await ended(work()) == pytest.approx(112.0)

    virtual.run(main())
