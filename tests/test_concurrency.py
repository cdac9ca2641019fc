"""A thousand concurrent calls of one client, whose callbacks interleave: none takes over another's state."""

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final, Literal, TypeAlias

import pytest
from attrs import Factory, define, field, frozen

from audiences_async import (
    Account,
    Attempt,
    AudiencesClient,
    AudiencesError,
    AudiencesResponse,
    BadRequestError,
    Event,
    RetryPolicy,
    ServerError,
    StatusError,
    TooManyRequestsError,
)
from audiences_async.clock import Clock
from audiences_async.events import AttemptFinished, AttemptStarted, CallFinished, CallStarted
from audiences_async.sandbox import Answer, Sandbox, SeenRequest, many_audiences

pytestmark = [pytest.mark.long, pytest.mark.slow]

ACCOUNTS: Final = 50
CALLS_EACH: Final = 20
POLICY: Final = RetryPolicy(max_attempts=6, base_delay=0.5, throttle_base_delay=1.0)
ASKED: Final = 2.5  # s, in Retry-After

Kind: TypeAlias = Literal["sound", "throttled", "asked", "flaky", "rotated", "busy", "down", "refusing"]
KINDS: Final[tuple[Kind, ...]] = ("sound", "throttled", "asked", "flaky", "rotated", "busy", "down", "refusing")
ENDS_WITH: Final[dict[Kind, type[AudiencesError]]] = {
    "busy": TooManyRequestsError,
    "down": ServerError,
    "refusing": BadRequestError,
}
"""The kinds of accounts whose calls fail; those of the others are answered in the end."""

account_of_task: ContextVar[str] = ContextVar("account_of_task")


def script(kind: Kind, name: str) -> list[Answer]:
    """Return the service's answers to an account before it answers as usual."""
    said = json.dumps({"description": name})
    always = CALLS_EACH * POLICY.max_attempts
    fails = [Answer(500), Answer(failure="reset"), Answer(503, b""), Answer(failure="cut-body")]
    scripts: dict[Kind, list[Answer]] = {
        "throttled": [Answer(429), Answer(429), Answer(), Answer(), Answer(429)],
        "asked": [Answer(429, retry_after=ASKED), Answer(), Answer(429, retry_after=ASKED)],
        "flaky": [answer for fail in 4 * fails for answer in (fail, Answer())],
        "busy": [Answer(429, said)] * always,
        "down": [Answer(500, said)] * always,
        "refusing": [Answer(400, said)] * always,
    }
    return scripts.get(kind, [])


@define(eq=False)
class Interleaved:
    """The client's callbacks, each of which takes some turns of the event loop, and the task that called it."""

    chance: random.Random = Factory(lambda: random.Random(20261125))
    now: float = 1000.0
    told: defaultdict[Any, list[Event]] = Factory(lambda: defaultdict(list))
    slept: defaultdict[Any, list[float]] = Factory(lambda: defaultdict(list))
    asked_by_strangers: list[str] = field(factory=list)
    sleeping: int = 0
    most_sleeping: int = 0
    asking: int = 0
    most_asking: int = 0

    @property
    def clock(self) -> Clock:
        """Return a clock that advances when a task sleeps, to the end of the longest sleep."""
        return Clock(lambda: self.now, lambda: self.now, self.sleep, self.chance.random)

    def on_event(self, event: Event) -> None:
        """Record an event by the task that emitted it."""
        self.told[asyncio.current_task()].append(event)

    async def sleep(self, seconds: float) -> None:
        """Record a sleep by its task, take some turns, and advance the time."""
        self.slept[asyncio.current_task()].append(seconds)
        until = self.now + seconds
        self.sleeping += 1
        self.most_sleeping = max(self.most_sleeping, self.sleeping)
        await self.some_turns()
        self.sleeping -= 1
        self.now = max(self.now, until)

    async def some_turns(self) -> None:
        """Let other tasks run a random number of times."""
        for _ in range(self.chance.randint(1, 9)):
            await asyncio.sleep(0)

    def key_function(self, name: str, *keys: str) -> Any:
        """Return a function that returns these keys one after the other, and then keeps returning the last one."""
        left = list(keys)

        async def key() -> str:
            if account_of_task.get() != name:
                self.asked_by_strangers.append(name)
            self.asking += 1
            self.most_asking = max(self.most_asking, self.asking)
            await self.some_turns()
            self.asking -= 1
            return left.pop(0) if len(left) > 1 else left[0]

        return key


