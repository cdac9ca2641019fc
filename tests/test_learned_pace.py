"""The pace of a limit of unknown kind: what refusals have shown, and which of it is proven."""

import pytest

from audiences_async._pace.learned_pace import LearnedPace

pytestmark = [pytest.mark.once, pytest.mark.simulated]


@pytest.fixture
def pace() -> LearnedPace:
    """Return a pace of ten requests per second."""
    pace = LearnedPace(0, 0.0, 0.0, is_shared=True)
    pace.steady.adopt(0.0, 10.0)
    return pace


def test_a_pace_without_proof_is_not_restored(pace: LearnedPace) -> None:
    """Restore nothing if no account that was refused has had an answer: there may be no limit."""
    assert not pace.restore()


def test_a_proven_rate_is_restored(pace: LearnedPace) -> None:
    """Return to the rate at which an account that was refused got an answer, from lower ones only."""
    pace.prove()
    pace.steady.adopt(1.0, 2.0)
    assert pace.restore()
    assert pace.rate == 10.0
    pace.steady.adopt(2.0, 30.0)
    assert pace.restore()
    assert pace.rate == 30.0


def test_a_proven_window_is_kept() -> None:
    """Keep a pace without a rate once it is proven: many requests go at once, in a window."""
    pace = LearnedPace(0, 0.0, 0.0, is_shared=True)
    pace.prove()
    assert pace.restore()
    assert pace.rate is None
