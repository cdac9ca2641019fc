"""One exchange without I/O."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async import (
    AudiencesResponse,
    BadRequestError,
    ConfigurationError,
    ForbiddenError,
    InvalidResponseError,
    NotFoundError,
    ResponseTooLargeError,
    ServerError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
)
from audiences_async._http.wire import MAX_ERROR_BODY, Reply, Result, endpoint, proxy_url, read, retry_after
from audiences_async.credentials import ApiKey, Secret
from audiences_async.structuring import run_to_completion

KEY = ApiKey("key+with/odd&signs")
NOON = datetime(2026, 2, 11, 12, tzinfo=UTC).timestamp()


def reply(status: int, body: bytes = b"", exceeded: int | None = None, **headers: str) -> Result:
    """Return what a response is read as."""
    proxied = CIMultiDictProxy(CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()}))
    return run_to_completion(read(Reply(status, proxied, body, exceeded), KEY, now=NOON))


@pytest.mark.parametrize(
    ("status", "kind", "description"),
    [
        (400, BadRequestError, "Bad Request"),
        (401, UnauthorizedError, "Unauthorized"),
        (404, NotFoundError, "Not Found"),
        (429, TooManyRequestsError, "Too Many Requests – Rate limit exceeded"),
        (500, ServerError, "Server Error"),
    ],
)
def test_the_services_example_errors(status: int, kind: type[StatusError], description: str) -> None:
    """Raise the class of each error of the service's page, with the envelope's fields and the body as sent."""
    sample = (SAMPLES / f"{status}.json").read_bytes()
    error = reply(status, sample, Content_Type="application/json")
    assert type(error) is kind
    assert (error.status, error.description, error.body) == (status, description, sample)
    assert error.response_time == datetime(2025, 2, 6, 7, 51, 52, 258000, tzinfo=UTC)
    assert error.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, ForbiddenError),
        (501, ServerError),
        (599, ServerError),
        (302, StatusError),
        (418, StatusError),
        (999, StatusError),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"description": 5}', b"\xff"])
def test_the_status_decides_whatever_the_body(status: int, kind: type[StatusError], body: bytes) -> None:
    """Raise the error of any status from 300 up, with any body at all."""
    error = reply(status, body)
    assert type(error) is kind
    assert (error.status, error.description, error.response_time, error.body) == (status, "", None, body)


def test_a_200_is_the_audiences() -> None:
    """Return a readable 200 as a response."""
    response = reply(200, (SAMPLES / "200.json").read_bytes())
    assert isinstance(response, AudiencesResponse)
    assert len(response) == 2


def test_an_unreadable_200_tells_its_problems() -> None:
    """Raise InvalidResponseError for an unreadable 200, with problems and the start of the body."""
    long = b"x" * (MAX_ERROR_BODY + 1)
    error = reply(200, long)
    assert isinstance(error, InvalidResponseError)
    assert error.problems == ("$: not JSON: JSON is malformed: invalid character (byte 0)",)
    assert error.body == long[:MAX_ERROR_BODY]


@pytest.mark.parametrize("status", [101, 201, 204, 206])
def test_another_success_is_unreadable(status: int) -> None:
    """Raise InvalidResponseError for any other 2xx, which is not documented."""
    error = reply(status, b"{}")
    assert isinstance(error, InvalidResponseError)
    assert error.message == f"HTTP {status} where 200 is documented"


def test_a_body_above_the_cap() -> None:
    """Name the cap in the error of a 200 whose body went beyond it."""
    error = reply(200, b"xx", exceeded=2)
    assert isinstance(error, ResponseTooLargeError)
    assert "max_body_bytes=2" in str(error)


def test_an_error_inside_a_200_keeps_the_headers() -> None:
    """Raise TooManyRequestsError for a 200 whose envelope has 429, Retry-After included."""
    error = reply(200, json.dumps({"status": 429, "description": "slow"}).encode(), Retry_After="7")
    assert isinstance(error, TooManyRequestsError)
    assert (error.status, error.description, error.retry_after) == (429, "slow", 7.0)


@pytest.mark.parametrize(
    "spelling",
    [
        "key+with/odd&signs",
        r"key\u002Bwith/odd\u0026signs",
        r"key+with\/odd&signs",
        "key%2Bwith%2Fodd%26signs",
        "key+with/odd&amp;signs",
        "key&#x2B;with/odd&amp;signs",
        "KEY+WITH/ODD&SIGNS",
    ],
)
@pytest.mark.parametrize("status", [401, 200, 201])
def test_an_echoed_key_is_masked(status: int, spelling: str) -> None:
    """Mask a key that the service echoes in text, headers, body and problems, however it is escaped."""
    body = f'{{"status": 401, "description": "bad token {spelling}", "data": []}}'.encode()
    error = reply(status, body, WWW_Authenticate=f'Bearer realm="{spelling}"')
    assert not isinstance(error, AudiencesResponse)
    shown = repr(vars(error)) + str(error) + repr(error)
    assert spelling not in shown
    assert KEY.reveal() not in shown
    assert "***" in shown


def test_an_echoed_key_in_a_problem_is_masked() -> None:
    """Mask a key in a field that breaks the schema in the problem."""
    error = reply(200, b'{"status": "key+with/odd&signs", "data": []}')
    assert isinstance(error, InvalidResponseError)
    assert error.problems == ("$.status: expected an HTTP status, got '***'",)


@pytest.mark.parametrize(("start", "masked"), [("sk_live_" + "a" * 60, True), ("\\" * 60, False), ("<&>" * 20, False)])
def test_near_misses_of_the_key_take_no_time(start: str, *, masked: bool) -> None:
    """Text full of beginnings of the key is searched in linear time; it is masked if it has most of the key."""
    text = start * 200
    assert ApiKey(start + "!").redact(text) == ("***" if masked else text)


def test_a_key_in_another_encoding_is_masked() -> None:
    """Mask the key in a body in UTF-16 too, and a key that was replaced like its successor."""
    key = ApiKey("new-key", before=ApiKey("old-key"))
    assert b"n\0e\0w" not in key.redact_start("my new-key".encode("utf-16-le"), 100)
    assert key.redact("old-key, new-key") == "***, ***"


def test_control_characters_do_not_reach_a_terminal() -> None:
    """Escape the service's description when it is printed, and keep it unchanged in the field."""
    error = reply(400, json.dumps({"description": "a\x1b[31m\nb" + "c" * 500}).encode())
    assert isinstance(error, BadRequestError)
    assert r"a\x1b[31m\nb" in str(error)
    assert len(str(error)) < 300
    assert error.description.startswith("a\x1b[31m\nb")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("2.", 2.0),
        ("Wed, 11 Feb 2026 12:01:00 GMT", 60.0),
        ("Wednesday, 11-Feb-26 12:01:00 GMT", 60.0),
        ("Wed Feb 11 12:01:00 2026", 60.0),
        ("Wed, 11 Feb 2026 11:00:00 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
    ],
)
def test_retry_after(value: str, seconds: float) -> None:
    """Read seconds, fractional seconds and all three forms of an HTTP date; the past is no wait."""
    assert retry_after(CIMultiDict({"retry-after": value}), now=NOON) == seconds


