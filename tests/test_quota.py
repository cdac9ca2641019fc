"""The quota that a reply announces."""

import itertools
import sys
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async._http.quota import Quota, announced

NOON = datetime(2026, 2, 11, 12, tzinfo=UTC).timestamp()
LINES = ("RateLimit", "X-RateLimit", "X-Rate-Limit")


def read(*headers: tuple[str, str], now: float = NOON) -> Quota | None:
    """Return the quota that these headers announce."""
    return announced(CIMultiDictProxy(CIMultiDict(headers)), now=now)


def combined(*fields: str, policy: str | None = None) -> Quota | None:
    """Return the quota of ``RateLimit`` fields, and of a ``RateLimit-Policy`` if given."""
    return read(
        *(("RateLimit", field) for field in fields), *([] if policy is None else [("RateLimit-Policy", policy)])
    )


def lines(remaining: str, reset: str, prefix: str = "X-RateLimit", date: str = "") -> Quota | None:
    """Return the quota of the older headers, one for each number."""
    return read((f"{prefix}-Remaining", remaining), (f"{prefix}-Reset", reset), ("Date", date))


# --- RateLimit, a list


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ('"default";r=0;t=30', (0, 30)),
        ('"default";r=50;t=30', (50, 30)),
        ('"default";t=30;r=50', (50, 30)),
        ('"default"; r=50; t=30', (50, 30)),
        ('  "default";r=50;t=30  ', (50, 30)),
        ('"default";r=0;t=86400', (0, 86400)),
        ('"default";r=999999999999999;t=1', (999999999999999, 1)),
        ('"peruser";r=0;t=60;pk=:QXBwLTk5OQ==:', (0, 60)),
        ('"peruser";pk=:QXBwLTk5OQ==:;acme-burst="5";t=60;r=0', (0, 60)),
        ('"a;r=9;t=9, ";r=1;t=2', (1, 2)),
        ("default;r=0;t=30", (0, 30)),
        ('"default";r=5;r=0;t=30', (0, 30)),  # RFC 9651, section 4.2.3.2: the last one counts
    ],
)
def test_an_item_of_a_list(field: str, expected: tuple[int, float]) -> None:
    """Read an item of draft 10, in any order of its parameters and with others beside them."""
    assert combined(field) == Quota(*expected)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (['"burst";r=5;t=1', '"hour";r=0;t=1800', '"minute";r=0;t=20'], (0, 1800)),
        (['"burst";r=10;t=1', '"hour";r=3;t=1800', '"day";r=400;t=40000'], (3, 1800)),
        (['"burst";r=3;t=1', '"hour";r=3;t=1800', '"day";r=400;t=40000'], (3, 1800)),
        (['"burst";r=0;t=0', '"hour";r=3;t=1800', '"month";r=0;t=86401'], (3, 1800)),
        (['"burst";r=-1;t=1', '"hour";r=3;t=1800', '"day";t=5'], (3, 1800)),
        (['("inner");r=0;t=9', '"hour";r=3;t=1800', "5;r=0;t=7"], (3, 1800)),
    ],
)
def test_the_most_restrictive_item_counts(items: list[str], expected: tuple[int, float]) -> None:
    """Use the exhausted item that takes longest, or else the one with the least remaining, in any order."""
    for order in itertools.permutations(items):
        assert (
            combined(", ".join(order))
            == combined(*order)
            == combined(order[0], ",".join(order[1:]))
            == Quota(*expected)
        )


