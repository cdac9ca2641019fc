"""Windows of requests, recognized from grants and refusals alone."""

import math

import pytest

from audiences_async._pace.learned_window import LearnedWindow

pytestmark = [pytest.mark.once, pytest.mark.simulated]


def recognized(*, granted: int = 5, opened: float = 2.1) -> LearnedWindow:
    """Return a window of *granted* requests, closed from 0.1 s on and open again between 1.9 s and *opened*."""
    window = LearnedWindow()
    for number in range(granted):
        window.granted(0.05, 0.01 * number, fresh=True, is_paced=False)
    for at in (0.1, 0.4, 0.9, 1.9):
        assert window.refused(at) is None
    window.granted(opened, opened, fresh=True, is_paced=False)
    return window


def test_refusals_and_then_a_grant_show_a_window() -> None:
    """Learn the limit as what was granted before; the period is between the last refused and the granted probe."""
    window = recognized()
    assert window.limit == 5
    assert 1.9 <= window.period <= 2.1
    assert window.rate == pytest.approx(2.5, rel=0.1)


def test_few_grants_few_refusals_or_a_known_rate_show_no_window() -> None:
    """Learn no window from a bucket of tokens, closed for a short time, or if a known rate explains refusals."""
    assert recognized(granted=3).limit is None
    window = LearnedWindow()
    for at in (0.0, 0.01, 0.02, 0.03):
        window.granted(at, at, fresh=True, is_paced=False)
    window.refused(0.1)
    window.granted(0.2, 0.2, fresh=True, is_paced=False)
    assert window.limit is None
    for at in (0.3, 0.6, 1.0, 2.0):
        window.refused(at)
    window.granted(4.0, 4.0, fresh=True, is_paced=True)
    assert window.limit is None


def test_a_request_waits_for_the_one_that_has_to_leave_the_window() -> None:
    """Once the limit is certain, the next request goes when the oldest of *limit* requests is a period old."""
    window = recognized()
    for at in (2.11, 2.12, 2.13, 2.14):
        window.granted(at, at, fresh=True, is_paced=False)
    assert window.delay(2.15, 0) == 0.0, "one request beyond the limit, to be certain"
    assert window.delay(2.15, 1) == math.inf
    assert window.delay(2.15, 5) == math.inf, "as many in flight as the window takes"
    until = window.refused(2.2)
    assert until == pytest.approx(window.period - 0.1)
    assert window.delay(2.2, 0) == pytest.approx(until)
    assert window.backlog(2.2, 12) > window.backlog(2.2, 4) > 0


def test_a_period_that_is_longer_than_expected_is_searched_for() -> None:
    """If even the longest wait was too short, probes follow at growing distances until one is granted."""
    window = recognized()
    for at in (2.11, 2.12, 2.13, 2.14):
        window.granted(at, at, fresh=True, is_paced=False)
    window.refused(2.2)
    waits, now = [], 4.3
    for _ in range(4):
        wait = window.refused(now)
        assert wait is not None
        waits.append(wait)
        now += wait
    assert waits == sorted(waits)
    assert window.period == pytest.approx(now - waits[-1] - 2.1)
    window.granted(now, now, fresh=True, is_paced=False)
    assert window.period == pytest.approx(now - 2.1, rel=0.2)


def test_more_than_the_limit_is_noticed() -> None:
    """Learn the limit anew if one more request is granted; if no refusal follows, drop it."""
    window = recognized()
    for at in (2.11, 2.12, 2.13, 2.14, 2.15, 2.16, 2.17):
        window.granted(at, at, fresh=True, is_paced=False)
    assert window.delay(2.18, 50) == 0.0
    window.refused(2.2)
    assert window.limit == 8
    window = recognized()
    for number in range(400):
        at = 2.11 + 0.01 * number
        window.granted(at, at, fresh=True, is_paced=False)
    assert window.limit is None


def test_a_late_reply_does_not_open_a_window_of_unknown_period() -> None:
    """Keep the limit if a request from before the search is granted during it; drop it after a period of more."""
    window = recognized()
    for at in (2.11, 2.12, 2.13, 2.14):
        window.granted(at, at, fresh=True, is_paced=False)
    window.refused(2.2)
    assert window.refused(4.3) is not None
    window.granted(4.4, 4.2, fresh=False, is_paced=False)
    assert window.limit == 5
    assert window.delay(4.4, 5) == math.inf, "as many in flight as the window takes"
    for number in range(300):
        at = 4.41 + number / 100
        window.granted(at, at, fresh=True, is_paced=False)
    assert window.limit is None, "granted without end"


def test_a_closure_far_longer_than_the_window_is_none_of_its_kind() -> None:
    """Forget a window that is refused for many of its periods: an outage, or another limit."""
    window = recognized()
    for at in (2.11, 2.12, 2.13, 2.14):
        window.granted(at, at, fresh=True, is_paced=False)
    now = 2.2
    for _ in range(40):
        wait = window.refused(now)
        if wait is None:
            break
        assert wait <= 20.0
        now += wait
    assert window.limit is None
    assert 12 * 2.1 <= now <= 60
