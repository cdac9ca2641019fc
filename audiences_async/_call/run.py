"""One call: attempt, decide, wait, again. All that a call remembers ends with it."""

from typing import Final

from tenacity import AsyncRetrying, RetryCallState

from audiences_async._base.deadlines import CallTime
from audiences_async._call.attempts import Attempts
from audiences_async._call.context import CallContext
from audiences_async._call.decide import Again, Facts, Stop, decide
from audiences_async._call.record import CallRecord
from audiences_async._call.retrying import wait_full_jitter
from audiences_async._http.wire import Result
from audiences_async._jobs.places import Place
from audiences_async.credentials import ApiKey, KeySource
from audiences_async.errors import AudiencesError, DeadlineExceededError
from audiences_async.events import StopReason
from audiences_async.models import Account

ASKING: Final = "waiting for the API key function"
"""The phase of a call before its request."""
_TURN: Final = "waiting for its turn"
_OUT_OF_TIME: Final = Stop("deadline")


class Call:
    """One call for one account, from the first attempt to the answer or the error.

    Args:
        account: The account.
        credential: The key, or where fresh ones come from.
        time: The time that the call has. Only waits are held against it here; its scope cuts off the rest.
        context: What all calls of the client share.
        place: The call's place in a job; ``None`` if it is of no job.
        call_id: Identifies the call; ``None`` means that an identifier is made when one is needed.
    """

    __slots__ = (
        "_attempts", "_borrows", "_context", "_ended_in", "_next", "_place", "_was_stale", "failure", "record",
        "retry_at", "time",
    )  # fmt: skip

    def __init__(
        self,
        account: Account,
        credential: ApiKey | KeySource,
        time: CallTime,
        context: CallContext,
        *,
        place: Place | None,
        call_id: str | None = None,
    ) -> None:
        self.time: CallTime = time
        self.record: CallRecord = CallRecord(account.name, time.started, context.clock, context.on_event, call_id)
        self._attempts = Attempts(account, credential, time, self.record, context, place=place)
        self._context = context
        self._place = place
        self._next: Again | Stop | None = None  # after the latest attempt, if it failed
        self._borrows = False  # whether the next attempt waits for a place of those without tokens
        self._was_stale = False
        self.failure: AudiencesError | None = None
        """The error of the latest attempt, while the call waits to retry; ``None`` at any other time."""
        self.retry_at: float = 0.0
        """When that wait ends, on the client's clock."""
        self._ended_in: str | None = None  # phase

    @property
    def key(self) -> ApiKey | None:
        """The key of the last attempt; ``None`` before the first."""
        return self._attempts.key.current

    def begin(self) -> None:
        """Keep the key that the account's key function has given, until `end`; without an effect if it is kept."""
        self._attempts.key.begin()

    def end(self) -> None:
        """Let go of the key function."""
        self._attempts.key.end()

    async def run(self, first: AudiencesError | None = None) -> Result:
        """Return the answer, or the error of the last attempt; tenacity comes in if something has failed.

        Args:
            first: The error of the first attempt, if it was made before the call: its key function failed.
        """
        self._attempts.begin()
        try:
            self.record.call_started(self._context.path)
            result = await self._attempts.next() if first is None else first
            if isinstance(result, AudiencesError):
                result = await self._after(result)
            return self._finish(result)
        finally:
            self._attempts.end()

    async def _after(self, first: AudiencesError) -> Result:
        """Return the result of the call after its first attempt has failed."""
        pending: list[Result] = [first]

        async def attempt() -> Result:
            return pending.pop() if pending else await self._attempts.next()

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

    @property
    def phase(self) -> str:
        """The current phase of the call, for the message of a timeout."""
        if self._ended_in is not None:
            return self._ended_in
        stage = self.time.scope.stage
        if self.record.sent_at is not None and stage is not None:
            return stage.phase
        return ASKING if self._attempts.key.is_asked_for else _TURN

    def cut_off(self, error: AudiencesError, stop_reason: StopReason) -> AudiencesError:
        """Return the error of a call that ended from outside: by timeout, a closing client or a failed key function."""
        self.hint_at_turn(error)
        self._ended_in = self.phase
        self.record.cut_off(stop_reason)
        return self.record.failed(error, stop_reason)

    def hint_at_turn(self, error: AudiencesError) -> None:
        """Set the time of the next turn on the error of a caller that had no more time to wait for it."""
        waits = self.record.sent_at is None and self.phase == _TURN
        if waits and isinstance(error, DeadlineExceededError) and error.retry_after is None:
            error.retry_after = self._attempts.expected()

    def _decides_to_retry(self, state: RetryCallState) -> bool:
        result = _result_of(state)
        if isinstance(result, AudiencesError):
            self._next = self._decide(result, state)
            return isinstance(self._next, Again)
        return False

    def _decide(self, error: AudiencesError, state: RetryCallState) -> Again | Stop:
        facts = Facts(
            number=state.attempt_number - self._attempts.excused,
            time_left=self.time.deadline - self._context.clock.monotonic(),
            next_turn=self._attempts.expected(),
            can_refresh_key=self._attempts.key.can_be_refreshed,
            was_stale=self._was_stale,
            is_paced=self._attempts.is_paced,
            backoff=lambda: wait_full_jitter(self._context.policy, self._context.clock)(state),
        )
        decided = decide(error, facts, self._context.policy)
        if isinstance(decided, Stop):
            if error.retry_after is None:
                error.retry_after = decided.needed
        elif not decided.is_free and not self._context.tokens.take():
            self._borrows = self._place is not None
            return decided if self._borrows else Stop("budget")
        return decided

    def _wait(self, _: RetryCallState) -> float:
        assert isinstance(self._next, Again)
        return self._next.wait

    def _before_sleep(self, state: RetryCallState) -> None:
        assert isinstance(self._next, Again)
        self._was_stale |= self._next.reason == "stale-connection"
        result = _result_of(state)
        self.failure = result if isinstance(result, AudiencesError) else None
        self.retry_at = self._context.clock.monotonic() + self._next.wait
        self.record.add(result, self._next.wait, self._next.reason)
        if self._next.reason == "fresh-key":
            self._attempts.key.refuse()

    async def _sleep(self, seconds: float) -> None:
        """Wait between two attempts, in a job without a place."""
        if self._place is not None:
            self._place.leave()
        await self._context.clock.sleep(seconds)
        self.failure = None
        if self._place is not None and self._borrows:
            self._borrows = False
            with self.time.suspended():
                await self._place.borrow()

    def _finish(self, result: Result) -> Result:
        self._ended_in = "decoding the reply"  # which may have taken longer than the call had
        if not isinstance(result, AudiencesError) and self._context.clock.monotonic() >= self.time.deadline:
            self._next = _OUT_OF_TIME
            result = out_of_time(self.time.timeout, self._ended_in)
        if not isinstance(result, AudiencesError):
            self._context.tokens.give_back()
            self.record.answered(result)
            return result
        assert isinstance(self._next, Stop)
        self.record.add(result, 0.0, self._next.reason)
        return self.record.failed(result, self._next.reason)


def out_of_time(timeout: float, phase: str) -> DeadlineExceededError:
    """Return the error of a call that was not answered within its *timeout*, in seconds, but hung in this phase."""
    return DeadlineExceededError(f"no answer within timeout={timeout:.6g} s, {phase}")


def _result_of(state: RetryCallState) -> Result:
    assert state.outcome is not None
    result: Result = state.outcome.result()
    return result