@frozen(eq=False)
class Done:
    """One call, and its events from inside its own task."""

    kind: Kind
    account: str
    result: AudiencesResponse | AudiencesError
    events: list[Event]
    slept: list[float]

    @property
    def attempts(self) -> list[Attempt]:
        """Return the call's attempts, from its events."""
        return [event.attempt for event in self.events if isinstance(event, AttemptFinished)]


@frozen(eq=False)
class Run:
    """All calls, and the state after them."""

    calls: list[Done]
    requests: list[SeenRequest]
    callbacks: Interleaved
    busy: int
    tasks_left: int

    def of(self, *kinds: Kind) -> list[Done]:
        """Return the calls of accounts of these kinds."""
        return [call for call in self.calls if call.kind in kinds]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Make a thousand calls, once."""
    with Sandbox() as sandbox:
        yield asyncio.run(a_thousand_calls(sandbox))


async def a_thousand_calls(sandbox: Sandbox) -> Run:
    """Run the calls of all accounts at once, in random order, on one client."""
    callbacks = Interleaved()
    accounts = [opened(sandbox, callbacks, KINDS[number % len(KINDS)], number) for number in range(ACCOUNTS)]
    settings: dict[str, Any] = {"retry": POLICY, "budget": None, "timeout": 1e6, "max_connections": 30}
    async with AudiencesClient(
        base_url=sandbox.base_url, clock=callbacks.clock, on_event=callbacks.on_event, **settings
    ) as client:

        async def call(account: Account) -> AudiencesResponse | AudiencesError:
            account_of_task.set(account.name)
            try:
                return await client.get_audiences(account)
            except AudiencesError as error:
                return error

        callers = [account for account in accounts for _ in range(CALLS_EACH)]
        callbacks.chance.shuffle(callers)
        tasks = [asyncio.create_task(call(account)) for account in callers]
        async with asyncio.timeout(50.0):
            results = await asyncio.gather(*tasks)
        busy = sum(pace.waiting + pace.in_flight for pace in client.snapshot().accounts)
    done = [
        Done(kind_of(account.name), account.name, result, callbacks.told[task], callbacks.slept[task])
        for account, task, result in zip(callers, tasks, results, strict=True)
    ]
    await asyncio.sleep(0)
    return Run(done, sandbox.requests, callbacks, busy, len(asyncio.all_tasks()) - 1)


def opened(sandbox: Sandbox, callbacks: Interleaved, kind: Kind, number: int) -> Account:
    """Open an account whose audiences, and whose errors, carry its name."""
    name = f"{kind}-{number}"
    key = str(sandbox.add_account(name, audiences=many_audiences(name, 3)).api_key)
    sandbox.script(name, *script(kind, name))
    keys = ["a key from before the rotation", key] if kind == "rotated" else [key]
    return Account(name, callbacks.key_function(name, *keys))


def kind_of(name: str) -> Kind:
    """Return the kind of an account, by its name."""
    return next(kind for kind in KINDS if name.startswith(f"{kind}-"))


def test_the_callbacks_interleaved(run: Run) -> None:
    """Interleave many calls in their callbacks; the other tests rely on this."""
    assert len(run.calls) == ACCOUNTS * CALLS_EACH == 1000
    assert run.callbacks.most_asking > 40
    assert run.callbacks.most_sleeping > 5


def test_each_call_has_its_own_attempts(run: Run) -> None:
    """Number a call's attempts 1 to n without gaps or others' attempts, between one start and one end."""
    for call in run.calls:
        start, *before, end = call.events
        assert isinstance(start, CallStarted)
        assert not any(isinstance(event, CallStarted) for event in before)
        ours = [event for event in before if isinstance(event, AttemptFinished)]
        assert [event.attempt.number for event in ours] == list(range(1, len(ours) + 1))
        assert [event.number for event in before if isinstance(event, AttemptStarted)] == list(range(1, len(ours) + 1))
        assert len(ours) <= POLICY.max_attempts
        assert isinstance(end, CallFinished)
        assert not any(isinstance(event, CallFinished) for event in before)
        error = type(call.result).__name__ if isinstance(call.result, AudiencesError) else None
        assert (end.account, end.attempts, end.error) == (call.account, len(ours), error)
        assert {event.account for event in call.events} == {call.account}


def test_each_error_has_its_own_calls_attempts(run: Run) -> None:
    """Raise an error for one call only, with that call's account and attempts."""
    errors = [call.result for call in run.calls if isinstance(call.result, AudiencesError)]
    assert len({id(error) for error in errors}) == len(errors)
    for call in run.calls:
        if isinstance(call.result, AudiencesError):
            assert call.result.account == call.account
            assert list(call.result.attempts) == call.attempts


