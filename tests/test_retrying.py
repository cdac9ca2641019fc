"""Which failures are retried, and after which delay."""

import math
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import Future, RetryCallState, Retrying

from audiences_async import (
    AttemptTimeoutError,
    AudiencesError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidResponseError,
    RetryPolicy,
)
from audiences_async._call.retrying import wait_full_jitter
from audiences_async.errors import status_error
from audiences_async.sandbox import SteppedTime


def wait(policy: RetryPolicy, number: int, error: AudiencesError, draw: float = 1.0) -> float:
    """Return the wait after attempt *number*."""
    state = RetryCallState(Retrying(), fn=None, args=(), kwargs={})
    state.attempt_number = number
    state.outcome = Future.construct(number, error, has_exception=False)
    return wait_full_jitter(policy, SteppedTime(draw=draw).clock)(state)


def test_defaults() -> None:
    """Use the documented defaults."""
    policy = RetryPolicy()
    assert attrs.asdict(policy) == {
        "max_attempts": 5,
        "base_delay": 0.5,
        "max_delay": 20.0,
        "throttle_base_delay": 1.0,
        "statuses": frozenset({408, 429, 500, 502, 503, 504}),
    }


def test_a_policy_is_a_frozen_value() -> None:
    """Freeze a policy, so tasks and clients can share it."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        RetryPolicy().max_attempts = 9  # type: ignore[misc]
    assert RetryPolicy(statuses=[500, 500]) == RetryPolicy(statuses={500})
    assert hash(RetryPolicy()) == hash(RetryPolicy())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": 2.0},
        {"max_attempts": True},
        {"base_delay": -0.1},
        {"base_delay": math.nan},
        {"max_delay": math.inf},
        {"max_delay": "20"},
        {"throttle_base_delay": None},
        {"statuses": {200}},
        {"statuses": {600}},
        {"statuses": {"500"}},
        {"statuses": 500.5},
    ],
)
def test_a_value_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    """Reject a number out of range by name, when the policy is created."""
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RetryPolicy(**wrong)


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        *[(status_error(status, ""), True) for status in (408, 429, 500, 502, 503, 504)],
        *[(status_error(status, ""), False) for status in (302, 400, 401, 403, 404, 410, 501, 505)],
        (ConnectionFailedError("reset"), True),
        (ConnectionFailedError("untrusted", transient=False), False),
        (AttemptTimeoutError("slow"), True),
        (InvalidResponseError("garbage"), False),
    ],
    ids=lambda value: (
        f"{type(value).__name__}-{getattr(value, 'status', '')}" if isinstance(value, Exception) else None
    ),
)
def test_what_is_retried(error: AudiencesError, retried: bool) -> None:
    """Retry the listed statuses and missing answers, nothing else."""
    assert RetryPolicy().retries(error) is retried


def test_statuses_can_be_chosen() -> None:
    """Decide by the policy's own statuses."""
    policy = RetryPolicy(statuses=frozenset({501}))
    assert policy.retries(status_error(501, ""))
    assert not policy.retries(status_error(500, ""))


def test_the_longest_wait_doubles_up_to_the_cap() -> None:
    """Bound a wait by base_delay, doubled with each attempt, and at most max_delay."""
    waits = [wait(RetryPolicy(), number, status_error(500, "")) for number in (1, 2, 3, 6, 7, 10_000)]
    assert waits == [0.5, 1.0, 2.0, 16.0, 20.0, 20.0]


def test_a_429_waits_longer() -> None:
    """After a 429 the wait grows from throttle_base_delay."""
    waits = [wait(RetryPolicy(), number, status_error(429, "")) for number in (1, 2, 10_000)]
    assert waits == [1.0, 2.0, 20.0]


def test_full_jitter() -> None:
    """Draw the wait evenly from 0 to its upper bound."""
    assert [wait(RetryPolicy(), 2, status_error(500, ""), draw) for draw in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]


def test_retry_after_is_a_floor() -> None:
    """Keep the service's wait in full, above max_delay too, with jitter only on top."""
    asked = status_error(503, "", retry_after=30.0)
    assert [wait(RetryPolicy(), 1, asked, draw) for draw in (0.0, 1.0)] == [30.0, 30.5]


@given(
    st.integers(1, 10**5),  # tenacity computes 2 to this power
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
    st.none() | st.floats(0, 1e6),
)
def test_every_wait_is_within_its_bounds(
    number: int, draw: float, base: float, longest: float, asked: float | None
) -> None:
    """For any policy and attempt, the wait is from the service's wait to max_delay above it."""
    policy = RetryPolicy(base_delay=base, max_delay=longest)
    drawn = wait(policy, number, status_error(500, "", retry_after=asked), draw)
    assert (asked or 0.0) <= drawn <= (asked or 0.0) + longest
