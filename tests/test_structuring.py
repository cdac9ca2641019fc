"""Decoding the body of a 200 into models."""

import copy
import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import SAMPLES
from hypothesis import example, given
from hypothesis import strategies as st

from audiences_async import (
    AudiencesError,
    AudiencesResponse,
    DynamicAudience,
    InvalidResponseError,
    ServerError,
    StaticAudience,
    StatusError,
    TooManyRequestsError,
    UnknownAudience,
    structuring,
)
from audiences_async import _fast_path as fast_path
from audiences_async.structuring import MAX_PROBLEMS, decode, decode_in_steps, run_to_completion

STATIC = {"id": "1", "name": "one", "created_time": "2025-10-01T09:10:00Z", "user_count": 7, "type": "Static"}
DYNAMIC = {"id": "2", "name": "two", "created_time": "2025-10-01T09:10:00Z", "type": "Dynamic"}
WHEN = datetime(2025, 10, 1, 9, 10, tzinfo=UTC)
MORE = "$: there may be more problems; only the first are reported"


def body(*data: Any, **envelope: Any) -> bytes:
    """Return the body of a 200 with these records."""
    sent = {"status": "200", "description": "Audiences retrieved", "response_time": None, "data": list(data)}
    return json.dumps(sent | envelope).encode()


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a record without one of its fields."""
    return {field: value for field, value in row.items() if field != name}


def problems(wrong: bytes) -> tuple[str, ...]:
    """Return the problems of an invalid body."""
    with pytest.raises(InvalidResponseError) as caught:
        decode(wrong)
    return caught.value.problems


def test_both_arms_of_the_services_example() -> None:
    """The service page's own example has one Static and one Dynamic audience."""
    response = decode((SAMPLES / "200.json").read_bytes())
    assert response == AudiencesResponse(
        status=200,
        description="Audiences retrieved",
        response_time=datetime(2026, 2, 11, 12, tzinfo=UTC),
        data=(
            StaticAudience(id="31234", name="NE_USA-above50", created_time=WHEN, user_count=1542),
            DynamicAudience(id="45412", name="VIP", created_time=datetime(2025, 11, 1, 8, 30, tzinfo=UTC)),
        ),
    )


@pytest.mark.parametrize(("sample", "kind"), [("200-static", StaticAudience), ("200-dynamic", DynamicAudience)])
def test_each_arm_of_the_services_example(sample: str, kind: type[Any]) -> None:
    """Each record of the service page's example is read as its own class."""
    (audience,) = decode((SAMPLES / f"{sample}.json").read_bytes())
    assert isinstance(audience, kind)
    assert audience.type == kind.type


def test_unknown_type_is_kept_whole() -> None:
    """A type that this version does not know is an UnknownAudience with the whole record."""
    row = {"id": "3", "name": "three", "created_time": "2025-10-01T09:10:00Z", "type": "Lookalike", "seed": [1]}
    (audience,) = decode(body(row))
    assert audience == UnknownAudience(type="Lookalike", id="3", name="three", created_time=WHEN, raw=row)


def test_unknown_type_keeps_what_can_be_read() -> None:
    """An unreadable field of an unknown type is None, and still in raw."""
    row = {"id": 3, "name": None, "created_time": "soon", "type": "static"}
    (audience,) = decode(body(row))
    assert audience == UnknownAudience(type="static", raw=row)


def test_fields_beyond_the_documented_go_to_extra() -> None:
    """Extra fields are kept unchanged, whatever their name; a user_count on a Dynamic is one of them."""
    beyond = {"owner": {"id": 1}, "extra": 2, "count": 2**70, "share": 0.5}
    static, dynamic = decode(body(STATIC | beyond, DYNAMIC | {"user_count": "many"}))
    assert static == StaticAudience("1", "one", WHEN, 7, extra=beyond)
    assert dynamic == DynamicAudience("2", "two", WHEN, extra={"user_count": "many"})


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("2025-10-01T09:10:00Z", WHEN),
        ("2025-10-01 09:10:00", WHEN),
        ("2025-10-01T09:10", WHEN),
        ("2025-10-01T11:10:00+02:00", WHEN),
        ("2024-03-19T10:45:41.6038344Z", datetime(2024, 3, 19, 10, 45, 41, 603834, tzinfo=UTC)),
        ("2025-01-19T14:18:47.63079Z", datetime(2025, 1, 19, 14, 18, 47, 630790, tzinfo=UTC)),
        ("2024-10-30T13:23:33", datetime(2024, 10, 30, 13, 23, 33, tzinfo=UTC)),
        ("2024-09-17 07:43:59", datetime(2024, 9, 17, 7, 43, 59, tzinfo=UTC)),
    ],
)
def test_created_time_in_every_form_seen(sent: str, expected: datetime) -> None:
    """Every form of time that the vendor publishes is read, and is aware and in UTC."""
    (audience,) = decode(body(STATIC | {"created_time": sent}))
    assert audience.created_time == expected
    assert audience.created_time.tzinfo is UTC


