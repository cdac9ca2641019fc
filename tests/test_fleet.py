"""Processes that do not know of each other converge to the limit that they share, by counts in virtual time."""

from statistics import median

import pytest
from fleets import Fleet, simulate

pytestmark = [pytest.mark.long, pytest.mark.once, pytest.mark.simulated, pytest.mark.slow]

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module", params=["leaky", "token"])
def fleets(request: pytest.FixtureRequest) -> list[Fleet]:
    """Three runs of 20 processes with 100 accounts each under 50 requests a second; one run by itself is chaotic."""
    return [simulate(request.param, processes=20, accounts=100, rate=50, seed=seed) for seed in SEEDS]


def test_a_fleet_uses_the_limit_that_it_shares(fleets: list[Fleet]) -> None:
    """While all run they use the limit, with two requests for each answer at the most, and hardly any account fails."""
    assert median(run.used for run in fleets) >= 0.8
    assert median(run.requests_per_answer for run in fleets) <= 2.0
    assert sum(run.failures.total() for run in fleets) <= 0.01 * sum(map(_accounts, fleets))
    assert all(run.answers + run.failures.total() == _accounts(run) for run in fleets)


def test_a_fleet_takes_little_longer_than_its_limit(fleets: list[Fleet]) -> None:
    """End the last process within 1.75 times the ideal; none waits for half of it without an answer."""
    assert median(run.took for run in fleets) <= 1.75
    assert median(run.longest_gap for run in fleets) <= fleets[0].ideal / 2


def _accounts(run: Fleet) -> int:
    return 100 * len(run.processes)
