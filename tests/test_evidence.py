"""Whether a refusal or a failure is the service's: from what different accounts meet in a row."""

import pytest

from audiences_async._base.deadlines import Deadlines
from audiences_async._pace.evidence import Evidence
from audiences_async._pace.lanes import Lane
from audiences_async._pace.pacing import PauseSettings, Verdict
from audiences_async.clock import Clock

pytestmark = [pytest.mark.once, pytest.mark.simulated]


@pytest.fixture
async def lanes() -> list[Lane]:
    """Return the lanes of twenty accounts."""
    common = {"limit": None, "clock": Clock(), "deadlines": Deadlines(), "settings": PauseSettings(0.1, 20.0)}
    return [Lane(f"a{number}", emit=lambda event: None, **common) for number in range(20)]  # type: ignore[arg-type]


def needed(evidence: Evidence, verdict: Verdict, lanes: list[Lane], peak: int = 1) -> int:
    """Return the number of different accounts after which the verdict is the service's."""
    return next(number for number, lane in enumerate(lanes, 1) if evidence.add(verdict, lane, peak))


@pytest.mark.parametrize(
    ("verdict", "in_flight", "accounts"),
    [("failed", 1, 3), ("failed", 20, 5), ("failed", 1000, 8), ("throttled", 1, 8), ("throttled", 1000, 8)],
)
def test_some_accounts_in_a_row_suffice(lanes: list[Lane], verdict: Verdict, in_flight: int, accounts: int) -> None:
    """Ask for more accounts if more requests are in flight, and for many if each may have met its own limit."""
    assert needed(Evidence(), verdict, lanes, peak=in_flight) == accounts


def test_one_account_is_no_evidence(lanes: list[Lane]) -> None:
    """Count an account once, however often it fails."""
    evidence = Evidence()
    assert not any(evidence.add("failed", lanes[0], 1) for _ in range(100))


def test_an_answer_starts_the_count_again(lanes: list[Lane]) -> None:
    """Count only failures without an answer to any account between them."""
    evidence = Evidence()
    for lane in lanes[:2]:
        assert not evidence.add("failed", lane, 1)
    evidence.returned("answered", lanes[9])
    assert needed(evidence, "failed", lanes) == 3
    assert needed(evidence, "failed", lanes) == 3, "and it starts again once it has sufficed"


def test_an_answer_makes_up_for_two_refusals(lanes: list[Lane]) -> None:
    """Count accounts that are refused more often than twice for each answer; start again once they suffice."""
    evidence = Evidence()
    for lane in lanes[:7]:
        assert not evidence.add("throttled", lane, 1)
    evidence.returned("answered", lanes[19])
    assert needed(evidence, "throttled", lanes[7:]) == 3
    assert needed(evidence, "throttled", lanes) == 8


def test_a_flood_that_is_partly_granted_is_recognized(lanes: list[Lane]) -> None:
    """Recognize a limit that answers one request in five, and never eight refusals in a row."""
    evidence, found = Evidence(), 0
    for number in range(3 * len(lanes)):
        if number % 5 == 4:
            evidence.returned("answered", lanes[number % 20])
        else:
            found += evidence.add("throttled", lanes[number % 20], 100)
    assert found >= 2


def test_accounts_that_are_refused_and_then_answered_share_a_limit(lanes: list[Lane]) -> None:
    """Report a shared limit while most requests are refused, and most refused accounts are answered later."""
    evidence = Evidence()
    for lane in 3 * lanes:
        lane.note_failure(answers=0)
        evidence.returned("throttled", lane)
        evidence.returned("unavailable", lane)
        evidence.returned("answered", lane)
    assert evidence.shows_refusals
    for lane in lanes:
        evidence.returned("answered", lane)
    assert not evidence.shows_refusals


def test_accounts_that_are_only_refused_do_not_show_a_shared_limit(lanes: list[Lane]) -> None:
    """Report no shared limit if the accounts that are answered are never those that were refused."""
    evidence = Evidence()
    for lane in 3 * lanes[:10]:
        evidence.returned("throttled", lane)
        evidence.returned("throttled", lane)
        evidence.returned("answered", lanes[10])
    assert not evidence.shows_refusals


def contrast(evidence: Evidence, lane: Lane, times: int = 1) -> None:
    """Refuse probes of an account, and answer those for an account that was answered before."""
    for _ in range(times):
        evidence.returned("throttled", lane, is_probe=True)
        evidence.returned("answered", None, is_probe=True)


@pytest.mark.parametrize("verdict", ["throttled", "unavailable", "failed", "lost", "timed out"])
def test_probes_show_that_it_is_the_accounts(lanes: list[Lane], verdict: Verdict) -> None:
    """Clear the service if accounts that were answered before always are, and others are not, five times."""
    evidence = Evidence()
    for lane in lanes[:5]:
        assert not evidence.blames_accounts
        evidence.returned(verdict, lane, is_probe=True)
        evidence.returned("answered", None, is_probe=True)
    assert evidence.blames_accounts


def test_other_requests_show_nothing_about_the_accounts(lanes: list[Lane]) -> None:
    """Compare probes alone: a limit grants the one after a pause, and refuses the next request."""
    evidence = Evidence()
    for lane in lanes:
        evidence.returned("throttled", lane)
        evidence.returned("answered", None, is_probe=True)
    assert not evidence.blames_accounts


def test_an_account_that_was_answered_before_and_is_refused_blames_the_service(lanes: list[Lane]) -> None:
    """Start again if a probe for an account that was answered before is refused."""
    evidence = Evidence()
    contrast(evidence, lanes[0], 4)
    evidence.returned("throttled", None, is_probe=True)
    contrast(evidence, lanes[1], 4)
    assert not evidence.blames_accounts
    contrast(evidence, lanes[1])
    assert evidence.blames_accounts


def test_an_account_that_recovers_blames_the_service(lanes: list[Lane]) -> None:
    """Start again if an account that was refused is answered: an account at fault would not be."""
    evidence = Evidence()
    contrast(evidence, lanes[0], 4)
    lanes[0].note_failure(0)
    evidence.returned("answered", lanes[0])
    contrast(evidence, lanes[1])
    assert not evidence.blames_accounts


def test_other_answers_do_not_clear_the_accounts(lanes: list[Lane]) -> None:
    """Keep on blaming the accounts while others are answered, until one that was answered before is refused."""
    evidence = Evidence()
    contrast(evidence, lanes[0], 5)
    evidence.returned("answered", lanes[1])
    assert evidence.blames_accounts
    evidence.returned("unavailable", None, is_probe=True)
    assert not evidence.blames_accounts


def test_pooled_connections_that_are_lost_in_a_row(lanes: list[Lane]) -> None:
    """Suspect an outage once eight pooled connections are lost, without an answer between them."""
    evidence = Evidence()
    for lane in lanes[:7]:
        evidence.returned("stale", lane)
    evidence.returned("answered", lanes[0])
    for lane in lanes[:8]:
        assert not evidence.suspects_outage
        evidence.returned("stale", lane)
    assert evidence.suspects_outage
