"""Hostile bodies and heads, mutated and generated: a right value or one of our errors, and never anything else.

The examples are the same in every run, 100 of each test. ``AUDIENCES_FUZZ_EXAMPLES=20000 pytest tests/test_fuzzing.py``
tries that many in each test, new ones in every run; 0 tries as many as each test sets, as CI does on the oldest Python.
"""

import asyncio
import json
import math
import os
import pickle
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import contract
import pytest
from attrs import define, field
from conftest import RawConnection, RawServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async import (
    Account,
    AttemptTimeoutError,
    AudiencesClient,
    AudiencesError,
    AudiencesResponse,
    BadRequestError,
    ConnectionFailedError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidResponseError,
    NotFoundError,
    ResponseTooLargeError,
    RetryPolicy,
    ServerError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
    UnknownAudience,
)
from audiences_async._http.wire import Reply, read
from audiences_async.credentials import ApiKey
from audiences_async.sandbox import SteppedTime
from audiences_async.structuring import decode, run_to_completion

ON_DEMAND: Final = int(os.environ.get("AUDIENCES_FUZZ_EXAMPLES", "100"))
KEY: Final = ApiKey("s3cr3t-k3y-of-north")
ATTEMPTS: Final = 2


def fuzzed(examples: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Use *examples* examples if the environment says 0, or as many as it sets; the same ones, unless it sets more.

    A slow machine is not a failure.
    """
    return settings(
        max_examples=ON_DEMAND or examples,
        derandomize=examples >= ON_DEMAND,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.function_scoped_fixture,
        ],
    )


# --- documents near the schema

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([10**20, -1, 0, 100.0, -0.0, "", "100", "Static", "NaN", "\0extra", "\u202e", "🦊"])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_DIGITS = st.integers(0, 99).map("{:02d}".format)
_ZONES = st.sampled_from(
    ["", "Z", "z", "+00:00", "-00:00", "+02:00", "-1130", "+23:59", "+24:00", "+05:99", "+5", "Z "]
)
_FRACTIONS = st.just("") | st.text("0123456789", max_size=12).map(lambda digits: f".{digits}")
ODD_TIMES = st.builds(
    lambda year, month, day, sep, hour, minute, second, rest, zone: (
        f"{year:04d}-{month:02d}-{day:02d}{sep}{hour:02d}:{minute}{second}{rest if second else ''}{zone}"
    ),
    st.integers(0, 9999),
    st.integers(0, 13),
    st.integers(0, 32),
    st.sampled_from(["T", " ", "t", "", "T "]),
    st.integers(0, 25),
    st.integers(0, 61).map("{:02d}".format),
    st.just("") | st.integers(0, 61).map(":{:02d}".format),
    _FRACTIONS,
    _ZONES,
)
TIMES = (
    st.datetimes().map(lambda time: time.isoformat(sep="T"))
    | st.datetimes().map(lambda time: f"{time.isoformat(sep=' ')}Z")
    | ODD_TIMES
)
SOUND = {
    "id": st.text(min_size=1, max_size=6),
    "name": st.text(max_size=6),
    "created_time": TIMES,
    "user_count": st.integers(0, 2**70),
    "type": st.sampled_from(["Static", "Static", "Dynamic", "Dynamic", "Lookalike"]),
}
NAMES = st.sampled_from([*SOUND, "extra", "raw", "\0extra", "owner"])


@st.composite
def near_rows(draw: st.DrawFn) -> Any:
    """Draw a record that is right, or wrong in a field or two."""
    row = {name: draw(values) for name, values in SOUND.items()}
    if row["type"] != "Static" and draw(st.booleans()):
        del row["user_count"]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(NAMES)
        if draw(st.booleans()):
            row[name] = draw(VALUES)
        else:
            row.pop(name, None)
    return row if draw(st.integers(0, 20)) else draw(VALUES)


STATUSES = st.sampled_from(["200", 200, 200, 201, "204", 100, 299]) | st.sampled_from(
    ["429", 500, 302, 99, -1, True, None, 200.0, "", "2oo", "0200", "²00", " 200", "200\n", 10**30, [], "9" * 30]
)


@st.composite
def near_documents(draw: st.DrawFn) -> Any:
    """Draw an envelope that is right, or wrong in a place or two."""
    envelope: dict[str, Any] = {
        "status": draw(STATUSES),
        "description": draw(st.sampled_from(["Audiences retrieved", "", None])),
        "response_time": draw(TIMES),
        "data": draw(st.lists(near_rows(), max_size=4)),
    }
    if not draw(st.integers(0, 4)):
        name = draw(st.sampled_from([*envelope, "next"]))
        if draw(st.booleans()):
            envelope[name] = draw(VALUES)
        else:
            envelope.pop(name, None)
    return envelope


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Draw a document as some server may write it."""
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), ("\n,\t", " :\r\n")]))
    text = json.dumps(draw(near_documents()), ensure_ascii=draw(st.booleans()), separators=separators)
    return (b"\xef\xbb\xbf" if not draw(st.integers(0, 5)) else b"") + text.encode()


