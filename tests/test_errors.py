"""The errors: class tree, messages, pickles."""

import base64
import copy
import inspect
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from multidict import CIMultiDict

from audiences_async import (
    Attempt,
    AttemptTimeoutError,
    AudiencesError,
    ClientClosedError,
    ConfigurationError,
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidResponseError,
    ResponseTooLargeError,
    StatusError,
    TooManyRequestsError,
    TransportError,
    UnauthorizedError,
    errors,
)
from audiences_async.errors import status_error

ATTEMPTS = (Attempt(1, 500, "HTTP 500", 0.1, 0.5, "backoff"), Attempt(2, 429, "HTTP 429", 0.1, 0.0, "deadline"))
ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AudiencesError)]


def made(kind: type[AudiencesError]) -> AudiencesError:
    """Create an error of this class with every field set."""
    status: dict[str, Any] = (
        {"status": 429, "headers": CIMultiDict({"Retry-After": "5"}), "body": b"x"}
        if issubclass(kind, StatusError)
        else {}
    )
    error = kind("what happened", **status)
    error.account, error.attempts, error.elapsed = "north", ATTEMPTS, 1.5
    error.retry_after, error.stop_reason = 5.0, "deadline"
    return error


@pytest.mark.parametrize("kind", ALL)
def test_every_error_pickles(kind: type[AudiencesError]) -> None:
    """Pickle and copy an error, with the same fields, for another process."""
    error = made(kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (vars(twin), str(twin), twin.args) == (vars(error), str(error), error.args)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_its_docstring(kind: type[AudiencesError]) -> None:
    """Give each class its own docstring."""
    assert kind.__doc__
    assert kind.__doc__ != kind.__base__.__doc__


def test_the_tree() -> None:
    """Handlers for Python's own exceptions, or for one of our base classes, catch the right errors."""
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(ClientClosedError, RuntimeError)
    assert issubclass(DeadlineExceededError, TimeoutError)
    assert not issubclass(AttemptTimeoutError, TimeoutError)
    assert issubclass(ConnectionFailedError, TransportError)
    assert issubclass(ResponseTooLargeError, InvalidResponseError)
    assert not issubclass(StatusError, TransportError)


def test_the_message_says_where_what_how_hard_and_what_to_do() -> None:
    """Format the text with the account, the failure, the attempts and a hint."""
    error = made(UnauthorizedError)
    assert str(error) == (
        "account 'north': what happened; gave up after 2 attempts in 1.5 s, out of time (a larger timeout allows more)"
        ", retry after 5 s (check the account's API key in the management console)"
    )


def test_a_bare_error_is_its_message() -> None:
    """Format the message alone without a call."""
    assert str(AudiencesError("what happened")) == "what happened"


def test_many_problems_are_shortened_in_the_message() -> None:
    """Show the first problems and the number of the others; the field has them all."""
    error = InvalidResponseError("unreadable", problems=tuple(f"$.data[{n}]: odd" for n in range(9)))
    assert "$.data[2]: odd; and 6 more" in str(error)
    assert len(error.problems) == 9


@pytest.mark.parametrize(
    ("status", "text"),
    [(503, "HTTP 503 Service Unavailable"), (999, "HTTP 999"), (429, "HTTP 429 Too Many Requests: slow")],
)
def test_the_message_of_a_status(status: int, text: str) -> None:
    """Show a status with its HTTP name, followed by the service's description."""
    description = "slow" if status == 429 else ""
    error = status_error(status, description, response_time=datetime.now(UTC))
    assert error.message == text
    assert error.headers == {}


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (status_error(429, "", retry_after=1.2), 429, {"Retry-After": "2"}),
        (DeadlineExceededError("late", retry_after=3.0), 429, {"Retry-After": "3"}),
        (DeadlineExceededError("late", retry_after=0.0), 429, {"Retry-After": "1"}),
        (DeadlineExceededError("late"), 504, {}),
        (AttemptTimeoutError("slow"), 504, {}),
        (ConfigurationError("wrong"), 500, {}),
        (ClientClosedError("closed"), 500, {}),
        (status_error(401, ""), 502, {}),
        (ConnectionFailedError("gone"), 502, {}),
    ],
)
def test_what_a_web_app_answers(error: AudiencesError, status: int, headers: dict[str, str]) -> None:
    """Map each error to the status and headers for a web app whose own request failed because of it."""
    assert (error.gateway_status, error.gateway_headers) == (status, headers)


# Pickled by 0.1: a 429 after one attempt, and an account.
_OLD_ERROR = (
    "gASVmwEAAAAAAACMFmF1ZGllbmNlc19hc3luYy5lcnJvcnOUjAhfcmVzdG9yZZSTlGgAjBRUb29NYW55UmVxdWVzdHNFcnJvcpSTlIwaSFRUUCA0"
    "MjkgVG9vIE1hbnkgUmVxdWVzdHOUhZR9lCiMB21lc3NhZ2WUaAWMB2FjY291bnSUjAVub3J0aJSMCGF0dGVtcHRzlIwWYXVkaWVuY2VzX2FzeW5j"
    "LmV2ZW50c5SMB0F0dGVtcHSUk5QpgZR9lCiMBm51bWJlcpRLAYwGc3RhdHVzlE2tAYwFZXJyb3KUjAhIVFRQIDQyOZSMB2VsYXBzZWSURz+5mZmZ"
    "mZmajAR3YWl0lEc/4AAAAAAAAIwGcmVhc29ulIwHYmFja29mZpR1YoWUaBVHP+MzMzMzMzOMC3JldHJ5X2FmdGVylEdAAAAAAAAAAIwLc3RvcF9y"
    "ZWFzb26UaAtoEk2tAYwLZGVzY3JpcHRpb26UjAlzbG93IGRvd26UjA1yZXNwb25zZV90aW1llE6MB2hlYWRlcnOUfZSMBGJvZHmUQwJ7fZR1h5RS"
    "lC4="
)
_OLD_ACCOUNT = (
    "gASVfQAAAAAAAACMFmF1ZGllbmNlc19hc3luYy5tb2RlbHOUjAdBY2NvdW50lJOUKYGUfZQojARuYW1llIwFbm9ydGiUjAtfY3JlZGVudGlhbJSM"
    "G2F1ZGllbmNlc19hc3luYy5jcmVkZW50aWFsc5SMDF9ub3RfcGlja2xlZJSTlClSlHViLg=="
)


def test_an_error_that_the_first_version_pickled_is_loaded() -> None:
    """Restore class, text, context and attempts."""
    error = pickle.loads(base64.b64decode(_OLD_ERROR))
    assert type(error) is TooManyRequestsError
    assert (error.account, error.retry_after, error.stop_reason, error.description) == (
        "north",
        2.0,
        "attempts",
        "slow down",
    )
    assert [(attempt.number, attempt.status) for attempt in error.attempts] == [(1, 429)]
    assert "429" in str(error)
    assert (error.call_id, error.request_id) == (None, None)


def test_an_account_that_the_first_version_pickled_is_loaded() -> None:
    """Restore the name, but no key."""
    account = pickle.loads(base64.b64decode(_OLD_ACCOUNT))
    assert account.name == "north"
    with pytest.raises(LookupError, match="not pickled"):
        account.credential()
