"""A rate learned from refusals, as pure objects in stepped time."""

import random
from collections.abc import Callable

import pytest
from virtual import LeakyBucket, TokenBucket

from audiences_async._pace.learned_rate import LearnedRate, Strays

pytestmark = [pytest.mark.once, pytest.mark.simulated]


class Caller:
    """A caller that always has another request, and waits *pause* seconds after a refusal."""

    def __init__(self, limit: Callable[[str, float], int], *, pause: float = 0.05, asked: bool = False) -> None:
        self.rate = LearnedRate()
        self.now = 0.0
        self.granted = self.refused = 0
        self._limit = limit
        self._pause = pause
        self._asked = asked

    def send(self, count: int) -> "Caller":
        """Send *count* requests one after the other, each as early as it may go."""
        for _ in range(count):
            self.now += max(0.0, self.rate.delay(self.now))
            self.rate.sent(self.now)
            is_granted = self._limit("", self.now) == 200
            self.now += 0.001
            if is_granted:
                self.granted += 1
                self.rate.answered(fresh=True)
            else:
                self.refused += 1
                self._wait()
        return self

    def _wait(self) -> None:
        self.rate.throttled(self.now, asked=self._asked)
        if self._asked:
            self.rate.measurement.excuse(self._pause)
        else:
            self.rate.measurement.paused += self._pause
        self.now += self._pause
        self.rate.paused_until(self.now)


# --- the measurement


@pytest.mark.parametrize("limit", [LeakyBucket(20, 5), TokenBucket(20, 10)], ids=["leaky", "token"])
def test_the_rate_of_a_bucket_is_found(limit: Callable[[str, float], int]) -> None:
    """Measure a bucket's rate from the grants between refusals, at the cost of few refusals."""
    caller = Caller(limit).send(600)
    assert caller.rate.rate == pytest.approx(20, rel=0.1)
    assert caller.refused <= 0.1 * 600


@pytest.mark.parametrize(("paused", "answers"), [(1.4, 60), (0.0, 600)], ids=["mostly pause", "no pause"])
def test_a_first_measurement_that_is_mostly_pause_is_left_quickly(paused: float, answers: int) -> None:
    """Grow fast from a rate that was measured in a pause, since it is far too low, and slowly from any other."""
    rate = LearnedRate()
    rate.throttled(0.0)
    for _ in range(60):
        rate.answered(fresh=True)
    rate.measurement.paused = paused
    rate.throttled(now := 1.6)
    assert rate.rate == pytest.approx(37, rel=0.02)
    count = 0
    while rate.rate is not None and rate.rate < 200:
        now += max(0.0, rate.delay(now))
        rate.sent(now)
        rate.answered(fresh=True)
        count += 1
    assert answers / 6 < count < answers


def test_a_measurement_is_the_grants_between_two_refusals() -> None:
    """Divide the grants from one refusal to the next by the time between them, minus the doubt of half a grant."""
    rate = LearnedRate()
    assert not rate.throttled(10.0), "the first refusal begins the measurement"
    for _ in range(9):
        rate.answered(fresh=True)
    rate.answered(fresh=False)  # granted before the measurement began
    assert rate.throttled(13.0)
    assert rate.rate == pytest.approx(3.0 * (1 - 0.5 / 10))


def test_a_refusal_without_grants_measures_nothing() -> None:
    """Learn nothing from two refusals in a row."""
    rate = LearnedRate()
    rate.throttled(1.0)
    assert not rate.throttled(2.0)
    assert rate.rate is None


def test_idle_time_is_no_measurement() -> None:
    """Drop a measurement that went on while nothing was held back."""
    rate = LearnedRate()
    rate.throttled(1.0)
    rate.measurement.stop()
    rate.answered(fresh=True)
    assert not rate.throttled(1000.0)
    assert rate.rate is None


def test_a_raised_limit_is_found() -> None:
    """Grow with answers, ever faster, until the limit refuses again."""
    low, high = LeakyBucket(5, 1), LeakyBucket(50, 1)
    caller = Caller(lambda key, at: (low if at < 60 else high)(key, at))
    while caller.now < 60:
        caller.send(1)
    assert caller.rate.rate == pytest.approx(5, rel=0.15)
    assert caller.send(2500).rate.rate == pytest.approx(50, rel=0.15)


