"""Decisions after a failed attempt, each from the error and the facts alone."""

from typing import Any

import pytest

from audiences_async import (
    AttemptTimeoutError,
    AudiencesError,
    BadRequestError,
    ConnectionFailedError,
    InvalidResponseError,
    RetryPolicy,
    ServerError,
    TooManyRequestsError,
    TransportError,
    UnauthorizedError,
)
from audiences_async._call.decide import Again, Facts, Stop, decide, report_of, verdict_of

POLICY = RetryPolicy()


def facts(**changes: Any) -> Facts:
    """Return the facts of a call after its first attempt, with a minute left and a backoff of 0.5 s."""
    defaults: dict[str, Any] = {
        "number": 1,
        "time_left": 60.0,
        "next_turn": 0.0,
        "can_refresh_key": False,
        "was_stale": False,
        "is_paced": False,
        "backoff": lambda: 0.5,
    }
    return Facts(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("error", "changes", "expected"),
    [
        (ServerError("", status=500), {}, Again(0.5, "backoff", is_free=False)),
        (ServerError("", status=503, retry_after=2.0), {}, Again(0.5, "retry-after", is_free=False)),
        (ServerError("", status=503), {"is_paced": True}, Again(0.0, "pace", is_free=True)),
        (ServerError("", status=500), {"is_paced": True}, Again(0.5, "backoff", is_free=False)),
        (TooManyRequestsError("", status=429), {}, Again(0.5, "backoff", is_free=True)),
        (TooManyRequestsError("", status=429), {"is_paced": True}, Again(0.0, "pace", is_free=True)),
        (
            TooManyRequestsError("", status=429, retry_after=1.0),
            {"is_paced": True},
            Again(0.5, "retry-after", is_free=True),
        ),
        (ConnectionFailedError("", stale_connection=True), {}, Again(0.0, "stale-connection", is_free=True)),
        (ConnectionFailedError("", stale_connection=True), {"was_stale": True}, Again(0.5, "backoff", is_free=False)),
        (AttemptTimeoutError(""), {}, Again(0.5, "backoff", is_free=False)),
        (UnauthorizedError("", status=401), {"can_refresh_key": True}, Again(0.0, "fresh-key", is_free=True)),
        (UnauthorizedError("", status=401), {}, Stop("final")),
        (BadRequestError("", status=400), {}, Stop("final")),
        (InvalidResponseError(""), {}, Stop("final")),
        (ConnectionFailedError("", transient=False), {}, Stop("final")),
        (TransportError("", stop_reason="patience"), {}, Stop("patience")),
        (ServerError("", status=500), {"number": 5}, Stop("attempts")),
        (ServerError("", status=500), {"time_left": 0.4}, Stop("deadline", 0.5)),
        (ServerError("", status=500), {"next_turn": 70.0}, Stop("deadline", 70.0)),
    ],
)
def test_what_follows_a_failed_attempt(error: AudiencesError, changes: dict[str, Any], expected: Again | Stop) -> None:
    """Another attempt, with its wait and its reason; or the end, with its reason and what did not fit."""
    assert decide(error, facts(**changes), POLICY) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BadRequestError("", status=400), "answered"),
        (TooManyRequestsError("", status=429), "throttled"),
        (ServerError("", status=503), "unavailable"),
        (ServerError("", status=500), "failed"),
        (AttemptTimeoutError(""), "timed out"),
        (ConnectionFailedError(""), "lost"),
        (ConnectionFailedError("", stale_connection=True), "stale"),
        (ConnectionFailedError("", unsent=True), "nothing"),
    ],
)
def test_what_an_error_shows_about_the_service(error: AudiencesError, expected: str) -> None:
    """Count a final refusal as an answer; a stale connection and a missing socket show nothing."""
    assert verdict_of(error, POLICY) == expected


@pytest.mark.parametrize(("status", "expected"), [(429, "throttled"), (503, "unavailable"), (500, "answered")])
def test_a_refusal_that_is_not_retried_is_a_refusal(status: int, expected: str) -> None:
    """Pace after a 429 and a 503 that the policy does not retry; take any other error for an answer."""
    policy = RetryPolicy(statuses={502})
    error = TooManyRequestsError("", status=429, retry_after=3.0) if status == 429 else ServerError("", status=status)
    assert verdict_of(error, policy) == expected
    assert report_of(error, None, policy).pause == (3.0 if status == 429 else None)
