"""How many requests of all accounts may be in flight, from replies in stepped time."""

import math

import pytest

from audiences_async._pace.load import Load
from audiences_async._pace.pacing import Turn, Verdict

pytestmark = [pytest.mark.once, pytest.mark.simulated]


class Requests:
    """Requests to a service with 100 connections and an attempt timeout of 8 s, so that 1 s is quick and 4 s slow."""

    def __init__(self, connections: int = 100) -> None:
        self.load = Load(connections, 8.0)
        self.now = 0.0

    def send(self, count: int = 1) -> list[Turn]:
        """Send requests now."""
        return [Turn(self.now, False, self.load.quick_answers, self.load.sent()) for _ in range(count)]

    def end(self, turns: list[Turn], verdict: Verdict = "answered") -> float:
        """Let requests come back now, all with one verdict; return the limit."""
        for turn in turns:
            self.load.follow(self.now, turn, verdict)
        return self.load.limit

    def round(self, count: int, took: float, verdict: Verdict = "answered") -> float:
        """Send requests at once, which come back after *took* seconds; return the limit."""
        turns = self.send(count)
        self.now += took
        return self.end(turns, verdict)


def test_the_limit_grows_with_quick_answers() -> None:
    """Begin with 32 in flight, and add two for each quick answer, up to the connections."""
    requests = Requests()
    assert requests.load.limit == 32
    assert requests.round(10, 0.5) == 52
    assert requests.round(50, 0.5) == 100
    assert Requests(connections=8).load.limit == 8


def test_it_grows_slowly_with_answers_that_are_not_quick() -> None:
    """Add a fifth of a request for each answer that took more than an eighth of the attempt timeout."""
    assert Requests().round(10, 2.0) == pytest.approx(34)


def test_a_timeout_halves_what_is_in_flight() -> None:
    """Cut the limit to half of the requests that were in flight, once for all that time out together."""
    assert Requests().round(20, 8.0, "timed out") == 10


def test_a_slow_answer_takes_a_fifth_off() -> None:
    """Cut the limit to four fifths of what was in flight after an answer in more than half the attempt timeout."""
    assert Requests().round(20, 5.0) == 16


def test_the_limit_never_falls_below_four() -> None:
    """Leave room for others beside one request that hangs, however often it does."""
    requests = Requests()
    for _ in range(10):
        requests.round(2, 8.0, "timed out")
    assert requests.load.limit == 4
    requests = Requests(connections=1)
    assert requests.round(1, 8.0, "timed out") == 1


def test_one_that_hangs_is_its_own_fault() -> None:
    """Ignore a timeout during which at least as many others as the limit were answered quickly."""
    requests = Requests()
    hanging = requests.send()
    for _ in range(4):
        requests.round(30, 0.5)
    assert requests.end(hanging, "timed out") == 100


def test_growth_after_a_cut_is_slow_at_first() -> None:
    """Add a fifth of a request for each answer after a cut, and twice as much after every fifty."""
    requests = Requests()
    requests.round(20, 8.0, "timed out")
    assert requests.round(10, 0.5) == pytest.approx(12)
    before = requests.round(39, 0.5)
    assert requests.round(1, 0.5) - before == pytest.approx(0.4)


def test_requests_sent_before_a_cut_are_old_news() -> None:
    """Ignore timeouts of requests that were sent before the latest cut, or before the time to ignore."""
    requests = Requests()
    first, second = requests.send(10), requests.send(10)
    requests.now = 8.0
    limit = requests.end(first, "timed out")
    requests.now = 9.0
    assert requests.end(second, "timed out") == limit
    third = requests.send(10)
    requests.load.ignore_until(17.0)
    requests.now = 17.0
    assert requests.end(third, "timed out") == limit


@pytest.mark.parametrize("verdict", ["throttled", "lost", "nothing"])
def test_other_verdicts_show_no_load(verdict: Verdict) -> None:
    """Leave the limit as it is after a refusal, a lost connection, or nothing that says anything."""
    assert Requests().round(2, 0.5, verdict) == 32


def test_a_refusal_of_a_shared_limit_leaves_a_quarter() -> None:
    """Fall to a quarter of the limit after a refusal whose rate is unknown, and never below two."""
    load = Load(100, 8.0)
    load.refused()
    assert load.limit == 8
    for _ in range(5):
        load.refused()
    assert load.limit == 2


def test_the_slowest_answer_fades() -> None:
    """Remember the time of the slowest answer, and a little less of it with each later one."""
    requests = Requests()
    requests.round(1, 3.0)
    assert requests.load.slowest == 3.0
    requests.round(700, 0.0)
    assert 1.0 < requests.load.slowest < 2.0


def test_the_services_own_limit_bounds_growth() -> None:
    """Keep to a recognized limit of requests in flight, however many answers come."""
    requests = Requests()
    kept = requests.send(10)
    for _ in range(4):
        requests.round(1, 0.01, "throttled")
    assert requests.load.concurrency == math.inf
    requests.now = 1.0
    requests.end(kept[:1])
    assert requests.load.concurrency == 10
    assert requests.end(kept[1:]) == 10
