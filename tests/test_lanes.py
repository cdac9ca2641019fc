"""One account's lane, from verdicts in stepped time: its pauses, its events, and whose fault a refusal is."""

import asyncio
import math
from typing import Any

import pytest
import virtual

from audiences_async import Event, RateLimit
from audiences_async._base.deadlines import Deadlines
from audiences_async._pace.lanes import Lane
from audiences_async._pace.pacing import PauseSettings, Verdict
from audiences_async.clock import Clock
from audiences_async.events import AccountPaused, AccountResumed, RateLearned
from audiences_async.snapshots import AccountPace

pytestmark = [pytest.mark.once, pytest.mark.simulated]


class Account:
    """A lane with its events, whose requests come back at once."""

    def __init__(self, limit: Any = None, clock: Clock | None = None) -> None:
        self.events: list[Event] = []
        self.lane = Lane(
            "north",
            limit=limit,
            clock=clock or Clock(random=lambda: 0.5),
            deadlines=Deadlines(),
            settings=PauseSettings(first=0.1, longest=20.0),
            emit=self.events.append,
        )

    def meets(self, verdict: Verdict, at: float, pause: float | None = None) -> float:
        """Send a request at this time and take in its verdict; return the seconds of the pause after it."""
        self.lane.sent(at)
        self.lane.returned(at, at, verdict, pause)
        return self.lane.closing.left(at)

    async def waits(self) -> None:
        """Wait for a turn."""
        async with self.lane.head(math.inf):
            await self.lane.opened()


@pytest.fixture
async def north() -> Account:
    """Return an account without a known rate."""
    return Account()


def delays(lane: Lane, in_flight: int) -> float:
    """Return the delay of one more request while so many are in flight, of a lane without any."""
    for _ in range(in_flight):
        lane.sent(0.0)
    delay = lane.delay(0.0)
    for _ in range(in_flight):
        lane.returned(0.0, 0.0, "nothing", None)
    return delay


async def test_an_account_begins_with_two_requests_in_flight(north: Account) -> None:
    """Let two requests go at once, and one more for every four quick answers."""
    assert [delays(north.lane, count) for count in (0, 1, 2)] == [0.0, 0.0, math.inf]
    for _ in range(4):
        north.meets("answered", 0.0)
    assert [delays(north.lane, count) for count in (2, 3)] == [0.0, math.inf]


async def test_slow_answers_speed_up_the_start(north: Account) -> None:
    """Let one more request go for every two answers if a round trip is long."""
    for _ in range(4):
        north.lane.sent(0.0)
        north.lane.returned(0.1, 0.0, "answered", None)
    assert [delays(north.lane, count) for count in (3, 4)] == [0.0, math.inf]


async def test_refusals_leave_room_for_one_request(north: Account) -> None:
    """Halve the number of requests in flight with each refusal, and always let one go."""
    for second in range(10):
        north.meets("throttled", second - 100.0)
    north.meets("answered", -50.0)
    assert [delays(north.lane, count) for count in (0, 1)] == [0.0, math.inf]


async def test_a_known_rate_starts_at_once() -> None:
    """Bound the requests in flight by nothing but the rate if it is known."""
    assert delays(Account(RateLimit(1000.0, burst=100)).lane, 50) <= 0.0


async def test_a_refusal_pauses_and_the_probe_resumes(north: Account) -> None:
    """Close after a 429 for as long as it asks; open again when the one request after the pause is answered."""
    assert north.meets("throttled", 10.0, pause=5.0) == 5.0
    assert north.lane.closing.left(14.9) > 0
    assert north.lane.closing.left(15.0) == 0
    north.lane.sent(15.0)
    assert north.lane.delay(15.0) == math.inf, "the probe goes alone"
    north.lane.returned(15.1, 15.0, "answered", None)
    assert north.lane.delay(15.1) == 0.0
    assert north.events == [AccountPaused("north", 5.0, True), AccountResumed("north")]


async def test_pauses_double_with_refusals_in_a_row(north: Account) -> None:
    """Double the pause with each refusal that names none."""
    now, pauses = 0.0, []
    for _ in range(4):
        pauses.append(north.meets("throttled", now))
        now += pauses[-1]
    assert pauses == pytest.approx([0.075, 0.15, 0.3, 0.6])