def test_callers_below_the_pace_do_not_raise_it() -> None:
    """Leave the rate as it is while requests come more slowly than it allows."""
    caller = Caller(LeakyBucket(20, 5)).send(300)
    before = caller.rate.rate
    for _ in range(300):
        caller.now += 1.0
        caller.send(1)
    assert caller.rate.rate == before


# --- pauses that refusals name


def test_a_named_pause_is_left_out_of_the_measurement() -> None:
    """Count only the time in which requests could go."""
    rate = LearnedRate()
    rate.throttled(1.0)
    rate.measurement.excuse(30.0)
    for _ in range(10):
        rate.answered(fresh=True)
    rate.throttled(33.0)
    assert rate.rate == pytest.approx(10 / 2.0, rel=0.05)


def test_a_pause_within_another_one_excuses_nothing() -> None:
    """Measure all of the time if the pause that a refusal names was over when it came."""
    rate = LearnedRate()
    rate.throttled(1.0, asked=True)
    for _ in range(10):
        rate.answered(fresh=True)
    assert rate.throttled(3.0, asked=True)
    assert rate.rate == pytest.approx(10 / 2.0)


def test_a_named_pause_outside_of_a_measurement_shows_nothing() -> None:
    """Begin the next measurement with its own refusal, whatever was paused before."""
    rate = LearnedRate()
    rate.measurement.excuse(30.0)
    assert not rate.throttled(40.0)
    for _ in range(10):
        rate.answered(fresh=True)
    rate.throttled(42.0)
    assert rate.rate == pytest.approx(10 / 2.0, rel=0.05)


def test_refusals_that_name_a_long_pause_become_rare() -> None:
    """Stay below the rate, and grow slowly, if each refusal costs far more than a little of the rate."""
    caller = Caller(TokenBucket(10, 10), pause=10.0, asked=True).send(500)
    before = caller.refused
    caller.send(1000)
    assert caller.refused - before <= 10
    assert 5 < (caller.rate.rate or 0) <= 11


# --- refusals that come at any rate


def test_refusals_at_any_rate_do_not_collapse_it() -> None:
    """Keep the rate if refusals come as often at every rate, and stop to explain them by it."""
    chance = random.Random(1)
    caller = Caller(lambda key, at: 429 if chance.random() < 0.1 else 200).send(3000)
    assert not caller.rate.explains_refusals
    assert caller.rate.rate is not None
    before = caller.rate.rate
    assert (caller.send(1000).rate.rate or 0) >= before


def cuts_of_no_use(strays: Strays, *, cuts: int = 15, by: float = 0.9, granted: int = 9) -> float | None:
    """Cut a rate of 100 repeatedly, with *granted* grants before each refusal; return the last cut's result."""
    rate, restored = 100.0, None
    for _ in range(cuts):
        for _ in range(granted):
            strays.granted()
        strays.refused()
        restored = strays.cut(rate)
        rate *= by
    return restored


def test_cuts_of_no_use_are_taken_back() -> None:
    """Restore the rate before the latest cuts, and ignore as many refusals as came after them."""
    strays = Strays()
    assert cuts_of_no_use(strays) == pytest.approx(100 * 0.9**4)
    assert not strays.do_not_explain


@pytest.mark.parametrize(
    "cuts",
    [{"cuts": 14}, {"by": 0.99}],
    ids=["too few to judge", "the rate was hardly lowered"],
)
def test_other_cuts_stand(cuts: dict[str, float]) -> None:
    """Take back no cut before its use can be judged."""
    strays = Strays()
    assert cuts_of_no_use(strays, **cuts) is None  # type: ignore[arg-type]
    assert strays.do_not_explain


def test_cuts_stand_while_most_requests_are_refused() -> None:
    """Take back no cut while more than half of the requests are refused, because a limit is the likely cause."""
    strays = Strays()
    for _ in range(40):
        strays.refused()
    assert cuts_of_no_use(strays, granted=0) is None
    assert strays.do_not_explain


def test_more_refusals_than_are_ignored_count_again() -> None:
    """Notice a real limit behind the strays: refusals in a row, or a larger share of them."""
    strays = Strays()
    cuts_of_no_use(strays)
    for _ in range(6):
        strays.refused()
    assert strays.do_not_explain
    strays.granted()
    assert strays.do_not_explain, "their share is still larger"
    for _ in range(48):
        strays.granted()
    assert not strays.do_not_explain
