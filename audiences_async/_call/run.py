"""One call: pace, attempt, decide, wait, again. All that a call remembers is here, and ends with it."""

import asyncio
from collections.abc import Generator
from typing import Final

from attrs import frozen
from tenacity import AsyncRetrying, RetryCallState

from audiences_async._base.deadlines import CallTime
from audiences_async._call.decide import Again, Facts, Stop, decide, may_help, verdict_of
from audiences_async._call.retrying import RetryTokens, wait_full_jitter
from audiences_async._http.quota import Quota, announced
from audiences_async._http.transport import Transport
from audiences_async._http.wire import Reply, Result, read, read_plain
from audiences_async._pace.pacer import Pacer
from audiences_async._pace.pacing import REFUSALS, Verdict
from audiences_async._pace.places import Place
from audiences_async.clock import Clock
from audiences_async.credentials import ApiKey, KeySource
from audiences_async.errors import (
    AudiencesError,
    ConnectionFailedError,
    DeadlineExceededError,
    StatusError,
    TransportError,
)
from audiences_async.events import (
    Attempt,
    AttemptFinished,
    AttemptStarted,
    CallFinished,
    CallStarted,
    Event,
    EventHook,
    StopReason,
    emit,
    is_watched,
)
from audiences_async.models import Account, AudiencesResponse
from audiences_async.policies import RetryPolicy

_FINAL: Final = Stop("final")
_MOST_REFUSALS: Final = 4  # by a limit that all accounts share, for each attempt that a call of a job may make


@frozen(eq=False)
class CallSettings:
    """What all calls of one client share; see `AudiencesClient` for each."""

    policy: RetryPolicy
    tokens: RetryTokens
    clock: Clock
    on_event: EventHook | None