# --- mutations

_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[\[\]{},:]')
_TOKENS: Final = [
    *(b"{}", b"[]", b"null", b"true", b"-0", b"-1", b"0.0", b"1e2", b"01", b"1e400", b"NaN", b"Infinity", b"9" * 4200),
    *(
        b"18446744073709551616",
        b'""',
        b'"200"',
        b'"Static"',
        b'"\\ud800"',
        b'"\\ud83e\\udd8a"',
        b'"\\u0000"',
        b'"\xff"',
    ),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b",,",
        b'"',
        b"/**/",
        b"\x00",
        b"'",
        b'"created_time"',
        b"2025",
        b"\xef\xbb\xbf",
    ),
]
_DUPLICATES: Final = [b'"type"', b'"id"', b'"name"', b'"user_count"', b'"created_time"', b'"data"', b'"status"', b'"x"']


def flip(draw: st.DrawFn, body: bytes) -> bytes:
    """Change some bits of one byte."""
    at = draw(st.integers(0, len(body) - 1))
    return body[:at] + bytes([body[at] ^ draw(st.integers(1, 255))]) + body[at + 1 :]


def cut(draw: st.DrawFn, body: bytes) -> bytes:
    """Remove a part."""
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, len(body)) | st.integers(start, min(len(body), start + 8)))
    return body[:start] + body[end:]


def splice(draw: st.DrawFn, body: bytes) -> bytes:
    """Insert a part of another body."""
    other = draw(bodies() | st.binary(max_size=12))
    start = draw(st.integers(0, len(other)))
    piece = other[start : draw(st.integers(start, len(other)))]
    at = draw(st.integers(0, len(body)))
    return body[:at] + piece + body[at:]


def repeat_a_key(draw: st.DrawFn, body: bytes) -> bytes:
    """Insert a member into an object, which may have one of that name."""
    places = [found.end() for found in re.finditer(rb"{", body)]
    if not places:
        return body
    at = draw(st.sampled_from(places))
    pair = draw(st.sampled_from(_DUPLICATES)) + b":" + json.dumps(draw(SCALARS)).encode()
    more = b"" if body[at:].lstrip()[:1] == b"}" else b","
    return body[:at] + pair + more + body[at:]


def swap_a_token(draw: st.DrawFn, body: bytes) -> bytes:
    """Replace a token of JSON by another."""
    tokens = list(_TOKEN.finditer(body))
    if not tokens:
        return body
    token = draw(st.sampled_from(tokens))
    other = draw(st.sampled_from(_TOKENS) | st.sampled_from(tokens).map(lambda found: found[0]))
    return body[: token.start()] + other + body[token.end() :]


MUTATIONS = (flip, cut, splice, repeat_a_key, repeat_a_key, swap_a_token, swap_a_token)


@st.composite
def mutated_bodies(draw: st.DrawFn) -> bytes:
    """Draw a body with one to three mutations."""
    body = draw(bodies())
    for _ in range(draw(st.integers(1, 3))):
        if body:
            body = draw(st.sampled_from(MUTATIONS))(draw, body)
    return body


# --- what is right


