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


def test_a_limit_without_a_rate_is_not_proven() -> None:
    """Restore nothing if accounts recovered before any rate or window was learned."""
    pace = LearnedPace(0, 0.0, 0.0, is_shared=True)
    pace.prove()
    pace.steady.adopt(1.0, 0.1)
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


def test_a_window_is_kept_once_it_is_proven() -> None:
    """Keep a window, in which many requests go at once, but not a rate that was learned after it."""
    window = LearnedPace(0, 0.0, 0.0, is_shared=True)
    for number in range(5):
        window.granted(0.05, 0.01 * number, fresh=True)
    for at in (0.1, 0.4, 0.9, 1.9):
        window.refused(at, at, asked=False)
    window.granted(2.1, 2.1, fresh=True)
    window.prove()
    assert window.per is not None
    assert window.restore()
    window.steady.adopt(3.0, 0.1)
    assert not window.restore()
