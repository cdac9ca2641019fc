"""How an announced quota is spent, and whose it is."""

import math

import pytest

from audiences_async._http.quota import Quota
from audiences_async._pace.allowance import Allowance, QuotaScope

pytestmark = pytest.mark.once


def test_what_is_in_flight_is_taken_off() -> None:
    """Send a request while more remain than are in flight; hold the next one until a reply arrives."""
    allowance = Allowance()
    assert allowance.delay(0.0, 1000) == 0.0
    allowance.announced(1.0, 0.5, Quota(3, 10.0))
    assert [allowance.delay(1.0, in_flight) for in_flight in range(5)] == [0.0, 0.0, 0.0, math.inf, math.inf]


def test_an_exhausted_quota_is_waited_for_and_then_probed() -> None:
    """Send nothing before the reset, and then a single request, which shows what remains."""
    allowance = Allowance()
    allowance.announced(1.0, 0.5, Quota(0, 10.0))
    assert allowance.delay(4.0, 0) == pytest.approx(7.0)
    assert allowance.delay(11.5, 0) == 0.0
    assert allowance.delay(11.5, 1) == math.inf


def test_a_reply_that_was_overtaken_is_ignored() -> None:
    """Use the count in the reply to the latest request, whatever the order of the replies."""
    allowance = Allowance()
    allowance.announced(1.0, 0.9, Quota(2, 10.0))
    allowance.announced(1.1, 0.8, Quota(7, 10.0))
    assert allowance.delay(1.1, 2) == math.inf
    allowance.announced(1.2, 0.9, Quota(1, 10.0))
    assert allowance.delay(1.2, 1) == math.inf


def test_a_long_reset_is_tried_after_half_a_minute() -> None:
    """Probe after 30 s, so that a misread reset does not hold requests back for a day."""
    allowance = Allowance()
    allowance.announced(1.0, 0.5, Quota(0, 86_400.0))
    assert allowance.delay(1.0, 0) == pytest.approx(30.0)


def test_a_request_that_ends_without_a_count_may_have_been_counted() -> None:
    """Deduct it until the reset; after that, replies without a quota lift the limit."""
    allowance = Allowance()
    allowance.announced(1.0, 0.5, Quota(1, 10.0))
    allowance.not_announced(2.0)
    assert allowance.delay(2.0, 0) > 0
    allowance.not_announced(12.0)
    assert allowance.delay(12.0, 1000) == 0.0


def announce(scope: QuotaScope, counts: list[int], *, reset: float = 60.0) -> bool:
    """Announce each count to another account; return whether the quota is taken for shared."""
    for account, count in enumerate(counts):
        scope.announced(account, 0.0, Quota(count, reset))
    return scope.is_shared


def test_counts_that_go_on_from_account_to_account_are_of_one_quota() -> None:
    """Counts that are close together and never the same are of a quota that all share, in any order."""
    assert announce(QuotaScope(), [99, 96, 97, 98, 93, 94, 95, 90, 91, 92, 89, 88])


@pytest.mark.parametrize(
    "counts",
    [[9] * 12, [9, 8] * 6, [4821, 12, 3999, 870, 1, 640, 7000, 5, 99, 310, 2500, 77], [9, 8, 7]],
    ids=["the same", "few", "far apart", "not enough"],
)
def test_counts_of_accounts_are_of_quotas_of_their_own(counts: list[int]) -> None:
    """Counts that repeat, or are far apart, are each account's."""
    assert not announce(QuotaScope(), counts)


def test_a_new_window_begins_a_new_sample() -> None:
    """Counts of two windows are not compared; neither are two of one account, or of an exhausted quota."""
    scope = QuotaScope()
    announce(scope, [20, 19, 18, 17, 16, 15])
    assert not announce(scope, [14, 13, 12, 11, 10, 9], reset=120.0)
    scope = QuotaScope()
    for count in (*range(30, 15, -1), *[0] * 15):
        scope.announced("north", 0.0, Quota(count, 60.0))
    assert not scope.is_shared