def assert_is_what_the_contract_says(response: AudiencesResponse, body: bytes) -> None:
    """Check that the independent reader accepts the body, and reads the same."""
    try:
        answer = contract.read(body)
    except contract.RefusedError as refused:
        pytest.fail(f"read as a value, though the contract refuses it: {refused}: {body[:1000]!r}")
    told = (response.status, response.description, response.response_time)
    assert told == (answer.status, answer.description, answer.response_time)
    assert len(response) == len(answer.rows)
    for audience, row in zip(response.data, answer.rows, strict=True):
        beyond = audience.raw if isinstance(audience, UnknownAudience) else audience.extra
        assert isinstance(audience, UnknownAudience) == (row.kind not in {"Static", "Dynamic"})
        assert contract.same(
            [audience.type, audience.id, audience.name, getattr(audience, "user_count", None), dict(beyond)],
            [row.kind, row.id, row.name, row.user_count, dict(row.beyond)],
        )
        assert audience.created_time == row.created_time
        assert audience.created_time is None or audience.created_time.utcoffset() is not None


def assert_is_a_refusal(error: AudiencesError, body: bytes) -> None:
    """Check that the error of an unreadable body is a status from its envelope, or problems with paths."""
    if isinstance(error, StatusError):
        said = contract.document_of(body)["status"]
        assert error.status == int(said) >= 300
        assert type(error) is kind_of(error.status)
    else:
        assert type(error) is InvalidResponseError
        assert error.problems
        assert all(problem.startswith("$") for problem in error.problems)
    assert_is_presentable(error)


def assert_is_presentable(error: AudiencesError) -> None:
    """Check that an error has one printable line of text, and pickles."""
    assert str(error).isprintable()
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def kind_of(status: int) -> type[StatusError]:
    """Return the class of the status in the error tree."""
    kinds: dict[int, type[StatusError]] = {
        400: BadRequestError,
        401: UnauthorizedError,
        403: ForbiddenError,
        404: NotFoundError,
        429: TooManyRequestsError,
    }
    return kinds.get(status, ServerError if 500 <= status <= 599 else StatusError)


def verdict(body: bytes) -> AudiencesResponse | AudiencesError:
    """Return the response, or the error."""
    try:
        return decode(body)
    except AudiencesError as error:
        return error


def check(body: bytes) -> AudiencesResponse | AudiencesError:
    """Decode a body; check a value or an error against the contract."""
    result = verdict(body)
    if isinstance(result, AudiencesResponse):
        assert_is_what_the_contract_says(result, body)
    else:
        assert_is_a_refusal(result, body)
    return result


# --- bodies


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
@given(mutated_bodies())
@fuzzed(400)
def test_mutated_bodies(body: bytes) -> None:
    """Refuse a mutated valid body with paths, or read it exactly as the contract reads it."""
    check(body)


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
@given(bodies())
@example(
    b'{"status": 200, "data": [{"type": "Dynamic", "id": "1", "name": "", "created_time": "2025-01-01T00:00+05:99"}]}'
)
@fuzzed(700)
def test_documents_near_the_schema(body: bytes) -> None:
    """Read a well-formed document if, and only if, the contract accepts it."""
    result = check(body)
    try:
        contract.read(body)
    except contract.RefusedError:
        accepted = False
    else:
        accepted = True
    assert isinstance(result, AudiencesResponse) == accepted


@pytest.mark.slow
@given(ODD_TIMES | TIMES)
@example("2025-10-01T24:00:00Z")
@example("2025-10-01T00:00:00+05:60")
@example("2025-10-01T00:00:00+00:00:30")
@example("9999-12-31T23:59:59-00:01")
@example("0001-01-01T00:00:00+00:01")
@fuzzed(700)
def test_times(text: str) -> None:
    """Read a time if, and only if, an independent reader reads it, and as the same moment."""
    row = {"type": "Dynamic", "id": "1", "name": "", "created_time": text}
    result = verdict(json.dumps({"status": 200, "data": [row]}).encode())
    try:
        expected = contract.time(text)
    except contract.RefusedError:
        assert type(result) is InvalidResponseError
        assert result.problems[0].startswith("$.data[0].created_time: ")
    else:
        assert isinstance(result, AudiencesResponse)
        assert result.data[0].created_time == expected