@pytest.mark.parametrize(
    "sent",
    [
        "2025-10-01",
        "2025-10-01T09:10:00z",
        "20251001T091000Z",
        "2025-W40-3T09:10",
        "09:10:00",
        "2025-13-01T00:00:00Z",
        "0001-01-01T00:00+01:00",
        "2025-10-01T09:10:00+99:00",
        "٢٠٢٥-10-01T09:10:00Z",
        "",
        " 2025-10-01T09:10:00Z",
        "/Date(1759309800000)/",
    ],
)
def test_created_time_that_is_no_date_and_time(sent: str) -> None:
    """A date without a time, another calendar form or an impossible time is a problem."""
    assert problems(body(STATIC | {"created_time": sent})) == (
        f"$.data[0].created_time: expected a date and time in ISO 8601, got {sent!r}",
    )


@pytest.mark.parametrize(
    ("name", "sent", "told"),
    [
        ("id", "", "expected a non-empty string, got ''"),
        ("id", 31234, "expected a non-empty string, got 31234"),
        ("id", None, "expected a non-empty string, got null"),
        ("name", True, "expected a string, got true"),
        ("name", ["x"], "expected a string, got an array"),
        ("created_time", 1759309800, "expected a date and time in ISO 8601, got 1759309800"),
        ("user_count", "abc", "expected an integer, got 'abc'"),
        ("user_count", "100", "expected an integer, got '100'"),
        ("user_count", 100.0, "expected an integer, got 100.0"),
        ("user_count", False, "expected an integer, got false"),
        ("user_count", None, "expected an integer, got null"),
        ("user_count", {}, "expected an integer, got an object"),
        ("user_count", -1, "expected an integer of 0 or more, got -1"),
        ("type", "", "expected a non-empty string, got ''"),
        ("type", 1, "expected a non-empty string, got 1"),
        ("type", "x" * 41, None),
        ("name", "x" * 41, None),
        ("user_count", "x" * 41, "expected an integer, got a string of 41 characters"),
    ],
)
def test_a_field_of_another_type_is_a_problem(name: str, sent: Any, told: str | None) -> None:
    """Nothing is coerced: a field of another type is reported with its path, and long text is not repeated."""
    if told is None:
        assert len(decode(body(STATIC | {name: sent}))) == 1
    else:
        assert problems(body(DYNAMIC, STATIC | {name: sent})) == (f"$.data[1].{name}: {told}",)


@pytest.mark.parametrize("name", ["id", "name", "created_time", "user_count", "type"])
def test_a_missing_field_is_a_problem(name: str) -> None:
    """Each documented field is required."""
    assert problems(body(without(STATIC, name))) == (f"$.data[0].{name}: missing",)


@pytest.mark.parametrize("row", [None, 1, "x", [], [STATIC]])
def test_a_record_that_is_no_object_is_a_problem(row: Any) -> None:
    """A record must be an object."""
    assert problems(body(STATIC, row))[0].startswith("$.data[1]: expected an object, got ")


def test_every_problem_is_told_with_its_path() -> None:
    """All problems of a body are reported, not only the first."""
    wrong = body({"type": "Static", "id": ""}, STATIC, {"type": None}, status="soon", description=1)
    assert problems(wrong) == (
        "$.status: expected an HTTP status, got 'soon'",
        "$.description: expected a string, got 1",
        "$.data[0].id: expected a non-empty string, got ''",
        "$.data[0].name: missing",
        "$.data[0].created_time: missing",
        "$.data[0].user_count: missing",
        "$.data[2].type: expected a non-empty string, got null",
    )


