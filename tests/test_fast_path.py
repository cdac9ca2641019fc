"""The fast path: which bodies and arrays it reads, and the places at which it cuts an array."""

import json
from typing import Any

import pytest
from conftest import SAMPLES
from msgspec import DecodeError, Raw

from audiences_async._fast_path import STEP, decode_plain, parts, plain_audiences
from audiences_async.structuring import decode

STATIC = {"id": "1", "name": "one", "created_time": "2025-10-01T09:10:00Z", "user_count": 7, "type": "Static"}
DYNAMIC = {"id": "2", "name": "two", "created_time": "2025-10-01T09:10:00+02:00", "type": "Dynamic"}


def test_the_services_example_is_plain() -> None:
    """Read the service page's own example by the fast path as `decode` does."""
    sample = (SAMPLES / "200.json").read_bytes()
    assert decode_plain(sample) == decode(sample) is not None


@pytest.mark.parametrize(
    "envelope",
    [{"status": "201"}, {"status": 503}, {"next": 1}, {"data": None}, {"response_time": "now"}, {"description": 1}],
)
def test_any_other_envelope_is_left_to_the_reference(envelope: dict[str, Any]) -> None:
    """Leave every other status, undocumented member and unreadable one to the reference."""
    assert decode_plain(json.dumps({"status": 200, "data": [STATIC]} | envelope).encode()) is None


def test_a_large_body_is_left_to_the_steps() -> None:
    """Leave a body that takes more than one step to the stepwise path."""
    body = json.dumps({"status": 200, "data": [STATIC]}).encode()
    assert decode_plain(body.ljust(STEP)) is not None
    assert decode_plain(body.ljust(STEP + 1)) is None


@pytest.mark.parametrize(
    "change",
    [{"owner": 1}, {"id": ""}, {"user_count": -1}, {"type": "New"}, {"created_time": "2025-10-01T09:10:00.1234567Z"}],
)
def test_an_array_with_any_other_record_is_left_to_the_reference(change: dict[str, Any]) -> None:
    """Treat an array as plain if all of its records are: documented fields only, each of its type."""
    assert plain_audiences(json.dumps([STATIC, DYNAMIC]).encode()) is not None
    assert plain_audiences(json.dumps([STATIC, DYNAMIC, STATIC | change]).encode()) is None


def test_a_static_record_without_a_count_is_not_plain() -> None:
    """Let only a dynamic audience lack user_count; one that has it keeps it in extra."""
    assert plain_audiences(json.dumps([DYNAMIC | {"type": "Static"}]).encode()) is None
    (audience,) = plain_audiences(json.dumps([DYNAMIC | {"user_count": 3}]).encode()) or [None]
    assert audience is not None
    assert audience == decode(json.dumps({"status": 200, "data": [DYNAMIC | {"user_count": 3}]}).encode()).data[0]


def test_an_array_is_cut_where_records_end() -> None:
    """Give each part whole records, as audiences if all are plain, else as raw JSON, and the index of its first."""
    rows = [STATIC, DYNAMIC, STATIC | {"owner": 1}, STATIC]
    found = list(parts(Raw(json.dumps(rows).encode()), [], step=1))
    assert [(first, len(plain), [json.loads(bytes(row)) for row in raw]) for first, plain, raw in found] == [
        (0, 1, []),
        (1, 1, []),
        (2, 0, [rows[2]]),
        (3, 1, []),
    ]


def test_a_cut_inside_a_record_is_tried_further_on() -> None:
    """Where text only looks like the end of a record, an empty part gives the caller a pause."""
    array = json.dumps([STATIC | {"name": "}," * 50}]).encode()
    assert [(first, len(plain), len(rows)) for first, plain, rows in parts(Raw(array), [], step=60)] == [
        (0, 0, 0),
        (0, 0, 1),
    ]


def test_what_is_no_array_is_not_cut() -> None:
    """Text that no cut makes an array is malformed."""
    with pytest.raises(DecodeError):
        list(parts(Raw(b"[{},nonsense]"), []))