@pytest.mark.parametrize(
    ("field", "policy", "expected"),
    [
        ('"hour";r=5', '"hour";q=100;w=3600', (5, 3600)),
        ('"hour";r=5', '"day";q=1000;w=86400, "hour";w=3600', (5, 3600)),
        ("hour;r=5", '"hour";q=100;w=3600', (5, 3600)),
        ('"hour";r=0;t=20', '"hour";q=100;w=3600', (0, 20)),
        ('"hour";r=5', '"day";q=1000;w=86400', None),
        ('"hour";r=5', '"hour";q=100', None),
        ('"hour";r=5', '"hour";q=100;w=0', None),
        ('"hour";r=5', '"hour";q=100;w=1.5', None),
        ('"hour";r=5', '"hour";q=100;w=3600,', None),
        ('"hour";r=5', "100;w=3600", None),
        ('"hour";r=5', None, None),
        ('"hour";r=5;t="soon"', '"hour";q=100;w=3600', None),
        ('"hour";r=0;t=20', "((", (0, 20)),
        ('"hour";r=5;t=20', '"hour";q=100;qu="requests"', (5, 20)),
        ('"hour";r=5;t=20', '"hour";q=100;qu=request', (5, 20)),
        ('"hour";r=5;t=20', '"hour";q=65535;qu="content-bytes"', None),
        ('"hour";r=0;t=20', '"hour";q=65535;qu="content-bytes"', (0, 20)),
    ],
)
def test_a_policy_completes_an_item(field: str, policy: str | None, expected: tuple[int, float] | None) -> None:
    """Complete an item by its policy: the window bounds a missing time, the unit is that of what remains."""
    assert combined(field, policy=policy) == (None if expected is None else Quota(*expected))


@pytest.mark.parametrize(
    "field",
    [
        "",
        "100",
        '"default"',
        '"default";r=0',
        '"default";t=30',
        '"default";r;t=30',
        '"default";r=?0;t=30',
        '"default";r="0";t=30',
        '"default";r=0.0;t=30',
        '"default";r=-1;t=30',
        '"default";r=0;t=30.5',
        '"default";r=0;t=-1',
        '"default";r=0;t=0',
        '"default";r=0;t=86401',
        '"default";r=0;t=?1',
        '"default";r=0;t=@1770811230',
        '"default";r=1000000000000000;t=30',
        '"default";r=0;t=30,',
        '"default";r=0;t=30, "',
        '"default";r=0;t=30;',
        '"default" ;r=0;t=30',
        '"default";R=0;T=30',
        '"défaut";r=0;t=30',
        '"\udcff";r=0;t=30',
        '("default";r=0;t=30)',
        "r=0;t=30",
        "r=zero",
        ";r=0;t=30",
    ],
)
def test_a_malformed_list_is_ignored(field: str) -> None:
    """Ignore an item with parameters of other types, and a malformed list as a whole."""
    assert combined(field) is None


def test_a_malformed_line_spoils_the_field_only() -> None:
    """Ignore all lines of a field with a malformed line, and leave the other headers as they are."""
    assert combined('"a";r=0;t=30', '"b";r') is not None
    assert combined('"a";r=0;t=30', '"b";r=') is None
    assert read(("RateLimit", '"a";r='), ("RateLimit-Remaining", "0"), ("RateLimit-Reset", "7")) == Quota(0, 7)


# --- RateLimit, a dictionary


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["limit=100, remaining=0, reset=30"], (0, 30)),
        (["reset=30,remaining=50,limit=100"], (50, 30)),
        (["limit=100;w=60, remaining=50;x, reset=30;y=1"], (50, 30)),
        (["limit=100", "remaining=50", "reset=30"], (50, 30)),
        (["limit=100, remaining=50, reset=1.5"], (50, 1.5)),
        (["limit=100, remaining=50, reset=1770811230"], (50, 30)),
        (["limit=100, remaining=50, reset=1770811230500"], (50, 30.5)),
        (["limit=100, reset=30"], None),
        (["limit=100, remaining=50"], None),
        (["remaining, reset=30"], None),
        (["remaining=0, reset"], None),
        (["remaining=-1, reset=30"], None),
        (["remaining=(0), reset=30"], None),
        (["remaining=0, reset=(30)"], None),
        (["remaining=0, reset=-30"], None),
        (['remaining="0", reset="30"'], None),
        (["remaining=0, reset=30, "], None),
        (["remaining: 0, reset: 30"], None),
    ],
)
def test_a_dictionary(fields: list[str], expected: tuple[int, float] | None) -> None:
    """Read the dictionary of draft 07; parameters are ignored, and values of other types make it no quota."""
    assert combined(*fields) == (None if expected is None else Quota(*expected))


# --- separate headers


