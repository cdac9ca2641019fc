"""Known rates, as pure objects: how requests are spaced, and how long a queue takes."""

from typing import Any

import pytest

from audiences_async import ConfigurationError, RateLimit
from audiences_async._pace.known_rate import KnownRate
from audiences_async.policies import Limiter

pytestmark = [pytest.mark.once, pytest.mark.simulated]


def sent_at(rate: KnownRate, start: float, count: int) -> list[float]:
    """Send *count* requests from *start* on, each as early as it may go; return their times."""
    times, now = [], start
    for _ in range(count):
        now += max(0.0, rate.delay(now))
        rate.sent(now)
        times.append(now)
    return times


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"rate": -1}, {"rate": "2"}, {"rate": 1, "per": 0}, {"rate": 1, "burst": 0}]
)
def test_a_limit_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    """Check a rate limit's numbers, and name the one that is wrong."""
    with pytest.raises(ConfigurationError, match=list(wrong)[-1]):
        RateLimit(**wrong)


def test_requests_are_evenly_spaced_after_the_burst() -> None:
    """Let the burst go at once, and one request per interval from then on."""
    rate = KnownRate(RateLimit(4, per=2.0, burst=3))
    assert rate.rate == 2.0
    assert sent_at(rate, 10.0, 6) == pytest.approx([10.0, 10.0, 10.0, 10.5, 11.0, 11.5])


def test_a_pause_earns_one_burst_and_no_more() -> None:
    """Grant the same burst after any length of idle time."""
    rate = KnownRate(RateLimit(4, per=2.0, burst=3))
    sent_at(rate, 0.0, 6)
    assert sent_at(rate, 1000.0, 5) == pytest.approx([1000.0, 1000.0, 1000.0, 1000.5, 1001.0])


def test_the_backlog_is_an_interval_for_each_request_ahead() -> None:
    """Estimate a wait from the number of requests ahead; 0.0 while the burst covers them."""
    rate = KnownRate(RateLimit(10, burst=3))
    sent_at(rate, 0.0, 1)
    assert [rate.backlog(0.0, ahead) for ahead in (0, 1, 2, 12)] == pytest.approx([0.0, 0.0, 0.1, 1.1], abs=0.11)
    sent_at(rate, 0.0, 2)
    assert [rate.backlog(0.0, ahead) for ahead in (0, 1, 12)] == pytest.approx([0.1, 0.2, 1.3])


def test_a_rate_is_idle_once_its_burst_is_restored() -> None:
    """Report an idle rate when forgetting it would not let more requests through."""
    rate = KnownRate(RateLimit(10, burst=3))
    assert rate.is_idle(0.0)
    sent_at(rate, 0.0, 3)
    assert not rate.is_idle(0.25)
    assert rate.is_idle(0.31)


def test_an_object_with_acquire_is_a_limiter() -> None:
    """Tell a limiter from a rate by its method."""

    class Own:
        async def acquire(self, account_name: str) -> None:
            """Let every request pass."""

    assert isinstance(Own(), Limiter)
    assert not isinstance(RateLimit(1), Limiter)