@pytest.mark.parametrize(
    ("verdict", "asked", "pause"),
    [
        ("answered", 5.0, 5.0),
        ("answered", 3600.0, 30.0),
        ("failed", 5.0, 5.0),
        ("unavailable", 5.0, 0.0),
        ("lost", 5.0, 0.0),
        ("nothing", 5.0, 0.0),
    ],
)
async def test_a_pause_in_another_reply(north: Account, verdict: Verdict, asked: float, pause: float) -> None:
    """Keep a pause that an answer or an error names, but not for longer than half a minute."""
    assert north.meets(verdict, 10.0, asked) == pause


async def test_a_learned_rate_is_an_event(north: Account) -> None:
    """Emit `RateLearned` when grants lie between two refusals."""
    north.meets("throttled", 0.0)
    for tenth in range(10, 20):
        north.meets("answered", tenth / 10)
    north.meets("throttled", 2.0)
    (learned,) = (event for event in north.events if isinstance(event, RateLearned))
    assert (learned.account, learned.rate) == ("north", north.lane.paces.rate)
    assert learned.rate == pytest.approx(10 / 2.0, rel=0.1)


async def test_recent_requests_explain_a_refusal(north: Account) -> None:
    """Put a refusal down to the account if it has sent others within a second, or has others in flight."""
    north.lane.sent(10.0)
    assert not north.lane.explains(10.0)
    north.lane.returned(10.0, 10.0, "answered", None)
    assert [north.lane.explains(sent_at) for sent_at in (10.9, 11.1)] == [True, False]
    north.lane.sent(20.0)
    north.lane.sent(20.0)
    assert north.lane.explains(20.0)


async def test_a_slow_rate_explains_a_refusal_for_longer() -> None:
    """Put a refusal down to the account within two intervals of its rate."""
    account = Account(RateLimit(1, per=10.0))
    account.meets("answered", 100.0)
    assert [account.lane.explains(sent_at) for sent_at in (119.0, 121.0)] == [True, False]


async def test_an_account_fails_alone_if_others_are_answered(north: Account) -> None:
    """Suspect the account, and not the service, once others were answered between two of its failures."""
    alone = []
    for answers in (7, 7, 8, 8):
        north.lane.note_failure(answers)
        alone.append(north.lane.fails_alone)
    assert alone == [False, False, True, True]
    north.meets("answered", 10.0)
    north.lane.note_failure(9)
    assert not north.lane.fails_alone


async def test_an_account_recovers_with_the_next_answer(north: Account) -> None:
    """Report that the latest request failed, until one is answered."""
    seen = [north.lane.recovers]
    north.lane.note_failure(7)
    seen.append(north.lane.recovers)
    north.meets("answered", 10.0)
    assert [*seen, north.lane.recovers] == [False, True, False]


async def test_a_lane_that_remembers_something_is_not_idle() -> None:
    """Report a lane as idle only if forgetting it makes no difference."""
    account = Account(RateLimit(1))
    assert account.lane.is_idle(0.0)
    account.lane.users = 1
    assert not account.lane.is_idle(0.0)
    account.lane.users = 0
    account.meets("answered", 10.0)
    assert [account.lane.is_idle(now) for now in (10.5, 11.0)] == [False, True]
    account.meets("throttled", 20.0, pause=1.0)
    assert not account.lane.is_idle(30.0), "a refusal since the latest answer"


async def test_the_snapshot_shows_the_pace(north: Account) -> None:
    """Show rate, pause, queue and requests in flight."""
    north.meets("throttled", 10.0, pause=5.0)
    north.lane.sent(16.0)
    assert north.lane.snapshot(12.0) == AccountPace("north", None, 3.0, waiting=0, in_flight=1)


def test_a_hook_that_ends_the_program_leaves_the_queue_awake() -> None:
    """Let a call that waits for a reply go on when it comes, although the event hook raises."""

    class Stop(BaseException):
        """An exception that ends the program."""

    def emit(event: Event) -> None:
        raise Stop

    async def main() -> None:
        account = Account(clock=virtual.clock())
        account.meets("throttled", 1000.0, pause=1.0)
        await asyncio.sleep(1)
        account.lane.sent(1001.0)  # the probe, whose reply the next call waits for
        waiter = asyncio.create_task(account.waits())
        await asyncio.sleep(1)
        account.lane._emit = emit
        with pytest.raises(Stop):
            account.lane.returned(1002.0, 1001.0, "throttled", 1.0)
        await asyncio.wait_for(waiter, 60)
        assert virtual.now() == pytest.approx(3.0)

    virtual.run(main())
