"""The attempts of one call: a key, a turn, a request, and its result reported to the pace."""

import asyncio
from collections.abc import Generator
from typing import Final, Literal

from audiences_async._base.deadlines import CallTime
from audiences_async._call.context import CallContext
from audiences_async._call.decide import report_of
from audiences_async._call.key import CallKey
from audiences_async._call.record import CallRecord
from audiences_async._http.quota import announced
from audiences_async._http.wire import Reply, Result, read_any, read_plain
from audiences_async._jobs.places import Place
from audiences_async._pace.pacer import Released
from audiences_async._pace.pacing import ANSWERED, NOTHING, Report, Turn
from audiences_async.credentials import ApiKey, KeySource
from audiences_async.errors import AudiencesError, ConnectionFailedError, StatusError, TransportError
from audiences_async.models import Account

_MOST_EXCUSED: Final = 4  # attempts that do not count, because a limit that all accounts share may have refused them
_MOST_REFUSALS: Final = 4  # by a limit that all accounts share, for each attempt that a call of a job may make


class Attempts:
    """Makes the attempts of one call, each when the pace lets it.

    Args:
        account: The account.
        credential: The key, or where fresh ones come from.
        time: The time that the call has.
        record: Where attempts are recorded.
        context: What all calls of the client share.
        place: The call's place in a job; ``None`` if it is of no job.
    """

    __slots__ = (
        "_account", "_context", "_lane", "_place", "_record", "_refusals", "_time", "excused", "is_paced", "key",
    )  # fmt: skip

    def __init__(
        self,
        account: Account,
        credential: ApiKey | KeySource,
        time: CallTime,
        record: CallRecord,
        context: CallContext,
        *,
        place: Place | None,
    ) -> None:
        self.key: CallKey = CallKey(credential)
        self.is_paced: bool = False
        """Whether the lanes do all the waiting for the next attempt."""
        self.excused: int = 0
        """Attempts so far that do not count: a limit that all accounts share may have refused them."""
        self._account = account
        self._time = time
        self._record = record
        self._context = context
        self._place = place
        self._refusals = 0  # by a limit that all accounts share

    def begin(self) -> None:
        """Take the account's lane: an unused lane is forgotten."""
        self._lane = self._context.pacer.lane(self._account)
        self._lane.users += 1
        self.key.begin()

    def end(self) -> None:
        """Let go of the lane, and of the key function."""
        self._lane.users -= 1
        self.key.end()

    def expected(self) -> float:
        """Estimate the seconds until the next turn, as far as they count for the call's time."""
        return self._context.pacer.expected(self._context.pacer.lane(self._account), self._time)

    async def next(self) -> Result:
        """Return the result of the next attempt."""
        try:
            key = self.key.fixed or await self.key.get(self._account.name)
            self._time.scope.check()
            while True:
                result = await self._exchange(key)
                if result is not None:
                    return result
        except TransportError as error:  # of the key function, of a limiter, or of a job whose patience ran out
            return error.with_traceback(None)
        finally:
            if self._place is not None:
                self._place.give_back()

    async def _exchange(self, key: ApiKey) -> Result | None:
        """Return the result of one request; ``None`` if it does not count as an attempt, and another one follows."""
        queued_at = self._context.clock.monotonic() if self._record.is_watched else 0.0
        turn = await self._context.pacer.acquire(self._lane, self._time, self._place)
        witness = self._context.pacer.witness(turn, key) if turn.probe and self._place is not None else None
        result: Result
        report = NOTHING
        try:
            self._record.attempt_started(queued_at)
            reply = await self._context.transport.attempt(
                witness or key, self._time.scope, url=self._context.url, header=self._context.header
            )
            if isinstance(reply, Reply):
                if self._record.is_watched:
                    self._look_for_notice(reply, witness or key)
                plain = read_plain(reply, witness or key)
                result = await self._read(reply, witness or key) if plain is None else plain
            else:
                result = reply
            report = self._report(result, reply)
            if witness is not None and report.verdict == "answered" and isinstance(result, AudiencesError):
                report = NOTHING  # its key was refused before any limit
                self._context.pacer.service.outage.dismiss(witness)
        finally:
            released = self._context.pacer.release(
                self._lane, turn, report, is_own=witness is None, in_job=self._place is not None
            )
        self._record.attempt_returned()
        self.is_paced = released.is_paced
        if report.verdict == "answered" and witness is None:
            if not isinstance(result, AudiencesError):  # which a service may send before it looks at any limit
                self._context.pacer.service.outage.witness = key
            return result
        if isinstance(result, ConnectionFailedError) and result.unsent and witness is None:
            # Wait for a request in flight to free a socket, if there is one.
            return None if self._context.pacer.service.load.shrink() else result
        # The reply to a witness is another account's, and never leaves this method.
        reason = "probe" if witness is not None else self._excuse(turn, released)
        if reason is None:
            if not released.counts and self.excused < _MOST_EXCUSED:
                self.excused += 1
            return result
        self._record.add(result, 0.0, reason, is_own=witness is None)
        return None

    async def _read(self, reply: Reply, key: ApiKey) -> Result:
        return await _in_turns(read_any(reply, key, now=self._context.clock.wall()))

    def _look_for_notice(self, reply: Reply, key: ApiKey) -> None:
        notice = self._context.notices.first_in(reply.headers, key)
        if notice is not None:
            self._record.deprecated(notice)

    def _report(self, result: Result, reply: Reply | TransportError) -> Report:
        quota = announced(reply.headers, now=self._context.clock.wall()) if isinstance(reply, Reply) else None
        if quota is None and not isinstance(result, AudiencesError):
            return ANSWERED  # as most are
        if isinstance(result, StatusError):  # what the service says of an account is not for the others
            self._context.pacer.service.outage.problem = f"HTTP {result.status}"
        elif isinstance(result, TransportError):
            self._context.pacer.service.outage.problem = result.message
        return report_of(result, quota, self._context.policy)

    def _excuse(self, turn: Turn, released: Released) -> Literal["probe", "pace"] | None:
        """Excuse a request of a job from counting as an attempt; return why, or ``None`` if it counts."""
        if self._place is None:
            return None
        if turn.probe:
            if self._context.pacer.service.outage.witness is None:
                self._place.leave()  # no account was answered yet: let the next one be the probe
            return "probe"
        if released.waits and self._refusals < _MOST_REFUSALS * self._context.policy.max_attempts:
            self._refusals += 1
            return "pace"
        return None


async def _in_turns(steps: Generator[None, None, Result]) -> Result:
    """Return the result of the steps, between which other tasks run."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        await asyncio.sleep(0)