def test_each_call_waits_its_own_waits(run: Run) -> None:
    """Sleep each wait that an attempt reports in the call's own task, within the attempt's bounds."""
    for call in run.calls:
        *again, last = call.attempts
        assert not Counter(attempt.wait for attempt in again) - Counter(call.slept)  # it also sleeps for its pace
        assert last.wait == 0.0
        for attempt in again:
            least, most = bounds(attempt)
            assert least <= attempt.wait <= most, attempt
        elapsed = call.events[-1]
        assert isinstance(elapsed, CallFinished)
        assert elapsed.elapsed >= max(call.slept, default=0.0)


def bounds(attempt: Attempt) -> tuple[float, float]:
    """Return the bounds, in seconds, of the wait after an attempt."""
    doubled = 2.0 ** (attempt.number - 1)
    match attempt.reason:
        case "backoff":
            return 0.0, doubled * (POLICY.throttle_base_delay if attempt.status == 429 else POLICY.base_delay)
        case "retry-after":
            return ASKED, ASKED + doubled * POLICY.throttle_base_delay
        case _:
            assert attempt.reason in {"pace", "fresh-key", "stale-connection"}
            return 0.0, 0.0


def test_each_call_ends_as_its_own_account_does(run: Run) -> None:
    """Answer all calls of an account that heals; fail each call of one that never does, or refuses, in its own way."""
    for call in run.calls:
        statuses = [attempt.status for attempt in call.attempts]
        if call.kind == "flaky" and len(statuses) == POLICY.max_attempts:
            continue  # one call may happen to meet several failures in a row
        if call.kind not in ENDS_WITH:
            assert isinstance(call.result, AudiencesResponse), call.result
            assert statuses[-1] == 200
            continue
        assert type(call.result) is ENDS_WITH[call.kind]
        assert isinstance(call.result, StatusError)
        assert call.result.description == call.account
        tries = 1 if call.kind == "refusing" else POLICY.max_attempts
        assert statuses == [call.result.status] * tries
        assert call.result.stop_reason == ("final" if call.kind == "refusing" else "attempts")


def test_each_call_gets_its_own_accounts_audiences(run: Run) -> None:
    """Return the account's own audiences, complete and in order."""
    for call in run.calls:
        if isinstance(call.result, AudiencesResponse):
            assert [audience.id for audience in call.result] == [f"{call.account}-{number}" for number in range(3)]


def test_a_key_is_asked_for_by_the_calls_that_need_it(run: Run) -> None:
    """Run a key function in the context of a call of its account, and replace a rotated key in each call."""
    assert run.callbacks.asked_by_strangers == []
    for call in run.of("rotated"):
        assert [attempt.status for attempt in call.attempts] in ([401, 200], [200])
    assert any(len(call.attempts) == 2 for call in run.of("rotated"))


def test_every_request_is_one_calls_attempt(run: Run) -> None:
    """Report each request of the server's record by exactly one call of its account, with its answer."""
    seen: dict[str | None, Counter[int | None]] = defaultdict(Counter)
    told: dict[str | None, Counter[int | None]] = defaultdict(Counter)
    for request in run.requests:
        seen[request.account][request.answer] += 1
    for call in run.calls:
        for attempt in call.attempts:
            # The server cannot map a refused key to an account.
            told[None if attempt.status == 401 else call.account][attempt.status] += 1
    assert seen == told


def test_nothing_is_left(run: Run) -> None:
    """Leave no task, and no place taken in any queue, when the last call has ended."""
    assert (run.busy, run.tasks_left) == (0, 0)
