"""How workers divide a limit that all of them meet."""

import pytest
from paces import LearnedPace

from audiences_async._distributed.shares import Share


def adjusted(own: float | None, *looks: dict[str, float | None]) -> float | None:
    """Return the rate of worker "a" after it has looked at the rates of busy workers, its own included."""
    pace = LearnedPace(own)
    share = Share(pace)
    for busy in looks:
        share.adjust(
            "a", ({"a": pace.learned_rate} if "a" in busy else {}) | {n: r for n, r in busy.items() if n != "a"}
        )
    assert share.rate == pace.learned_rate
    return pace.learned_rate


@pytest.mark.parametrize(
    ("own", "busy", "then"),
    [
        (100.0, {"a": 100.0}, 100.0),
        (80.0, {"a": 80.0, "b": 120.0}, 80.0),
        (10.0, {"a": 10.0, "b": 150.0, "c": 140.0}, 50.0),
        (200.0, {"a": 200.0, "b": 40.0, "c": 60.0}, 100.0),
        (None, {"a": None, "b": 40.0, "c": 60.0}, 50.0),
        (None, {"a": None, "b": None, "c": 60.0}, None),
        (None, {"a": None}, None),
        (10.0, {"b": 100.0, "c": 100.0}, 10.0),
        (10.0, {}, 10.0),
    ],
    ids=["alone", "about as fast", "crowded out", "crowding out", "new", "one of three", "no limit", "idle", "none"],
)
def test_the_share_of_a_worker(own: float | None, busy: dict[str, float | None], then: float | None) -> None:
    """Workers keep different rates, unless one is crowded out, crowds out the others, or has learned no limit yet."""
    assert adjusted(own, busy) == then


def test_workers_that_are_done() -> None:
    """Those that still have accounts take over the rate of those that have none."""
    assert adjusted(100.0, {"a": 100.0, "b": 90.0, "c": 110.0}, {"a": 100.0, "b": 90.0}) == 150.0
    assert adjusted(100.0, {"a": 100.0, "b": 90.0, "c": 110.0}, {"a": 100.0}) == 300.0
    assert adjusted(100.0, {"a": 100.0, "b": 90.0}, {"a": 100.0}, {"a": 100.0}) == 190.0