def test_problems_have_a_sensible_number() -> None:
    """A body of a thousand wrong records reports the first problems, and that there may be more."""
    told = problems(body(*[{}] * 1000))
    assert len(told) == MAX_PROBLEMS + 1
    assert told[-1] == MORE


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (b"", "$: the body is empty"),
        (b"<html>", "$: not JSON: JSON is malformed: invalid character (byte 0)"),
        (b"[" * 100_000, "$: not JSON: nested too deeply"),
        (b'{"status": "200", "data": [', "$: not JSON: Input data was truncated"),
        (b'{"a": "\xff"}', "$: not JSON: not UTF-8: invalid start byte"),
        ("{}".encode("utf-16"), "$: not JSON: not UTF-8: invalid start byte"),
        (b"[NaN]", "$: not JSON: JSON is malformed: invalid character (byte 1)"),
        (b"[]", "$: expected an object, got an array"),
        (b"null", "$: expected an object, got null"),
    ],
)
def test_a_body_that_is_no_json_object(wrong: bytes, told: str) -> None:
    """A body that is not a JSON object is one problem at the root."""
    assert problems(wrong) == (told,)


@pytest.mark.parametrize("number", [b"1e400", b"9" * 5000])
def test_a_number_beyond_reading_is_a_problem(number: bytes) -> None:
    """A number that Python cannot hold is a problem, not another exception."""
    assert problems(b'{"data": [], "status": ' + number + b"}") == (
        "$.status: expected an HTTP status, got a number out of range",
    )


def test_what_is_ignored_is_not_decoded() -> None:
    """An undocumented member of the envelope must be JSON, and is otherwise ignored."""
    ignored = b'"x": 1e400, "y": ' + b"9" * 5000 + b', "z": [{}, "\\ud83d\\ude00"]'
    assert len(decode(b'{"status": 200, ' + ignored + b', "data": []}')) == 0
    assert problems(b'{"status": 200, "x": [1,], "data": []}')[0].startswith("$: not JSON: ")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"1", ("$.data[1]: Expected `object`, got `int`",)),
        (b"[]", ("$.data[1]: Expected `object`, got `array`",)),
        (b"{}", (*(f"$.data[{n}].type: missing" for n in range(1, MAX_PROBLEMS + 1)), MORE)),
    ],
)
def test_many_rows_that_are_no_audiences(row: bytes, told: tuple[str, ...]) -> None:
    """A body full of tiny values is refused at the first, in little more memory than its own size."""
    wrong = b'{"status":"200","data":[{"type":"New"},' + b",".join([row] * 2_000_000) + b"]}"
    tracemalloc.start()
    try:
        assert problems(wrong) == told
        assert tracemalloc.get_traced_memory()[1] < 3 * len(wrong)
    finally:
        tracemalloc.stop()


def test_many_rows_behind_one_that_is_long() -> None:
    """If a long record hides the ends of the others, the first invalid one is still reported."""
    start = b'{"status":"200","data":[{"type":"New","id":"a"},{"type":"New","x":[' + b"{}," * 600_000 + b"{}]}"
    assert [audience.id for audience in decode(start + b',{"type":"New"}]}')] == ["a", None, None]
    assert problems(start + b',{"type":0}]}') == ("$.data[2].type: Expected `str`, got `int`",)
    start = b'{"status":"200","data":[{"type":0,"x":[' + b"{}," * 600_000 + b"{}]}"
    assert problems(start + b',{"type":"New"}' * 100_000 + b"]}") == ("$.data[0].type: Expected `str`, got `int`",)


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
def test_many_small_rows() -> None:
    """A body full of audiences that have only a type is read, too."""
    crammed = b'{"status":"200","data":[' + b",".join([b'{"type":"New"}'] * 80_000) + b"]}"
    assert {audience.type for audience in decode(crammed)} == {"New"}
    assert problems(b'{"status":"200","data":{"type":[' + b"0," * 600_000 + b"0]}}") == (
        "$.data: expected an array, got an object",
    )


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
def test_rows_of_uneven_length_are_decoded_in_steps() -> None:
    """A few long rows among many short ones are decoded in steps, and every row keeps its place."""
    long = json.dumps({"type": "New", "x": "y" * 100_000}).encode()
    rows = [b'{"type":"New","x":"%d"}' % number for number in range(20_000)] + [long] * 20
    uneven = b'{"status":"200","data":[' + b",".join(rows) + b"]}"
    assert [audience.to_dict() for audience in decode(uneven)] == [json.loads(row) for row in rows]
    assert sum(1 for _ in decode_in_steps(uneven)) > len(uneven) / (128 * 1024)