@pytest.mark.parametrize("prefix", LINES)
@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        ("30", 30),
        (" 30\t", 30),
        ("0.25", 0.25),
        ("86400", 86400),
        ("1770811230", 30),
        ("1770811230.5", 30.5),
        ("1770897600", 86400),
        ("1770811230500", 30.5),
        ("2026-02-11T12:00:30Z", 30),
        ("2026-02-11T12:00:30", 30),
        ("2026-02-11 12:00:30", 30),
        ("2026-02-11 12:00:30Z", 30),
        ("2026-02-11T12:00:30.5Z", 30.5),
        ("2026-02-11T12:00:30.1234567Z", 30.123456),
        ("2026-02-11T14:00:30.1234567+02:00", 30.123456),
        ("2026-02-11T03:30:30-0830", 30),
    ],
)
def test_a_reset(prefix: str, reset: str, seconds: float) -> None:
    """Read a reset in seconds from now, in (milli)seconds since 1970, or as a date and time in ISO 8601."""
    quota = lines("7", reset, prefix)
    assert quota is not None
    assert quota.remaining == 7
    assert quota.reset == pytest.approx(seconds, abs=1e-5)


@pytest.mark.parametrize("prefix", LINES)
@pytest.mark.parametrize(
    "reset",
    [
        "",
        "0",
        "-5",
        "+5",
        "86401",
        "1770811200",
        "1770811199",
        "1770897601",
        "1770811199999",
        "1770897600001",
        "99999999999",
        "9" * 20,
        "9" * 21,
        "1e3",
        "nan",
        "inf",
        "٣",
        "1,2",
        "30, 30;w=60",
        "1m",
        "soon",
        "2026-02-11T11:59:59Z",
        "2026-02-12T12:00:01Z",
        "2026-02-11",
        "2026-02-30T12:00:30Z",
        "2026-02-11T24:00:00Z",
        "2026-02-11T12:00:30+99:00",
        "2026-02-11T12:00:30 UTC",
        "0000-02-11T12:00:30Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
    ],
)
def test_an_implausible_reset_is_ignored(prefix: str, reset: str) -> None:
    """Ignore a header whose reset is malformed, over by now or more than a day ahead."""
    assert lines("0", reset, prefix) is None


@pytest.mark.parametrize("prefix", LINES)
@pytest.mark.parametrize(
    ("remaining", "expected"),
    [
        ("0", 0),
        (" 0\t", 0),
        ("007", 7),
        ("9" * 15, 10**15 - 1),
        ("9" * 16, None),
        ("", None),
        ("-1", None),
        ("+1", None),
        ("0.0", None),
        ("1_0", None),
        ("٣", None),
        ("²", None),
        ("0, 5", None),
        ("none", None),
    ],
)
def test_what_remains(prefix: str, remaining: str, expected: int | None) -> None:
    """Accept an integer of 0 or more, with at most 15 digits, as what remains."""
    assert lines(remaining, "30", prefix) == (None if expected is None else Quota(expected, 30))


@pytest.mark.parametrize("reset", ["1770796830", "1770796830000", "2026-02-11T08:00:30Z"])
def test_a_point_in_time_counts_from_the_replys_own_date(reset: str) -> None:
    """Compare a reset that is a point in time with the reply's Date, so that our own clock does not matter."""
    assert lines("0", reset, date="Wed, 11 Feb 2026 08:00:00 GMT") == Quota(0, 30)
    assert lines("0", reset, date="yesterday") is None


def test_the_headers_of_aspnetcoreratelimit() -> None:
    """Accept AspNetCoreRateLimit's period in the place of a limit."""
    limit = ("X-Rate-Limit-Limit", "1m")
    remaining, reset = ("X-Rate-Limit-Remaining", "0"), ("X-Rate-Limit-Reset", "2026-01-01T00:00:00.1234567Z")
    quota = read(limit, remaining, reset, ("Date", "Wed, 31 Dec 2025 23:59:00 GMT"))
    assert quota is not None
    assert quota.remaining == 0
    assert quota.reset == pytest.approx(60.123456, abs=1e-5)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Retry-After", "30"), ("Date", "Wed, 11 Feb 2026 12:00:00 GMT")],
        [("RateLimit-Policy", '"hour";q=100;w=3600')],
        [("RateLimit-Limit", "100, 100;w=60")],
        [("RateLimit-Limit", "100"), ("RateLimit-Reset", "30")],
        [("X-RateLimit-Remaining", "0")],
        [("X-RateLimit-Remaining", "0"), ("X-Rate-Limit-Reset", "30")],
    ],
)
def test_no_quota(headers: list[tuple[str, str]]) -> None:
    """Return no quota without a count and its reset."""
    assert read(*headers) is None