@pytest.mark.once
@pytest.mark.slow
@given(st.dictionaries(NAMES, VALUES, max_size=6), st.sampled_from(["Static", "Dynamic"]))
@fuzzed(300)
def test_no_field_name_is_mistaken_for_another(change: dict[str, Any], kind: str) -> None:
    """Undocumented fields, whatever their names, never replace a documented one."""
    sound = {"id": "1", "name": "one", "created_time": "2025-10-01T09:10:00Z", "user_count": 7, "type": kind}
    check(json.dumps({"status": 200, "data": [sound | change]}).encode())
    check(json.dumps({"status": 200, "data": [change | {"type": kind}]}).encode())


@pytest.mark.parametrize("opened", [b"[", b'{"":'])
@pytest.mark.parametrize("depth", [10, 300, 900, 1100, 5000, 200_000])
def test_nesting_of_any_depth(opened: bytes, depth: int) -> None:
    """Read or refuse nesting, at any place and of any depth."""
    deep = opened * depth + b"1" + (b"]" if opened == b"[" else b"}") * depth
    row = b'{"type": "New", "deep": %s}' % deep
    for body in (deep, b'{"status": 200, "data": [], "x": %s}' % deep, b'{"status": 200, "data": [%s]}' % row):
        result = verdict(body)
        if isinstance(result, AudiencesResponse):
            assert len(result) == body.count(b'"type"')
            repr(result)
        else:
            assert type(result) is InvalidResponseError


# --- whole replies, without a wire

WAITS = st.sampled_from(
    ["0", "1", "1.5", "-1", "1e3", "soon", "", " 5 ", "9" * 21, "9" * 20, "٣", "0x10", "1,2", "inf", "nan"]
) | st.sampled_from(
    [
        "Wed, 21 Oct 2026 07:28:00 GMT",
        "Wednesday, 21-Oct-26 07:28:00 GMT",
        "Wed Oct 21 07:28:00 2026",
        "Wed, 99 Oct 2026 07:28:00 GMT",
        "Wed, 21 Oct 0000 07:28:00 GMT",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Wed, 21 Oct 2026 25:61:61 GMT",
    ]
)
FIELDS = {
    "Retry-After": WAITS,
    "Date": WAITS,
    "RateLimit": st.sampled_from(
        ['"x";r=0;t=5', "remaining=0, reset=5", "r=0;t=5", '"x";r=0;t=99999999', ";r=0;t=;", ""]
    )
    | st.text(max_size=12),
    "RateLimit-Remaining": st.sampled_from(["0", " 0 ", "1", "none", ""]),
    "RateLimit-Reset": WAITS,
    "X-RateLimit-Remaining": st.sampled_from(["0", "1"]),
    "X-RateLimit-Reset": WAITS | st.sampled_from(["1761030480", "99999999999999999999"]),
    "X-Rate-Limit-Remaining": st.sampled_from(["0", "1"]),
    "X-Rate-Limit-Reset": WAITS | st.sampled_from(["2026-10-21T07:28:00.1234567Z", "1761030480500"]),
    "Content-Type": st.sampled_from(["application/json", "text/html; charset=utf-16", "x"]),
    "X-Any": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
}
HEADERS = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name])), max_size=5
)
ANY_BODY = bodies() | mutated_bodies() | st.binary(max_size=60) | st.just(b"<html>" + b"x" * 70_000)


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
@given(st.integers(100, 999) | st.just(200), HEADERS, ANY_BODY, st.none() | st.just(100))
@fuzzed(700)
def test_whole_replies(status: int, headers: list[tuple[str, str]], body: bytes, exceeded: int | None) -> None:
    """Read any status with any headers and any body as a right value or the error in the table of responses."""
    reply = Reply(status, CIMultiDictProxy(CIMultiDict(headers)), body, exceeded if status == 200 else None)
    result = run_to_completion(read(reply, KEY, now=1_761_030_480.0))
    if isinstance(result, AudiencesResponse):
        assert (status, reply.exceeded) == (200, None)
        assert_is_what_the_contract_says(result, body)
        return
    assert_is_presentable(result)
    if status >= 300:
        assert isinstance(result, StatusError)
        assert (type(result), result.status) == (kind_of(status), status)
        assert result.body == body[: 64 * 1024]
    elif status != 200:
        assert type(result) is InvalidResponseError
    elif reply.exceeded:
        assert type(result) is ResponseTooLargeError
    else:
        assert_is_a_refusal(result, body)
    wait = result.retry_after
    assert wait is None or (math.isfinite(wait) and wait >= 0)