def test_a_number_beyond_reading_in_a_record() -> None:
    """Such a number in a record is a problem of that record."""
    wrong = b'{"status": 200, "data": [{"type": "Static", "user_count": 1e400}]}'
    assert problems(wrong) == ("$.data[0].user_count: expected a number in range, got a number out of range",)


def test_no_record_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is unreadable for a reason outside itself is a problem too."""
    monkeypatch.setattr(structuring, "date_and_time", Mock(side_effect=[MemoryError, WHEN]))
    assert problems(body(STATIC | {"created_time": "2025-10-01T09:10:00.1234567Z"})) == ("$.data[0]: cannot be read",)


@pytest.mark.parametrize("data", [None, {}, "", 0])
def test_data_must_be_an_array(data: Any) -> None:
    """A null or other data is a problem, never an empty answer."""
    assert problems(body(data=data))[0].startswith("$.data: expected an array, got ")
    assert problems(b'{"status": "200"}') == ("$.data: missing",)


@pytest.mark.parametrize("sent", ["200", 200, "201", 204])
def test_status_as_text_or_integer(sent: Any) -> None:
    """The envelope's status is an int, whether it was sent as a string or as an integer."""
    assert decode(body(status=sent)).status == int(sent)


@pytest.mark.parametrize("sent", [None, True, 200.0, "", "2oo", "²00", "-200", 99, "9" * 10, []])
def test_status_that_is_none(sent: Any) -> None:
    """Any other value than an HTTP status is a problem, and so is a missing one."""
    assert problems(body(status=sent))[0].startswith("$.status: expected an HTTP status, got ")
    assert problems(b'{"data": []}') == ("$.status: missing",)


@pytest.mark.parametrize(("sent", "kind"), [("429", TooManyRequestsError), (503, ServerError), (302, StatusError)])
def test_an_error_in_the_envelope_of_a_200(sent: Any, kind: type[StatusError]) -> None:
    """An envelope status of 300 or more is that error, whatever the data."""
    with pytest.raises(kind) as caught:
        decode(body(status=sent, description="slow down", response_time="2025-02-06T07:51:52.258Z", data=None))
    assert (caught.value.status, caught.value.description) == (int(sent), "slow down")
    assert caught.value.response_time == datetime(2025, 2, 6, 7, 51, 52, 258000, tzinfo=UTC)


@pytest.mark.parametrize("read", [decode, structuring.data_of])
def test_an_error_keeps_the_start_of_its_body(read: Callable[[bytes], object]) -> None:
    """Keep 64 KiB of a body on the error of its envelope's own status."""
    with pytest.raises(ServerError) as caught:
        read(body(status=500, description="x" * 100_000))
    assert len(caught.value.body) == 64 * 1024


def test_lenient_envelope() -> None:
    """A BOM, a missing description, an unreadable response_time and unknown fields are accepted."""
    response = decode(b'\xef\xbb\xbf{"status": 200, "data": [], "response_time": "now", "next": 1}')
    assert response == AudiencesResponse(200, "", None, ())
    assert decode(body(description=None)).description == ""


def test_record_is_the_services_own() -> None:
    """An audience turns back into the record that the service sent, extra fields included."""
    unknown = {"type": "New", "id": "9", "x": 1}
    rows = [STATIC | {"owner": "me"}, DYNAMIC, unknown]
    assert [audience.to_dict() for audience in decode(body(*rows))] == rows


def test_record_of_a_time_in_another_zone() -> None:
    """Times are written in UTC with a Z, microseconds kept."""
    there = datetime(2025, 1, 1, 12, 0, 0, 5, tzinfo=timezone(timedelta(hours=2)))
    (audience,) = decode(body(DYNAMIC | {"created_time": there.isoformat()}))
    assert audience.to_dict()["created_time"] == "2025-01-01T10:00:00.000005Z"


