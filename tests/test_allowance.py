"""How an announced quota is spent, and whose it is."""

import math
import random

import pytest

from audiences_async._http.quota import Quota
from audiences_async._pace.allowance import Allowance, QuotaScope

pytestmark = [pytest.mark.once, pytest.mark.simulated]


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


def shuffled(first: int, last: int) -> list[int]:
    """Return falling counts that overtake each other in groups of twelve."""
    chance = random.Random(1)
    groups = [list(range(start, max(start - 12, last), -1)) for start in range(first, last, -12)]
    return [count for group in groups for count in chance.sample(group, len(group))]


def test_counts_that_fall_from_account_to_account_are_of_one_quota() -> None:
    """Take a quota for shared if its count falls whoever sends, also in the next window."""
    scope = QuotaScope()
    assert announce(scope, shuffled(99, 51))
    assert announce(scope, shuffled(99, 51), reset=120.0)


@pytest.mark.parametrize(
    "counts",
    [
        [9] * 48,
        [9, 8] * 24,
        [4821, 12, 3999, 870, 1, 640, 7000, 5, 99, 310, 2500, 77] * 4,
        [random.Random(seed).randrange(1, 40) for seed in range(480)],
        list(range(9, 3, -1)),
    ],
    ids=["the same", "few", "far apart", "up and down", "not enough"],
)
def test_counts_of_accounts_are_of_quotas_of_their_own(counts: list[int]) -> None:
    """Take quotas for the accounts' own if counts repeat, are far apart, or do not fall."""
    assert not announce(QuotaScope(), counts)


def test_a_quota_that_turns_out_to_be_the_accounts_own() -> None:
    """Take back that a quota is shared as soon as its counts repeat."""
    scope = QuotaScope()
    announce(scope, shuffled(99, 51))
    assert not announce(scope, [5] * 12)


def test_a_new_window_begins_a_new_sample() -> None:
    """Compare no counts of two windows, of one account, or of an exhausted quota."""
    scope = QuotaScope()
    announce(scope, shuffled(99, 69))
    assert not announce(scope, shuffled(69, 57), reset=120.0)
    scope = QuotaScope()
    for count in (*range(60, 12, -1), *[0] * 15):
        scope.announced("north", 0.0, Quota(count, 60.0))
    assert not scope.is_shared