def test_the_most_restrictive_header_counts() -> None:
    """Use the most restrictive of several forms in one reply, as of a service and a gateway before it."""
    modern, limit = ("ratelimit", '"a";r=5;t=10'), ("x-ratelimit-remaining", "0")
    dotnet = [("x-rate-limit-remaining", "3"), ("x-rate-limit-reset", "20")]
    assert read(modern, limit, ("x-ratelimit-reset", "30"), *dotnet) == Quota(0, 30)
    assert read(modern, limit, ("x-ratelimit-reset", "never"), *dotnet) == Quota(3, 20)
    assert read(modern, ("ratelimit-remaining", "9"), ("ratelimit-reset", "30")) == Quota(5, 10)


def test_repeated_headers_pair_up() -> None:
    """Pair the two headers that each proxy on the way may add; one that has no partner is ignored."""
    remaining = [("X-RateLimit-Remaining", count) for count in ("7", "2", "0")]
    assert read(*remaining, ("X-RateLimit-Reset", "30"), ("X-RateLimit-Reset", "40")) == Quota(2, 40)


# --- cost


def test_only_a_ratelimit_header_imports_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a reply without a RateLimit header without http_sf, which takes its time to import."""
    monkeypatch.setitem(sys.modules, "http_sf", None)
    assert read(("Content-Type", "application/json"), ("RateLimit-Policy", '"a";q=1')) is None
    assert lines("0", "30") == Quota(0, 30)
    with pytest.raises(ModuleNotFoundError, match="http_sf"):
        combined('"a";r=0;t=30')


@pytest.mark.parametrize(
    "field",
    [
        '"a";r=0;t=5' + ',"a";r=0;t=5' * 25_000,
        '"a";r=0;t=5' + ";x" * 150_000,
        " " * 300_000,
        "(" + "1 " * 150_000 + ")",
        '"' + r"\\" * 150_000 + '"',
        "9" * 300_000,
        "2026-02-11T12:00:30." + "9" * 300_000,
        "a," * 150_000,
    ],
)
def test_a_huge_header_takes_no_time(field: str) -> None:
    """Read or ignore a header of 300 KiB, far above what aiohttp accepts, at once."""
    started = perf_counter()
    combined(field, policy=field)
    for prefix in LINES:
        lines(field, field, prefix)
        lines("0", field, prefix)
    assert combined(*[field[:100]] * 3_000) is None
    assert perf_counter() - started < 0.5


def test_a_long_field_is_ignored() -> None:
    """Read a RateLimit field up to 8,190 characters, the lines together."""
    padding = " " * (8190 - len('"a";r=0;t=5'))
    assert combined('"a";r=0;t=5' + padding) == Quota(0, 5)
    assert combined('"a";r=0;t=5' + padding + " ") is None


PIECES = st.sampled_from('0123456789-.:;,=?@%()"\\*TZ \té\udc80') | st.sampled_from(
    ['"a"', ";r=0", ";t=5", ";w=60", ";qu=", ";pk=:YQ==:", '%"%c3%a9"', "@99", "limit=5", "remaining=0", "reset=30"]
)
TIMES = st.sampled_from(["2026-02-11", "T12:00:30", "+23:59", "1770811230", "9" * 15, "0001-01-01", "9999-12-31"])
TEXT = st.lists(PIECES | TIMES, max_size=12).map("".join) | st.text(st.characters(exclude_categories=[]), max_size=30)
NAMES = ["RateLimit", "RateLimit-Policy", "Date", *(f"{p}-{end}" for p in LINES for end in ("Remaining", "Reset"))]


@given(st.lists(st.tuples(st.sampled_from(NAMES), TEXT | st.sampled_from(["0", "7", "30"])), max_size=8))
def test_any_headers_are_sane_or_ignored(headers: list[Any]) -> None:
    """Whatever is sent, there is no quota, or one with a count of 0 or more and a reset within a day."""
    quota = read(*headers)
    assert quota is None or (
        type(quota.remaining) is int and 0 <= quota.remaining < 10**15 and 0 < quota.reset <= 86400
    )
