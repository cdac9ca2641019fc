"""One client's lanes: who may send, when, and whose limit a refusal reports."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

from attrs import evolve

from audiences_async._base.deadlines import CallTime, Deadlines
from audiences_async._http.quota import Quota
from audiences_async._jobs.places import Place
from audiences_async._pace.allowance import QuotaScope
from audiences_async._pace.lanes import Lane
from audiences_async._pace.pacing import (
    NEUTRAL,
    REFUSALS,
    PauseSettings,
    Report,
    Turn,
    Verdict,
    too_late,
)
from audiences_async._pace.queue import NO_TIME
from audiences_async._pace.service import ServiceLane
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey
from audiences_async.events import EventHook, emit
from audiences_async.models import Account
from audiences_async.policies import Limiter, RateLimit
from audiences_async.snapshots import AccountPace

_NO_CAUSE: Final = NEUTRAL | {"answered"}
_FIRST_PAUSE: Final = 0.1  # of throttle_base_delay
_KEPT_LANES: Final = 4096
_LOOK_EVERY: Final = 0.5  # s
_SPARE_LANES: Final = 64  # which may be idle


class Released(NamedTuple):
    """The meaning of a refusal for a retry.

    Attributes:
        is_paced: Whether it may leave all waiting to the lanes.
        waits: Whether it is of a job, and goes on waiting for a limit that all accounts share.
        counts: Whether it counts as an attempt: no limit that all accounts share may be the reason.
    """

    is_paced: bool
    waits: bool
    counts: bool


_ANSWERED: Final = Released(is_paced=False, waits=False, counts=True)


class Pacer:
    """The lanes of one client: the service's, and one for each account.

    Args:
        limit: The known rate of each account; ``None`` means that it is learned.
        service_limit: The known rate of all accounts together; ``None`` means that one is learned.
        connections: Requests that may be in flight at the same time.
        attempt_timeout: Seconds for one attempt.
        throttle_base_delay: Seconds; the first pauses after a 429 are a tenth of it, until a rate is learned.
        max_delay: Seconds of the longest pause that no refusal asked for.
        clock: Where the time comes from.
        deadlines: Where waits are bounded.
        on_event: Called with pauses and rates.
    """

    def __init__(
        self,
        limit: RateLimit | Limiter | None,
        service_limit: RateLimit | Limiter | None,
        *,
        connections: int,
        attempt_timeout: float,
        throttle_base_delay: float,
        max_delay: float,
        clock: Clock,
        deadlines: Deadlines,
        on_event: EventHook | None,
    ) -> None:
        self.clock: Clock = clock
        self.deadlines: Deadlines = deadlines
        self._limit = limit
        self._settings = PauseSettings(_FIRST_PAUSE * throttle_base_delay, max_delay)
        self._emit = partial(emit, on_event)
        self.service: ServiceLane = ServiceLane(
            service_limit,
            connections=connections,
            attempt_timeout=attempt_timeout,
            clock=clock,
            deadlines=deadlines,
            settings=evolve(self._settings, is_shared=True),
            emit=self._emit,
        )
        self._quota_scope: QuotaScope | None = None  # once a quota was announced
        self._lanes: dict[Account | str, Lane] = {}
        self._next_look = _SPARE_LANES  # lanes; idle ones are dropped then

    def lane(self, account: Account) -> Lane:
        """Return the account's lane. Functions for keys do not compare, so their accounts are distinguished by name."""
        key = account if isinstance(account.credential, ApiKey) else account.name
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) >= self._next_look:
                self._forget_idle()
            lane = Lane(
                account.name,
                limit=self._limit,
                clock=self.clock,
                deadlines=self.deadlines,
                settings=self._settings,
                emit=self._emit,
            )
            self._lanes[key] = lane
        return lane

    async def acquire(self, lane: Lane, time: CallTime, place: Place | None) -> Turn:
        """Return when a request of the lane's account may go.

        Args:
            lane: The account's.
            time: The time of the call.
            place: Its place in a job, held again when this returns; ``None`` if it is of no job.

        Raises:
            DeadlineExceededError: The turn cannot come before the call's deadline.
            ConfigurationError: A limiter of the caller's is wrong.
            TransportError: A limiter of the caller's failed for a reason that may pass; or the service has answered
                no account for as long as the job's patience.
        """
        now = self.clock.monotonic()
        if lane.is_free(now) and self.service.is_free(now) and (place is None or place.held):
            return self._take_turn(lane, now)
        expected = self.expected(lane, time)
        if now + expected >= time.deadline:
            raise too_late(expected)
        if place is not None:  # before the lane, whose other calls may hold all places
            with time.suspended():
                # Under a limit, a refused account is usually answered next; otherwise it may fail for ever.
                await place.enter(lets_pass=self.service.state == "open")
        elif lane.limiter is None and (turn := await self._turn_in_outage(lane, time)) is not None:
            return turn
        async with lane.head(time.deadline):
            await lane.opened()
            await lane.ask_limiter("rate_limit", lane.account, time.deadline - self.clock.monotonic())
            while True:
                await lane.opened()
                turn = await (self._single_turn(lane, time) if place is None else self._jobs_turn(lane, time, place))
                if turn is not None:  # else the lane has been closed meanwhile
                    return turn

    async def _turn_in_outage(self, lane: Lane, time: CallTime) -> Turn | None:
        """Return a turn that is not behind a job's calls, which wait for the end of the outage; ``None`` after it."""
        if self.service.state == "out":
            left = time.deadline - self.clock.monotonic()
            await self.service.ask_limiter("service_rate_limit", lane.account, left)
        while self.service.state == "out":
            await self.service.opened_or_out()
            turn = self._turn_if_open(lane)
            if turn is not None:
                return turn
            await lane.wait(lane.delay(self.clock.monotonic()))
        return None

    async def _single_turn(self, lane: Lane, time: CallTime) -> Turn | None:
        if self.service.state == "out":
            return await self._turn_in_outage(lane, time)
        async with self.service.head(time.deadline):
            left = time.deadline - self.clock.monotonic()
            await self.service.ask_limiter("service_rate_limit", lane.account, left)
            await self.service.opened_or_out()
            return self._turn_if_open(lane)

    async def _jobs_turn(self, lane: Lane, time: CallTime, place: Place) -> Turn | None:
        with time.suspended():
            now = self.clock.monotonic()
            service = self.service
            if service.delay(now) > 0 and 0 < service.outage.closed_for(now) >= place.patience:
                raise service.outage.impatient(now, place.patience, service.closing.left(now))
            async with self.service.head(math.inf, place.patience):
                await self.service.ask_limiter("service_rate_limit", lane.account)
                await self.service.opened()
                return self._turn_if_open(lane)

    def _turn_if_open(self, lane: Lane) -> Turn | None:
        now = self.clock.monotonic()
        return self._take_turn(lane, now) if lane.delay(now) <= NO_TIME else None

    def _take_turn(self, lane: Lane, now: float) -> Turn:
        lane.sent(now)
        service = self.service
        is_probe = service.sent(now)
        if is_probe:
            service.outage.probed(now)
        return Turn(now, is_probe, service.load.quick_answers, service.load.sent())

    def witness(self, turn: Turn, key: ApiKey) -> ApiKey | None:
        """Return the key that a job's probe is sent with, in place of the call's own; ``None`` if with its own.

        Half of the probes are sent for an account that was answered before: accounts that fail for ever, however many
        of them stand in a row, do not keep the service closed. If they were to blame before, the first probe is.
        """
        witness = self.service.outage.witness
        # Half of them, but not every second one: short and long pauses may alternate too, and decide what is answered.
        is_due = self.service.evidence.blames_accounts or self.service.outage.probes.bit_count() % 2
        return witness if is_due and witness is not key else None

    def release(
        self,
        lane: Lane,
        turn: Turn,
        report: Report,
        *,
        is_own: bool = True,
        in_job: bool = False,
    ) -> Released:
        """Record the result of a request, and decide whose limit a refusal reports.

        Args:
            lane: The account's.
            turn: What `acquire` returned.
            report: The meaning of the reply for the pace.
            is_own: Whether the request was the account's own, and no probe for another one.
            in_job: Whether the call is of a job, which waits as long as the service limits it.

        Returns:
            Whose the refusal is, and who waits before a retry.
        """
        now = self.clock.monotonic()
        verdict, pause, quota = report
        may_be_service = False
        if is_own and verdict not in _NO_CAUSE:
            lane.note_failure(self.service.answers)
            may_be_service = self._may_be_service(lane, turn, verdict)
        of_service = self.service.returned(now, turn, report, lane, is_own=is_own, may_be_service=may_be_service)
        if of_service or not is_own:
            lane.returned(now, turn.sent_at, "nothing", None)
        else:
            lane.returned(now, turn.sent_at, verdict, pause)
            if quota is not None or self._quota_scope is not None:
                self._announced(lane, now, turn, quota)
        if verdict == "answered":
            return _ANSWERED
        is_refused = in_job and verdict in REFUSALS
        # Even if others are answered: a window refuses the same accounts at each end, because they come back together.
        counts = not (is_refused and self.service.state == "limited" and not self.service.evidence.blames_accounts)
        if of_service:
            is_paced = self.service.paces_retries or (in_job and self.service.state == "limited")
            return Released(is_paced, is_refused and not lane.fails_alone, counts)
        return Released(verdict == "throttled" and lane.paces_retries, waits=False, counts=counts)

    def _announced(self, lane: Lane, now: float, turn: Turn, quota: Quota | None) -> None:
        self._quota_scope = self._quota_scope or QuotaScope()
        if quota is not None:
            self._quota_scope.announced(lane, now, quota)
        is_shared = quota is not None and self._quota_scope.is_shared
        self.service.paces.announced(now, turn.sent_at, quota if is_shared else None)
        lane.paces.announced(now, turn.sent_at, None if is_shared else quota)

    def _may_be_service(self, lane: Lane, turn: Turn, verdict: Verdict) -> bool:
        """Return whether a refusal or a failure may be the service's, and not this account's alone."""
        if verdict == "throttled" and lane.explains(turn.sent_at):
            return False
        if not lane.fails_alone:
            return True
        # An account that is refused again and again need not be the cause if many are.
        is_limited = self.service.state == "limited" and self.service.paces.rate is None
        return verdict in REFUSALS and (is_limited or self.service.evidence.shows_refusals)

    def expected(self, lane: Lane, time: CallTime) -> float:
        """Estimate the seconds until a call that comes now gets its turn, as far as they count for its time."""
        now = self.clock.monotonic()
        if time.stands_still or self.service.state == "out":
            return lane.expected(now)
        return max(lane.expected(now), self.service.expected(now))

    def snapshot(self) -> Iterator[AccountPace]:
        """Return how each account is paced right now."""
        now = self.clock.monotonic()
        return (lane.snapshot(now) for lane in self._lanes.values())

    def _forget_idle(self) -> None:
        """Drop the idle lanes, and the older half of the unused ones if there are too many."""
        now = self.clock.monotonic()
        lanes = {key: lane for key, lane in self._lanes.items() if not lane.is_idle(now)}
        if len(lanes) >= _KEPT_LANES:
            unused = [key for key, lane in lanes.items() if not lane.users and lane.closing.until <= now]
            for key in unused[: len(unused) // 2]:
                del lanes[key]
        self._lanes = lanes
        self._next_look = _SPARE_LANES + max(len(lanes), min(2 * len(lanes), _KEPT_LANES))


@contextmanager
def watching(service: ServiceLane) -> Iterator[None]:
    """Look now and then, for the length of a job, whether the service swallows requests."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        service.look_for_stall()
        timer = loop.call_later(_LOOK_EVERY, look)

    timer = loop.call_later(_LOOK_EVERY, look)
    service.jobs += 1
    try:
        yield
    finally:
        timer.cancel()
        service.jobs -= 1
        if not service.jobs:
            service.evidence.acquit()