def test_retry_after_counts_from_the_replys_own_date() -> None:
    """Compare a date with the reply's Date, so that our own clock does not matter."""
    headers = CIMultiDict({"Date": "Wed, 11 Feb 2026 08:00:00 GMT", "Retry-After": "Wed, 11 Feb 2026 08:00:30 GMT"})
    assert retry_after(headers, now=NOON) == 30.0
    headers["Date"] = "yesterday"
    assert retry_after(headers, now=NOON - 4 * 3600) == 30.0


@pytest.mark.parametrize(
    "value",
    [
        "",
        "-1",
        "+1",
        "nan",
        "inf",
        "Infinity",
        "1e3",
        "1e400",
        "0x10",
        "²",
        "١٢",
        "1,2",
        "1, 2",
        "120;",
        "1_0",
        "9" * 400,
        ".5",
        "1.5.1",
        "soon",
        "Wed, 11 Feb 99999 12:01:00 GMT",
        "Wed, 11 Feb 2026 12:01:00 CET",
        "Wed, 99 Feb 2026 12:01:00 GMT",
        "Wed, 11 Xyz 2026 12:01:00 GMT",
        "11 Feb 2026 12:01:00 GMT",
        "2026-02-11T12:01:00Z",
    ],
)
def test_malformed_retry_after_is_ignored(value: str) -> None:
    """Ignore every malformed spelling, as if nothing had been sent."""
    assert retry_after(CIMultiDict({"Retry-After": value}), now=NOON) is None


