"""An outage in stepped time: how long it lasts, when probes go, and what is a hang or a limit instead."""

import pytest

from audiences_async._pace.outage import Outage
from audiences_async.clock import Clock

pytestmark = [pytest.mark.once, pytest.mark.simulated]


def test_silence_begins_with_the_first_failure() -> None:
    """Count the seconds without an answer from the first failure, and from none after an answer."""
    outage = Outage()
    assert outage.closed_for(5.0) == 0.0
    outage.began(10.0)
    outage.began(12.0)
    assert outage.closed_for(15.0) == 5.0
    outage.closed_since = None  # an answer
    assert outage.closed_for(20.0) == 0.0
    outage.began(30.0)
    assert outage.closed_for(31.0) == 1.0


def test_probes_become_rarer_up_to_a_bound() -> None:
    """Double the pause with each failure up to 1.5 s, and add up to a third at random."""
    outage = Outage()
    pauses = {draw: [outage.pause(n, Clock(random=lambda draw=draw: draw)) for n in range(1, 6)] for draw in (0.0, 1.0)}  # type: ignore[misc]
    assert pauses[0.0] == [0.25, 0.5, 1.0, 1.5, 1.5]
    assert pauses[1.0] == pytest.approx([4 / 3 * seconds for seconds in pauses[0.0]])
    assert outage.pause(10**6, Clock(random=lambda: 0.0)) == 1.5


def test_a_probe_without_a_reply_is_followed_by_another() -> None:
    """Wait two seconds for a probe's reply before the next one."""
    outage = Outage()
    assert outage.next_probe(1.0) == 0.0
    outage.probed(10.0)
    assert [outage.next_probe(now) for now in (10.0, 11.5, 13.0)] == [2.0, 0.5, 0.0]
    assert outage.probes == 1


def test_a_request_sent_into_an_outage_outlives_it() -> None:
    """Tell requests that were sent before the service opened again from later ones."""
    outage = Outage()
    assert not outage.outlived(0.0)
    outage.resumed(10.0)
    assert [outage.outlived(sent_at) for sent_at in (9.9, 10.0)] == [True, False]


def test_a_stall_is_silence_far_beyond_the_slowest_answer() -> None:
    """Report a hang after two seconds without a reply, or twice the time of the slowest answer if that is more."""
    assert [Outage().note_silence(silence, slowest=0.1) for silence in (1.9, 2.0)] == [False, True]
    assert [Outage().note_silence(silence, slowest=3.0) for silence in (5.9, 6.0)] == [False, True]


def test_a_service_that_may_just_be_slow_gets_more_time() -> None:
    """Wait twice as long before the next report of a hang."""
    outage = Outage()
    assert outage.note_silence(2.0, 0.1)
    assert [outage.note_silence(silence, 0.1) for silence in (3.9, 4.0, 7.9)] == [False, True, False]


def test_a_503_soon_after_an_outage_may_be_a_limit() -> None:
    """Take a 503 within five seconds after an outage for a refusal, though no limit is known."""
    outage = Outage()
    assert not outage.may_be_limit(0.0, is_limited=False, rate=None)
    outage.resumed(10.0)
    assert [outage.may_be_limit(now, is_limited=False, rate=None) for now in (14.9, 15.0)] == [True, False]


@pytest.mark.parametrize(("rate", "explained"), [(None, 2.0), (100.0, 2.0), (0.5, 6.0)])
def test_a_limit_does_not_explain_a_long_silence(rate: float | None, explained: float) -> None:
    """Take a 503 of a limited service for a refusal for two seconds, or three intervals of its rate if longer."""
    outage = Outage()
    outage.began(10.0)
    at = [10.0 + explained, 10.01 + explained]
    assert [outage.may_be_limit(now, is_limited=True, rate=rate) for now in at] == [True, False]