# --- whole replies, on real sockets


@define
class Hostile:
    """One client, and one server that answers each account with its own bytes."""

    client: AudiencesClient
    server: RawServer
    replies: dict[str, bytes] = field(factory=dict)
    keep_alive: set[str] = field(factory=set)
    seen: dict[str, int] = field(factory=dict)
    examples: int = 0

    async def serve(self, connection: RawConnection) -> None:
        """Answer each request with its key's bytes, and close the connection by default."""
        while True:
            head = await connection.request()
            found = re.search(rb"\r\nAuthorization: Bearer (.+?)\r\n", head)
            assert found is not None
            key = found[1].decode()
            self.seen[key] = self.seen.get(key, 0) + 1
            await connection.send(self.replies[key])
            if key not in self.keep_alive:
                return


@pytest.fixture
async def hostile(
    raw: Callable[[Callable[[RawConnection], Awaitable[None]]], Awaitable[RawServer]], time: SteppedTime
) -> AsyncIterator[Hostile]:
    """Yield one client and one server for all examples, so that leftovers of one could affect the next."""

    async def serve(connection: RawConnection) -> None:
        await made.serve(connection)

    server = await raw(serve)
    client = AudiencesClient(
        base_url=server.base_url,
        retry=RetryPolicy(max_attempts=ATTEMPTS, base_delay=0, throttle_base_delay=0),
        budget=None,
        attempt_timeout=0.05,
        clock=time.clock,
    )
    made = Hostile(client, server)
    async with client:
        yield made


HEADS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 200",
        b"HTTP/1.1 503 Busy",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
        b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 200 OK",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade",
        b"HTTP/1.1 204 None",
        b"HTTP/1.1 304 Same",
        b"HTTP/1.1 999 Odd",
        b"http/1.1 200 OK",
        b"ICY 200 OK",
    ]
)
ODD_FIELDS = st.sampled_from(
    [
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: chunked, chunked",
        b"Content-Encoding: gzip",
        b"Content-Encoding: br",
        b"Content-Encoding: identity, identity",
        b"Connection: close",
        b"Connection: keep-alive",
        b"Content-Length: 1",
        b"Content-Length: -1",
        b"Content-Length: 99999999999999999999999",
        b"Content-Length : 5",
        b"Retry-After: 1",
        b"Retry-After: 1e9",
        b"Retry-After: 99999",
        b"Set-Cookie: a=b; Domain=x",
        b"Location: http://127.0.0.1:1/",
        b"X: " + b"x" * 9000,
        b": no name",
        b" folded",
        b"X: \x00",
        b"X: \xff\xfe",
        b"X-Caf\xe9: 1",
        b"",
    ]
)


@st.composite
def raw_replies(draw: st.DrawFn) -> tuple[list[bytes], bool, int]:
    """Draw the surroundings of a body: a head, odd fields, and the number of mutated bytes."""
    first = draw(HEADS) if not draw(st.integers(0, 2)) else b"HTTP/1.1 200 OK"
    odd = draw(st.lists(ODD_FIELDS, max_size=2)) if draw(st.booleans()) else []
    return [first, *odd], not draw(st.integers(0, 3)), draw(st.sampled_from([0, 0, 0, 1, 2]))