class Call:
    """One call for one account, from the first attempt to the answer or the error.

    Args:
        account: The account.
        credential: The key, or where fresh ones come from.
        time: The time that the call has. Only waits are held against it here; its scope cuts off the rest.
        pacer: Where the account's turns come from.
        transport: Where attempts are made.
        settings: What all calls of the client share.
        place: The call's place in a job; ``None`` if it is of no job.
    """

    def __init__(
        self,
        account: Account,
        credential: ApiKey | KeySource,
        time: CallTime,
        *,
        pacer: Pacer,
        transport: Transport,
        settings: CallSettings,
        place: Place | None = None,
    ) -> None:
        self._account = account.name
        # Not the lane itself yet: an unused lane is forgotten.
        self._of, self._pacer = account, pacer
        self.time: CallTime = time
        self._place = place
        self._key: ApiKey | None = credential if isinstance(credential, ApiKey) else None
        self._source: KeySource | None = None if isinstance(credential, ApiKey) else credential
        self._refused_key: ApiKey | None = None
        self._transport = transport
        self._settings = settings
        self._sent_at: float | None = None
        self._attempt_elapsed = 0.0
        self._attempts: tuple[Attempt, ...] = ()
        self._next: Again | Stop = _FINAL
        self._borrows = False  # whether the next attempt waits for a place of those without tokens
        self._was_stale = False
        self._refusals = 0  # by a limit that all accounts share
        self._is_paced = False  # whether the lanes do all the waiting for the next attempt
        self._watched = is_watched(settings.on_event)

    @property
    def key(self) -> ApiKey | None:
        """The key of the last attempt; ``None`` before the first."""
        return self._key

    async def run(self, first: AudiencesError | None = None) -> Result:
        """Return the answer, or the error of the last attempt; tenacity comes in if something has failed.

        Args:
            first: The error of the first attempt, if it was made before the call: its key function failed.
        """
        self._lane = lane = self._pacer.lane(self._of)
        lane.users += 1
        try:
            if self._watched:
                self._tell(CallStarted(self._account))
            result = await self._attempt() if first is None else first
            if isinstance(result, AudiencesError) and may_help(
                result, self._settings.policy, can_refresh_key=self._can_refresh_key
            ):
                result = await self._run_again(result)
            return self._finish(result)
        finally:
            lane.users -= 1
            # Whatever still holds this call does not hold the key for those that come later.
            self._source = None

    async def _run_again(self, first: Result) -> Result:
        pending = [first]

        async def attempt() -> Result:
            return pending.pop() if pending else await self._attempt()

        # One object for each call: tenacity keeps the state of its loop on itself. Errors are results, not
        # exceptions, so that a cancellation is never taken for something to retry.
        retrying = AsyncRetrying(
            retry=self._decides_to_retry,
            wait=self._wait,
            before_sleep=self._before_sleep,
            sleep=self._sleep,
        )
        result: Result = await retrying(attempt)
        return result

    def cut_off(self, error: AudiencesError, stop_reason: StopReason) -> AudiencesError:
        """Return the error of a call that ended from outside: by timeout, a closing client or a failed key function.

        An attempt that was under way counts: its request may be on the wire.
        """
        if self._sent_at is not None:
            self._record(self._cut_off_attempt(self._sent_at, stop_reason))
            self._sent_at = None
        elif isinstance(error, DeadlineExceededError) and error.retry_after is None:
            error.retry_after = self._pacer.expected(self._lane, self.time) or None
        return self._with_context(error, stop_reason)

    def attempts_until_now(self, stop_reason: StopReason) -> tuple[Attempt, ...]:
        """Return the attempts so far for a caller that leaves now, for *stop_reason*."""
        if self._sent_at is None:
            return self._attempts
        return (*self._attempts, self._cut_off_attempt(self._sent_at, stop_reason))

    def abandoned(self, error: BaseException) -> None:
        """Emit `CallFinished` for a cancelled call."""
        under_way = self._sent_at is not None
        elapsed = self._settings.clock.monotonic() - self.time.started
        self._tell(CallFinished(self._account, len(self._attempts) + under_way, elapsed, type(error).__name__))

    async def _attempt(self) -> Result:
        self._attempt_elapsed = 0.0
        try:
            key = self._key
            if key is None or key is self._refused_key:
                assert self._source is not None
                key = self._key = await self._source.get(account=self._account, refused=self._refused_key)
            self.time.scope.check()
            is_free, result = await self._exchange(key)
            while is_free:
                is_free, result = await self._exchange(key)
        except TransportError as error:  # of the key function, of a limiter, or of a job without patience
            if error.stop_reason == "patience":
                self._next = Stop("patience")
            return error.with_traceback(None)
        finally:
            if self._place is not None:
                self._place.give_back()
        return result

    async def _exchange(self, key: ApiKey) -> tuple[bool, Result]:
        """Wait for a turn, use it, and report the result.

        Returns:
            Whether the request does not count as an attempt and is made again; and its result. It may have lacked a
            socket, or have been a job's probe of a closed service.
        """
        asked_at = self._settings.clock.monotonic() if self._watched else 0.0
        turn = await self._pacer.acquire(self._lane, self.time, self._place)
        witness = self._pacer.witness(turn, key) if turn.probe and self._place is not None else None
        verdict: Verdict = "nothing"
        pause: float | None = None
        quota: Quota | None = None
        result: Result | None
        try:
            self._sent_at = self._settings.clock.monotonic()
            if self._watched:
                self._tell(AttemptStarted(self._account, self._next_number, self._sent_at - asked_at))
            reply = await self._transport.attempt(witness or key, self.time.scope)
            if not isinstance(reply, Reply):
                result = reply
            else:
                result, now = read_plain(reply), self._settings.clock.wall()
                if result is None:
                    result = await _in_turns(read(reply, witness or key, now=now))
                quota = announced(reply.headers, now=now)
                pause = quota.reset if quota is not None and quota.remaining == 0 else None
            verdict = verdict_of(result, self._settings.policy) if isinstance(result, AudiencesError) else "answered"
            if isinstance(result, AudiencesError) and verdict in REFUSALS:
                pause = result.retry_after
        finally:
            released = self._pacer.release(
                self._lane,
                turn,
                verdict,
                pause=pause,
                quota=quota,
                is_own=witness is None,
                in_job=self._place is not None,
            )
        self._is_paced = released.is_paced
        self._attempt_elapsed = self._settings.clock.monotonic() - self._sent_at
        self._sent_at = None
        if isinstance(result, ConnectionFailedError) and result.unsent:
            return self._pacer.service.shrink(), result  # another request will return a socket
        is_probe = self._place is not None and turn.probe
        if witness is not None or (is_probe and isinstance(result, AudiencesError) and verdict != "answered"):
            self._record(self._attempt_record(result, 0.0, "probe"))
            if witness is None and self._place is not None and self._pacer.service.witness is None:
                self._place.leave()  # no account was answered yet: let the next one be the probe
            return True, result
        if released.waits and self._refusals < _MOST_REFUSALS * self._settings.policy.max_attempts:
            self._refusals += 1
            self._record(self._attempt_record(result, 0.0, "pace"))
            return True, result
        if verdict == "answered":
            self._pacer.service.witness = key
        return False, result

    @property
    def _can_refresh_key(self) -> bool:
        return self._source is not None and self._refused_key is None

    def _decides_to_retry(self, state: RetryCallState) -> bool:
        result = _result_of(state)
        if isinstance(result, AudiencesError):
            self._next = self._decide(result, state)
            return isinstance(self._next, Again)
        return False

    def _decide(self, error: AudiencesError, state: RetryCallState) -> Again | Stop:
        facts = Facts(
            number=state.attempt_number,
            time_left=self.time.deadline - self._settings.clock.monotonic(),
            next_turn=self._pacer.expected(self._lane, self.time),
            can_refresh_key=self._can_refresh_key,
            was_stale=self._was_stale,
            is_paced=self._is_paced,
            backoff=lambda: wait_full_jitter(self._settings.policy, self._settings.clock)(state),
        )
        decided = decide(error, facts, self._settings.policy)
        if isinstance(decided, Stop):
            if error.retry_after is None:
                error.retry_after = decided.needed
        elif not decided.is_free and not self._settings.tokens.take():
            self._borrows = self._place is not None
            return decided if self._borrows else Stop("budget")
        return decided

    def _wait(self, _: RetryCallState) -> float:
        assert isinstance(self._next, Again)
        return self._next.wait

    def _before_sleep(self, state: RetryCallState) -> None:
        assert isinstance(self._next, Again)
        result = _result_of(state)
        self._was_stale |= self._next.reason == "stale-connection"
        self._record(self._attempt_record(result, self._next.wait, self._next.reason))
        if self._next.reason == "fresh-key":
            self._refused_key = self._key

    async def _sleep(self, seconds: float) -> None:
        """Wait between two attempts, in a job without a place."""
        assert isinstance(self._next, Again)
        if self._place is not None:
            self._place.leave()
        await self._settings.clock.sleep(seconds)
        if self._place is not None and self._borrows:
            self._borrows = False
            with self.time.held():
                await self._place.borrow()

    def _finish(self, result: Result) -> Result:
        # Decoding may have taken longer than the call had.
        if isinstance(result, AudiencesResponse) and self._settings.clock.monotonic() >= self.time.deadline:
            self._next = Stop("deadline")
            result = out_of_time(self.time.timeout)
        if isinstance(result, AudiencesResponse):
            self._settings.tokens.give_back()
            if self._watched:
                self._record(self._attempt_record(result, 0.0, "success"))
                self._tell_finished(None)
            return result
        assert isinstance(self._next, Stop)
        self._record(self._attempt_record(result, 0.0, self._next.reason))
        return self._with_context(result, self._next.reason)

    @property
    def _next_number(self) -> int:
        return len(self._attempts) + 1

    def _attempt_record(self, result: Result, wait: float, reason: str) -> Attempt:
        error = None if isinstance(result, AudiencesResponse) else result.message
        status = result.status if isinstance(result, AudiencesResponse | StatusError) else None
        return Attempt(self._next_number, status, error, self._attempt_elapsed, wait, reason)

    def _cut_off_attempt(self, sent_at: float, reason: StopReason) -> Attempt:
        elapsed = self._settings.clock.monotonic() - sent_at
        return Attempt(self._next_number, None, "cut off", elapsed, 0.0, reason)

    def _record(self, attempt: Attempt) -> None:
        self._attempts += (attempt,)
        self._tell(AttemptFinished(self._account, attempt))

    def _with_context(self, error: AudiencesError, stop_reason: StopReason) -> AudiencesError:
        error.account = self._account
        error.attempts = self._attempts
        error.elapsed = self._settings.clock.monotonic() - self.time.started
        error.stop_reason = stop_reason
        self._tell_finished(error)
        return error.with_traceback(None)  # whose frames would hold this call for as long as the error is kept

    def _tell_finished(self, error: AudiencesError | None) -> None:
        elapsed = self._settings.clock.monotonic() - self.time.started
        name = None if error is None else type(error).__name__
        self._tell(CallFinished(self._account, len(self._attempts), elapsed, name))

    def _tell(self, event: Event) -> None:
        if self._watched:
            emit(self._settings.on_event, event)


def out_of_time(timeout: float) -> DeadlineExceededError:
    """Return the error of a call that was not answered within its *timeout*, in seconds."""
    return DeadlineExceededError(f"no answer within timeout={timeout:.6g} s")


async def _in_turns(steps: Generator[None, None, Result]) -> Result:
    """Return the result of the steps, between which other tasks run."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        await asyncio.sleep(0)


def _result_of(state: RetryCallState) -> Result:
    assert state.outcome is not None
    result: Result = state.outcome.result()
    return result