def test_a_large_body_is_decoded_in_steps() -> None:
    """A body of any size is decoded in steps, with the same audiences and paths as in one step."""
    many = [STATIC | {"id": str(number)} for number in range(5000)]
    steps = decode_in_steps(body(*many))
    assert sum(1 for _ in steps) > 4
    assert [audience.id for audience in decode(body(*many))] == [row["id"] for row in many]
    many[4321] = STATIC | {"id": None}
    assert problems(body(*many)) == ("$.data[4321].id: expected a non-empty string, got null",)


def test_what_is_shared_cannot_be_changed() -> None:
    """Audiences without further fields share one empty extra, which is immutable and survives copies."""
    one, other = decode(body(STATIC, DYNAMIC))
    assert not isinstance(one, UnknownAudience)
    assert not isinstance(other, UnknownAudience)
    assert one.extra is other.extra is copy.deepcopy(one).extra is pickle.loads(pickle.dumps(one)).extra
    assert (one.extra, json.dumps(one.extra)) == ({}, "{}")
    extra: Any = one.extra
    with pytest.raises(TypeError, match="this mapping cannot be changed"):
        extra["x"] = 1
    with pytest.raises(TypeError):
        extra.update(x=1)
    with pytest.raises(TypeError):
        extra.setdefault("x", 1)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
rows = st.fixed_dictionaries(
    {"id": st.text(min_size=1), "name": st.text(), "created_time": st.datetimes().map(datetime.isoformat)},
    optional={"owner": json_values, "extra": json_values},
)
statics = st.builds(lambda row, n: {**row, "user_count": n, "type": "Static"}, rows, st.integers(0, 2**70))
dynamics = rows.map(lambda row: {**row, "type": "Dynamic"})


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
@given(st.lists(statics | dynamics, max_size=5))
def test_every_valid_record_comes_back_unchanged(data: list[dict[str, Any]]) -> None:
    """Any valid records give as many audiences, equal to the records."""
    read = [audience.to_dict() for audience in decode(body(*data))]
    assert [without(row, "created_time") for row in read] == [without(row, "created_time") for row in data]
    times = [datetime.fromisoformat(row["created_time"]).replace(tzinfo=None) for row in read]
    assert times == [datetime.fromisoformat(row["created_time"]) for row in data]


mutations = st.sampled_from(["id", "name", "created_time", "user_count", "type", "extra"])


@given(st.dictionaries(mutations, json_values), st.booleans())
def test_any_json_record_is_read_or_refused(change: dict[str, Any], drop: bool) -> None:
    """A record of any JSON at all gives an audience or problems below its path, never another exception."""
    row = dict(change) if drop else STATIC | change
    try:
        (audience,) = decode(body(row))
    except InvalidResponseError as error:
        assert error.problems
        assert all(problem.startswith("$.data[0].") for problem in error.problems)
    else:
        assert audience.type == row["type"]


odd_times = st.sampled_from(
    ["2025-10-01T09:10:00Z", "2025-10-01 09:10", "2025-10-01T09:10:00.1234567+02:00", "2025-10-01T09:10:00+01:60",
     "2025-10-01T09:10:00.9999999Z", "2025-10-01T09:10:00.123456Z", "2025-10-01t09:10:00Z", "2025-10-01 09:10:00z",
     "2025-10-01T09:10:00Z\n2025-10-01T09:10:00Z", "2025-02-30T00:00:00Z", "0001-01-01T00:00:00+00:01", "", "soon"]
)  # fmt: skip
near_rows = st.builds(
    lambda row, change, gone: {name: value for name, value in (row | change).items() if name not in gone},
    statics | dynamics | st.builds(lambda row, time: row | {"created_time": time}, statics, odd_times),
    st.just({}) | st.dictionaries(mutations, json_values | odd_times, max_size=2),
    st.sets(mutations, max_size=1),
)
envelopes = st.fixed_dictionaries(
    {"data": st.lists(near_rows | json_values, max_size=4) | json_values},
    optional={
        "status": st.sampled_from(["200", 200, 503, True, None]),
        "description": json_values,
        "next": json_values,
    },
)


