"""A limit of requests in flight, recognized from grants and refusals alone."""

import math

import pytest

from audiences_async._pace.concurrency import LearnedConcurrency

pytestmark = [pytest.mark.once, pytest.mark.simulated]


def recognized(*, limit: int = 10, refusals: int = 4, refused_after: float = 0.01) -> LearnedConcurrency:
    """Return what is learned of a service that refuses at *limit* in flight, and grants after a second."""
    learned = LearnedConcurrency()
    for _ in range(refusals):
        learned.refused(refused_after, 0.0, limit)
    learned.granted(1.0, 0.0, limit - 1)
    return learned


def test_quick_refusals_with_many_in_flight_show_a_limit() -> None:
    """Recognize the number in flight at which requests are refused quickly, and below which they are granted."""
    assert recognized().limit == 10


@pytest.mark.parametrize(
    "changes",
    [{"refusals": 3}, {"refused_after": 0.5}, {"limit": 1}],
    ids=["too few refusals", "as slow as grants", "refused with hardly any in flight"],
)
def test_other_refusals_show_none(changes: dict[str, float]) -> None:
    """Recognize no limit if another kind explains the refusals."""
    assert recognized(**changes).limit == math.inf  # type: ignore[arg-type]


def test_grants_with_as_many_in_flight_disprove_a_limit() -> None:
    """Set each grant with at least as many in flight against a refusal."""
    learned = LearnedConcurrency()
    for _ in range(4):
        learned.refused(0.01, 0.0, 10)
        learned.granted(1.0, 0.0, 12)
    learned.granted(1.0, 0.0, 5)
    assert learned.limit == math.inf


def test_the_lowest_number_refused_is_the_limit() -> None:
    """Begin again when a request is refused with fewer in flight than before."""
    learned = LearnedConcurrency()
    for others in (20, 20, 20, 8, 9, 8, 10):
        learned.refused(0.01, 0.0, others)
    learned.granted(1.0, 0.0, 5)
    assert learned.limit == 8


def grants_until_one_more(learned: LearnedConcurrency) -> int:
    """Return the number of grants after which the limit is raised."""
    limit, count = learned.limit, 0
    while learned.limit == limit:
        learned.granted(100.0, 99.0, 0)
        count += 1
    return count


def test_one_more_is_tried_now_and_then() -> None:
    """Try one more after as many grants as the limit, and twice as many each time that it is refused."""
    learned = recognized()
    counts = []
    for number in range(3):
        counts.append(grants_until_one_more(learned))
        assert learned.limit == 11
        learned.refused(10.0 * (number + 1), 10.0 * (number + 1), 10)
        assert learned.limit == 10
    assert counts == [10, 20, 40]


def test_a_request_sent_before_the_limit_was_known_proves_nothing() -> None:
    """Ignore refusals of requests that were on the wire when the limit was lowered."""
    learned = recognized()
    learned.refused(1.5, 0.5, 4)
    assert learned.limit == 10


@pytest.mark.parametrize("others", [[1], [9, 9, 9]], ids=["with hardly any in flight", "in a row"])
def test_refusals_of_another_kind_end_the_limit(others: list[int]) -> None:
    """Forget the limit if keeping to it does not help."""
    learned = recognized()
    for count in others:
        learned.refused(2.0, 2.0, count)
    assert learned.limit == math.inf