@given(raw_replies(), st.sampled_from([-7, -1, 0, 0, 0, 0, 0, 1, 9]), st.data())
@fuzzed(200)
async def test_mutated_replies_on_the_wire(
    hostile: Hostile, drawn: tuple[list[bytes], bool, int], wrong_by: int, data: st.DataObject
) -> None:
    """Read any bytes of a server as this account's own answer or one of our errors, in the promised requests."""
    (lines, keep_alive, accidents), number = drawn, hostile.examples
    hostile.examples += 1
    name = f"account-{number:06d}"
    row = {"type": "Static", "id": name, "name": "n", "created_time": "2025-10-01T09:10:00Z", "user_count": number}
    body = json.dumps({"status": "200", "data": [row]}).encode()
    head = b"\r\n".join([*lines, b"Content-Length: %d" % max(0, len(body) + wrong_by)]) + b"\r\n\r\n"
    for _ in range(accidents):
        head = data.draw(st.sampled_from([flip_byte, cut_bytes, repeat_line]))(head, data.draw(st.integers(0, 10**6)))
    rest = data.draw(
        st.sampled_from([b"", b"", b"\r\n", b"junk", head + body.replace(name.encode(), b"someone-else!!")])
    )
    hostile.replies[f"key-{name}"] = head + body + rest
    if keep_alive:
        hostile.keep_alive.add(f"key-{name}")
    try:
        response = await hostile.client.get_audiences(Account(name, f"key-{name}"), timeout=30.0)
    except AudiencesError as error:
        assert isinstance(
            error,
            StatusError | InvalidResponseError | ConnectionFailedError | AttemptTimeoutError | DeadlineExceededError,
        )
        assert error.account == name
        assert_is_presentable(error)
        assert len(error.attempts) <= ATTEMPTS
    else:
        assert [(one.id, getattr(one, "user_count", None)) for one in response] == [(name, number)]
    assert hostile.seen.get(f"key-{name}", 0) <= ATTEMPTS
    assert sum(hostile.seen.values()) <= ATTEMPTS * hostile.examples


def flip_byte(head: bytes, at: int) -> bytes:
    """Change some bits of one byte of a response's head."""
    place = at % len(head)
    return head[:place] + bytes([head[place] ^ (1 + at % 255)]) + head[place + 1 :]


def cut_bytes(head: bytes, at: int) -> bytes:
    """Remove a few bytes of a response's head."""
    place = at % len(head)
    return head[:place] + head[place + 1 + at % 7 :]


def repeat_line(head: bytes, at: int) -> bytes:
    """Repeat a line of a response's head."""
    lines = head.split(b"\r\n")
    place = at % len(lines)
    return b"\r\n".join([*lines[: place + 1], *lines[place:]])


async def test_no_rest_of_a_reply_answers_the_next_call(hostile: Hostile) -> None:
    """Drop a whole second response that arrives with the first, on a connection that stays open."""
    body = b'{"status": "200", "data": [{"type": "%s"}]}'
    for number in range(30):
        mine, other = body % b"mine-%02d" % number, body % b"rest-%02d" % number
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(mine)
        hostile.replies[f"key-{number}"] = head + mine + head + other
        hostile.keep_alive.add(f"key-{number}")
        response = await hostile.client.get_audiences(Account("north", f"key-{number}"))
        assert [audience.type for audience in response] == [f"mine-{number:02d}"]
        await asyncio.sleep(0)


def test_the_strict_reader_is_strict() -> None:
    """Refuse, in the independent reader, what the contract refuses, and read what it allows."""
    row = {"type": "Static", "id": "1", "name": "", "created_time": "2025-10-01T11:10:00.12+02:00", "user_count": 0}
    sound: dict[str, Any] = {"status": "200", "data": [row]}
    assert contract.read(b"\xef\xbb\xbf" + json.dumps(sound).encode()).rows[0].created_time == contract.time(
        "2025-10-01 09:10:00.12"
    )
    wrong: list[Any] = [None, [], {}, sound | {"status": True}, sound | {"status": 300}, sound | {"description": 1}]
    no_data: list[Any] = [None, {}, [None], [{}], [{"type": ""}], [{"type": 1}]]
    wrong += [sound | {"data": data} for data in no_data]
    wrong += [sound | {"data": [{k: v for k, v in row.items() if k != name}]} for name in row]
    counts = (1.0, "1", True, None, -1)
    wrong += [sound | {"data": [row | {"user_count": count}]} for count in counts]
    wrong += [sound | {"data": [row | {"created_time": time}]} for time in ("2025-10-01", "2025-02-30T00:00", 1, None)]
    for document in wrong:
        with pytest.raises(contract.RefusedError):
            contract.read(json.dumps(document).encode())
    for body in (b"", b"{", b"\xff", b'{"status": 200, "data": [], "x": NaN}', b'"\\ud800"'):
        with pytest.raises(contract.RefusedError):
            contract.read(body)