# Text that looks like the end of a record, and ends that look otherwise.
ends_within = st.text('},{ "\\[]', max_size=12)
misleading_rows = st.builds(
    lambda row, name, beyond: row | {"name": name} | beyond,
    statics | dynamics | st.just({"type": "New"}),
    ends_within,
    st.just({}) | st.dictionaries(ends_within, st.lists(st.just({}) | ends_within, max_size=3), max_size=2),
)
layouts = st.sampled_from([(None, (",", ":")), (None, (" , ", ": ")), (2, (",", ": ")), (1, ("\n,", ":"))])


@pytest.mark.long
@pytest.mark.once
@pytest.mark.slow
@given(
    st.builds(
        lambda rows, wrong, layout: json.dumps(
            {"status": 200, "data": [*rows, *wrong, *rows]}, indent=layout[0], separators=layout[1]
        ).encode(),
        st.lists(misleading_rows, max_size=12),
        st.just([]) | st.just([{"type": 0}]),
        layouts,
    ),
    st.integers(1, 200),
)
def test_an_array_is_read_the_same_wherever_it_is_cut(sent: bytes, step: int) -> None:
    """Records with braces and brackets in them are read the same, whatever the size of a step."""
    assert verdict(sent, step) == verdict(sent)


@given(envelopes.map(lambda sent: json.dumps(sent).encode()) | st.lists(near_rows, max_size=6).map(lambda r: body(*r)))
def test_every_way_through_reads_the_same(sent: bytes) -> None:
    """The fast path, the stepwise path and the reference alone have the same answer or the same error."""
    steps = (1, 50, 1 << 20)
    ways = [verdict(sent), *(verdict(sent, step) for step in steps)]
    with without_fast_path():
        ways += [verdict(sent, step) for step in steps]
    assert ways == [ways[0]] * 7


times = st.builds(
    lambda *parts: "".join(parts),
    st.sampled_from(["2025-10-01", "0001-01-01", "9999-12-31", "2025-02-29"]),
    st.sampled_from("TTt "),
    st.sampled_from(["09:10:00", "23:59:59", "24:00:00", "09:10:60", "09:10"]),
    st.just("") | st.text("059", max_size=9).map(lambda digits: f".{digits}"),
    st.sampled_from(["Z", "z", "", "+02:00", "-0130", "+01:60"]),
)
escaped = st.builds(
    lambda text, at: "".join(f"\\u{ord(c):04x}" if n in at else c for n, c in enumerate(text)),
    times,
    st.sets(st.integers(0, 30), max_size=2),
)


@example(["2025-10-01T09:10:00.1234567Z"])
@example(["2025-10-01T09:10:00\\u002e1234567Z"])
@example(["2025-10-01t09:10:00Z"])
@example(["2025-10-01\\u007409:10:00Z"])
@example(["2025-10\\u002D01t09:10:00Z"])
@example(["2025-10-01T09:10:00z"])
@example(["2025-10-01T09:10:00\\u007A"])
@given(st.lists(times | escaped, min_size=1, max_size=2))
def test_every_way_reads_a_time_the_same(sent: list[str]) -> None:
    """For any letters, digits and escapes, a time is the same by the fast path and by the reference."""
    text = body(*(DYNAMIC | {"created_time": f"<{n}>"} for n in range(len(sent)))).decode()
    for n, time in enumerate(sent):
        text = text.replace(f"<{n}>", time)
    short = verdict(text.encode())
    with without_fast_path():
        assert verdict(text.encode()) == short


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Leave every record to the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structuring, "decode_plain", lambda _: None)
        patch.setattr(fast_path, "plain_audiences", lambda _: None)
        yield


def verdict(sent: bytes, step: int | None = None) -> Any:
    """Return the answer with its classes and hashes, or all fields of the error.

    Args:
        sent: The body.
        step: Bytes decoded without yielding; ``None`` decodes the body as a caller does.
    """
    try:
        response = decode(sent) if step is None else run_to_completion(decode_in_steps(sent, step=step))
    except StatusError as error:
        return type(error), error.status, error.description
    except InvalidResponseError as error:
        return error.problems
    assert pickle.loads(pickle.dumps(response)) == response
    return response, repr(response), [(type(audience), hash(audience)) for audience in response]


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(sent: bytes) -> None:
    """Any body at all gives a response or one of our errors."""
    try:
        decode(sent)
    except AudiencesError as error:
        assert isinstance(error, InvalidResponseError | StatusError)