@given(st.text(max_size=40) | st.from_regex(r"\A[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\Z"))
def test_any_retry_after_is_sane_or_ignored(value: str) -> None:
    """Whatever is sent, the wait is None or a finite number of seconds from 0 up."""
    wait = retry_after(CIMultiDict({"Retry-After": value, "Date": value}), now=NOON)
    assert wait is None or (math.isfinite(wait) and wait >= 0)


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"RateLimit": '"default";r=0;t=30'}, 30.0),
        (429, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "30"}, 30.0),
        (429, {"X-Rate-Limit-Remaining": "0", "X-Rate-Limit-Reset": "2026-02-11T12:00:30.0000000Z"}, 30.0),
        (429, {"RateLimit": '"default";r=0;t=30', "Retry-After": "7"}, 7.0),
        (429, {"RateLimit": '"default";r=0;t=30', "Retry-After": "soon"}, 30.0),
        (429, {"RateLimit": '"default";r=1;t=30'}, None),
        (429, {"RateLimit": '"default";r=0'}, None),
        (429, {}, None),
        (503, {"RateLimit": '"default";r=0;t=30'}, None),
        (503, {"RateLimit": '"default";r=0;t=30', "Retry-After": "7"}, 7.0),
    ],
)
def test_a_429_is_retried_after_its_quota(status: int, headers: dict[str, str], seconds: float | None) -> None:
    """Wait until its quota is restored after a 429 without a readable Retry-After, if that is used up."""
    error = run_to_completion(read(Reply(status, CIMultiDictProxy(CIMultiDict(headers)), b""), KEY, now=NOON))
    assert isinstance(error, StatusError)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("https://api.commbox.io/", "https://api.commbox.io/audiences"),
        ("https://api.commbox.io", "https://api.commbox.io/audiences"),
        ("https://gateway.example/commbox/v1/", "https://gateway.example/commbox/v1/audiences"),
        ("http://localhost:8080", "http://localhost:8080/audiences"),
        ("http://127.0.0.9/", "http://127.0.0.9/audiences"),
        ("http://[::1]:80/", "http://[::1]/audiences"),
    ],
)
def test_endpoint(base_url: str, expected: str) -> None:
    """Build the endpoint as /audiences below the base URL; plain http is for loopback."""
    assert str(endpoint(Secret(base_url), allow_http=False)) == expected


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.commbox.io",
        "/audiences",
        "ftp://api.commbox.io/",
        "https://",
        "https://api.commbox.io/?a=1",
        "https://xn--a",
        "https://exa mple",
        "https://a/#b",
        "http://api.commbox.io/",
        "http://127.0.0.1.example.com/",
        "http://localhost.example.com/",
        "https://[::1",
        5,
    ],
)
def test_endpoint_that_cannot_be_used(base_url: Any) -> None:
    """Reject a value that is no absolute https URL, plain http to another host above all."""
    with pytest.raises(ConfigurationError, match="base_url"):
        endpoint(Secret(base_url), allow_http=False)


def test_plain_http_on_request() -> None:
    """Open plain http to any host with allow_http."""
    assert str(endpoint(Secret("http://gateway.internal/"), allow_http=True)) == "http://gateway.internal/audiences"


def test_a_password_in_a_url_never_prints() -> None:
    """Reject a URL that holds a password without repeating it."""
    with pytest.raises(ConfigurationError, match="credentials") as caught:
        endpoint(Secret("https://user:hunter2@api.commbox.io/"), allow_http=False)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="proxy") as caught:
        proxy_url(Secret("socks5://user:hunter2@proxy/"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["http://[::1", 5])
def test_proxy_that_is_no_url(proxy: Any) -> None:
    """Reject a proxy that is no URL."""
    with pytest.raises(ConfigurationError, match="proxy is not a URL"):
        proxy_url(Secret(proxy))
