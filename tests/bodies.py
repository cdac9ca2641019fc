"""Seeded response bodies, valid and hostile, and the checks that every one of them must pass.

``python tests/bodies.py [--count 200000] [--seed N]`` decodes many of them; it exits with 1 if a check fails. ``python
tests/bodies.py --seed N --index I`` prints one of them. In a clone whose package is not installed, set
``PYTHONPATH=.``.
"""

import argparse
import json
import math
import pickle
import re
import sys
import time as clock
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from random import Random, SystemRandom
from typing import Any, Final

import contract
from attrs import define, field, frozen
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async import (
    AudiencesError,
    AudiencesResponse,
    BadRequestError,
    ForbiddenError,
    InvalidResponseError,
    NotFoundError,
    ResponseTooLargeError,
    ServerError,
    StatusError,
    TooManyRequestsError,
    UnauthorizedError,
    UnknownAudience,
)
from audiences_async._http.wire import Reply, read, read_plain
from audiences_async.credentials import ApiKey
from audiences_async.structuring import decode

MAX_DEPTH: Final = 200
"""Greater nesting of a JSON value is a problem, on every Python."""

_DEPTH_SLACK: Final = 3  # levels: the envelope, `data` and the record may or may not count
_KEY: Final = ApiKey("s3cr3t-k3y-of-north")
_NOW: Final = 1_761_030_480.0
_HEADERS: Final = CIMultiDictProxy(CIMultiDict({"Content-Type": "application/json"}))
_BOM: Final = b"\xef\xbb\xbf"

# --- values, as JSON text

_NUMBERS: Final = (
    *("0", "-0", "1", "-1", "7", "200", "1.0", "0.0", "-0.0", "100.0", "0.1", "1e0", "1E+2", "2e2", "-1e-1", "8.5e-5"),
    *(
        "1e999",
        "-1e400",
        "1E+999",
        "1e309",
        "-1e309",
        "1e999999999999999999999",
        "0e999999",
        "-0e999999",
        "0.0e-999999",
    ),
    *("1e-400", "-1e-400", "1e-999999999999999999999", "4.9e-324", "2.4e-324", "2.5e-324", "2.2250738585072011e-308"),
    *(
        "1.7976931348623157e308",
        "1.7976931348623158e308",
        "1.7976931348623159e308",
        "9007199254740993.0",
        "1e22",
        "1e23",
    ),
    *(str(2**power + off) for power in (31, 32, 53, 63, 64, 127, 128) for off in (-1, 0, 1)),
    *(str(-(2**power) + off) for power in (63, 64) for off in (-1, 0, 1)),
    *("123456789012345678901234567890", "9" * 40, "1" + "0" * 308, "1" + "0" * 309, "-" + "9" * 400),
)
_NO_NUMBERS: Final = (
    *("01", "-01", "00", "0200", "+1", ".5", "1.", "-", "1e", "1e+", "1.e5", "0x10", "1_000", "--1", "1e9.5", "٣"),
    *("NaN", "Infinity", "-Infinity", "nan", "inf", "1,0", "1 0", "0" * 5000, "0" + "9" * 4400),
)
_INTEGER_DIGITS: Final = (2, 3, 17, 18, 19, 20, 21, 39, 40, 308, 309, 310, 400, 4299, 4300, 4301, 5000)
_TEXTS: Final = (
    *(
        "",
        "",
        "a",
        "VIP",
        "Static",
        "Dynamic",
        "200",
        "null",
        "true",
        "1e999",
        "NaN",
        "$",
        "$.data[0]",
        "id",
        "x" * 300,
    ),
    *("🦊", "\u202e", "\u2028", "\ufeff", "\uffff", "e\u0301", "שלום", "\x7f", "\x80", "a b", "/", "//", "%s{}"),
    *('}, {"type": "Static"', "[[[[", "]}", "},", "} ,", '"', "\\", "\\\\", "\n", "\r\n\t\b\f", "\0", "\x1b[31m"),
    *("2025-10-01T09:10:00Z", "audiences_async:extra", "\0extra", "__class__", "extra", "raw", "self"),
)
_RAW_STRINGS: Final = (
    *('"\\ud800"', '"\\udc00"', '"\\ud800\\u0041"', '"\\udc00\\ud800"', '"\\ud83e\\udd8a"', '"\\uD83E\\uDD8A"'),
    *(
        '"\\u0000"',
        '"\\u00e9"',
        '"\\/"',
        '"\\u002F"',
        '"\\x41"',
        '"\\u12"',
        '"\\u12g4"',
        '"\\"',
        '"\\',
        '"',
        '"\\ud83e',
    ),
    *('"\x00"', '"\n"', '"\t"', '"\x1f"', '"\udc80"', '"\ud800"', '"a\udcff"', "'a'", '"\\ud83e\\ud83e\\udd8a"'),
)
_LITERALS: Final = ("null", "null", "true", "false", "{}", "[]", '""', "[[]]", '{"": null}', "[{}]", "[null]")
_NO_LITERALS: Final = (
    "undefined",
    "None",
    "True",
    "NULL",
    "nul",
    "",
    ",",
    "/**/1",
    "1 //",
    "[1,]",
    '{"a":1,}',
    "{1:2}",
)

_MEMBERS: Final = ("status", "description", "response_time", "data")
_FIELDS: Final = ("id", "name", "created_time", "user_count", "type")
_NAMES: Final = (
    *_FIELDS,
    *_MEMBERS,
    "owner",
    "x",
    "",
    "extra",
    "raw",
    "audiences_async:extra",
    "Type",
    "id ",
    "\0",
    "é",
)
_GOOD_STATUSES: Final = ("200", '"200"', "200", '"200"', "201", '"204"', "299", "100", '"100"', '"299"')
_BAD_STATUSES: Final = (
    *("300", '"302"', "399", "400", '"401"', "403", '"404"', "408", "418", '"429"', "429", "500", '"503"', "599"),
    *("0", "99", "600", "999", "-1", "-200", "1000", '"0"', '"99"', '"600"', '"999"', '"1000"', '"-200"', '"+200"'),
    *("9" * 40, f'"{"9" * 40}"', "1" + "0" * 5000, f'"{"9" * 5000}"', str(2**64 + 200), str(2**63), "1e999", "-1e400"),
    *("200.0", "2e2", "2E+2", "-0", "true", "false", "null", '""', '"OK"', '"2oo"', '"0200"', '" 200"', '"200 "'),
    *('"200\\n"', '"²00"', '"٢٠٠"', '"2_0"', '"2\\u00300"', '"50\\u0030"', '"200.0"', "[]", "{}", "[200]", '{"a":1}'),
)
_TYPES: Final = ('"Static"', '"Static"', '"Dynamic"', '"Dynamic"', '"Lookalike"', '"static"', '"Static "', '"🦊"')
_ODD_TYPES: Final = ('""', "null", "1", "[]", "{}", '["Static"]', "true", '"S\\u0074atic"', '"Dynami\\u0063"', "1e999")

_YEARS: Final = ("0000", "0001", "1582", "1899", "1900", "1969", "1970", "2024", "2025", "2025", "2038", "9999", "9999")
_MONTHS: Final = ("00", "01", "02", "10", "12", "12", "13", "1")
_DAYS: Final = ("00", "01", "01", "28", "29", "30", "31", "31", "32", "1")
_HOURS: Final = ("00", "00", "09", "12", "23", "23", "24", "24", "25", "9")
_SIXTIES: Final = ("00", "00", "10", "59", "59", "60", "61", "5")
_SEPARATORS: Final = ("T", "T", "T", "T", " ", " ", "t", "t", "", "_", "  ", "\t", "\u00a0", "T ")
_ZONES: Final = (
    *("", "Z", "Z", "Z", "z", "z", "+00:00", "-00:00", "+02:00", "-1130", "+23:59", "-23:59", "+24:00", "-24:00"),
    *("+05:60", "+05:99", "+5", "+05", "+0530", "+05:3", " Z", "Z ", "UTC", "GMT", "+00:00:30", "\u221202:00", "[UTC]"),
)
_TIMES: Final = (
    *("2025-10-01", "2025-10-01T", "20251001T091000Z", "2025-W40-3T09:10:00Z", "2025-274T09:10:00Z", "09:10:00"),
    *(
        "2025-10-01T24:00:00Z",
        "2025-10-01T24:00Z",
        "9999-12-31T24:00:00Z",
        "2025-10-01T23:59:60Z",
        "2016-12-31T23:59:60Z",
    ),
    *("0000-01-01T00:00:00Z", "0001-01-01T00:00:00+00:01", "0001-01-01T00:00:00-00:01", "9999-12-31T23:59:59-00:01"),
    *("9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59+23:59", "2025-02-29T00:00:00Z", "1900-02-29T00:00Z"),
    *("2025-10-01T09:10:00,5Z", "2025-10-01T09:10:00.Z", "2025-10-01T09:10.5Z", "2025-10-01T09Z", "2025-10-01T0910Z"),
    *(
        "٢025-10-01T09:10:00Z",
        "+2025-10-01T09:10:00Z",
        "-2025-10-01T09:10:00Z",
        "1759309800",
        "",
        "now",
        " 2025-10-01T00:00",
    ),
    *("2025-10-01T09:10:00Z\n", "2025-10-01T09:10:00Z\0", "2025-10-01T09:10:00+02:00Z", "2025-10-01T09:10:00ZZ"),
)
_PLAIN_TIMES: Final = (
    *("2025-10-01T09:10:00Z", "2025-10-01T09:10:00.123456Z", "2025-10-01T09:10:00+02:00", "2025-10-01 09:10:00"),
    *("2025-10-01T09:10Z", "2025-10-01T09:10:00.1234567891-0230", "2025-10-01T09:10"),
)
_TIME_CHARACTERS: Final = (
    "\0",
    "\0",
    "",
    " ",
    "\n",
    "Z",
    "z",
    "t",
    "T",
    ":",
    ".",
    ",",
    "-",
    "+",
    "0",
    "9",
    "W",
    "\u0662",
    "\xb2",
)


def number(draw: Random) -> str:
    """Draw a number that JSON allows, of any size and spelling."""
    way = draw.random()
    if way < 0.6:
        return draw.choice(_NUMBERS)
    sign = draw.choice(("", "", "-"))
    if way < 0.8:
        return sign + _digits(draw, draw.choice(_INTEGER_DIGITS) if way < 0.65 else draw.randrange(1, 25))
    whole = _digits(draw, draw.choice((1, 1, 2, 17, 25, 400 if way < 0.82 else 3)))
    fraction = f".{draw.randrange(10 ** draw.choice((1, 3, 17, 40)))}" if draw.random() < 0.7 else ""
    exponent = f"{draw.choice('eE')}{draw.choice(('', '+', '-'))}{draw.randrange(340)}" if draw.random() < 0.7 else ""
    return sign + whole + fraction + exponent


def _digits(draw: Random, count: int) -> str:
    # A few digits, repeated, because drawing 5,000 of them is slow.
    some = str(draw.randrange(1, 10**6))
    return (some * (count // len(some) + 1))[:count]


def text(draw: Random) -> str:
    """Draw a JSON string, or occasionally an invalid one."""
    way = draw.random()
    if way < 0.05:
        return draw.choice(_RAW_STRINGS)
    words = draw.choice(_TEXTS) if way < 0.6 else draw.choice(_TEXTS) + draw.choice(_TEXTS)
    return quoted(draw, words)


def quoted(draw: Random, words: str) -> str:
    """Spell some text as a JSON string, in one of the ways that JSON allows."""
    way = draw.random()
    if way < 0.9 or not words:
        return json.dumps(words, ensure_ascii=way < 0.4)
    at = draw.randrange(len(words))
    if ord(words[at]) > 0xFFFF:
        return json.dumps(words)
    escape = f"\\u{ord(words[at]):04{draw.choice('xX')}}"
    return json.dumps(words[:at])[:-1] + escape + json.dumps(words[at + 1 :])[1:]


def time(draw: Random) -> str:
    """Draw a time as a JSON string: a plain one, an edge case, or an invalid one."""
    way = draw.random()
    if way < 0.4:
        return f'"2025-1{draw.randrange(3)}-{draw.randrange(10, 31)}T{draw.randrange(10, 24)}:10:00Z"'
    if way < 0.55:
        return quoted(draw, draw.choice(_TIMES))
    if way < 0.65:
        plain = draw.choice(_PLAIN_TIMES)
        at = draw.randrange(len(plain) + 1)
        return quoted(draw, plain[:at] + draw.choice(_TIME_CHARACTERS) + plain[at + draw.randrange(2) :])
    # Most parts are plain, so that one part's edge case is not hidden by another's error.
    year = draw.choice(_YEARS)
    month, day = _mostly(draw, "12", _MONTHS), _mostly(draw, "31", _DAYS)
    hour, minute = _mostly(draw, "23", _HOURS), _mostly(draw, "59", _SIXTIES)
    second = f":{_mostly(draw, '59', _SIXTIES)}" if draw.random() < 0.8 else ""
    if second and draw.random() < 0.4:
        second += "." + _digits(draw, draw.choice((1, 3, 6, 6, 7, 7, 9, 12, 19, 20, 40)))
    said = f"{year}-{month}-{day}{_mostly(draw, 'T', _SEPARATORS)}{hour}:{minute}{second}{draw.choice(_ZONES)}"
    return quoted(draw, said)


def _mostly(draw: Random, plain: str, others: tuple[str, ...]) -> str:
    return plain if draw.random() < 0.75 else draw.choice(others)


def value(draw: Random, levels: int = 3) -> str:
    """Draw any JSON value, or occasionally an invalid one."""
    way = draw.random()
    if way < 0.8:
        if way >= 0.65:
            return draw.choice(_LITERALS)
        return number(draw) if way < 0.35 else text(draw) if way < 0.55 else time(draw)
    if way < 0.86:
        return deep(draw) if way < 0.83 else draw.choice(_NO_NUMBERS if way < 0.845 else _NO_LITERALS)
    inner = [value(draw, levels - 1) for _ in range(draw.randrange(4))] if levels else []
    if way < 0.93:
        return f"[{', '.join(inner)}]"
    return _braced(", ".join([_member(quoted(draw, draw.choice(_NAMES)), each) for each in inner]))


def _braced(members: str) -> str:
    return "{" + members + "}"


def _member(name: str, each: str) -> str:
    return f"{name}: {each}"


def deep(draw: Random) -> str:
    """Draw a nested value, shallow or very deep."""
    way = draw.random()
    if way < 0.5:
        depth = draw.randrange(1, 30)
    elif way < 0.8:
        depth = draw.randrange(MAX_DEPTH - 10, MAX_DEPTH + 11)
    elif way < 0.98:
        depth = draw.choice((100, 127, 128, 255, 256, 300, 500, 700, 900, 950, 980, 990, 1000, 1024, 1100, 1500))
    else:
        depth = draw.choice((2000, 5000, 10_000, 20_000, 100_000))
    opened, closed = draw.choice((("[", "]"), ('{"":', "}"), ('[{"a":', "}]"), ('[0, {"[": "]", "b": [', "]}]")))
    depth = max(1, depth // (opened.count("[") + opened.count("{") - opened.count('"[')))
    core = draw.choice(("1", "null", '""', "1e999", "[]")) if opened != "[" else draw.choice(("1", "", "[]"))
    ends = depth if draw.random() < 0.95 else draw.randrange(depth + 2)
    return opened * depth + core + closed * ends


# --- records and envelopes


def record(draw: Random, *, wrong: float) -> str:
    """Draw a record of any kind; *wrong* is the probability of an oddity."""
    kind = draw.choice(_TYPES)
    fields = [
        ("id", f'"{draw.randrange(10**6)}"'),
        ("name", '"VIP"' if draw.random() < 0.5 else json.dumps(draw.choice(_TEXTS))),
        ("created_time", time(draw) if draw.random() < wrong else '"2025-10-01T09:10:00Z"'),
    ]
    if kind == '"Static"' or draw.random() < 0.05:
        fields.append(("user_count", str(draw.randrange(10 ** draw.choice((1, 3, 9, 25))))))
    fields.append(("type", kind))
    if draw.random() < wrong:
        _spoil(draw, fields)
    return _object(draw, fields)


def _spoil(draw: Random, fields: list[tuple[str, str]]) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        way = draw.random()
        at = draw.randrange(len(fields)) if fields else 0
        if way < 0.4 and fields:
            name = fields[at][0]
            fields[at] = (name, draw.choice(_ODD_TYPES) if name == "type" and way < 0.2 else value(draw))
        elif way < 0.5 and fields:
            del fields[at]
        elif way < 0.6:
            fields.insert(at, (draw.choice(_FIELDS), value(draw)))  # a duplicate
        elif way < 0.65:
            draw.shuffle(fields)
        else:
            fields.append((draw.choice(_NAMES), value(draw)))


def _object(draw: Random, fields: Iterable[tuple[str, str]]) -> str:
    if draw.random() < 0.8:
        return _braced(
            ", ".join([_member(f'"{name}"' if name.isascii() else json.dumps(name), each) for name, each in fields])
        )
    colon, comma = draw.choice(((":", ","), (" :\r\n", "\n,\t"), (": ", " , ")))
    return _braced(comma.join([quoted(draw, name) + colon + each for name, each in fields]))


def data(draw: Random, *, wrong: float) -> str:
    """Draw the envelope's data: records, or occasionally something else."""
    way = draw.random()
    if way < wrong / 8:
        return value(draw)
    count = draw.choice((0, 1, 1, 1, 2, 3, 5)) if way < 0.99 else draw.choice((8, 25, 40))
    records = [record(draw, wrong=wrong) for _ in range(count)]
    if draw.random() < wrong / 8:
        records.insert(draw.randrange(count + 1), value(draw))
    return f"[{', '.join(records)}]"


def envelope(draw: Random) -> str:
    """Draw a whole document: valid, or wrong in one or more places."""
    wrong = draw.choice((0.0, 0.2, 0.5))
    members = [
        ("status", draw.choice(_GOOD_STATUSES)),
        ("description", draw.choice(('"Audiences retrieved"', '""', "null"))),
        ("response_time", '"2025-10-01T09:10:00Z"'),
        ("data", data(draw, wrong=wrong)),
    ]
    if draw.random() < 0.2:
        members[0] = ("status", draw.choice(_BAD_STATUSES))
    if draw.random() < wrong:
        members[2] = ("response_time", time(draw))
    if draw.random() < wrong:
        way = draw.random()
        at = draw.randrange(len(members))
        if way < 0.4:
            members[at] = (members[at][0], value(draw))
        elif way < 0.5:
            del members[at]
        elif way < 0.65:
            members.insert(at, (draw.choice(_MEMBERS), value(draw)))  # a duplicate
        elif way < 0.75:
            draw.shuffle(members)
        else:
            members.append((draw.choice(_NAMES), value(draw)))
    return _object(draw, members)


def large(draw: Random) -> str:
    """Draw a document of some 100 KB: one huge string, or enough records to be read in pieces."""
    way = draw.random()
    if way < 0.4:
        filler = draw.choice(("x", "é", "🦊", "\\u0041", "},", "[", '\\"', " "))
        huge = '"%s"' % (filler * (draw.randrange(60_000, 200_000) // len(filler)))
        name = draw.choice(("id", "name", "created_time", "type", "x"))
        rest = record(draw, wrong=0.2)
        odd = _braced(f'"{name}": {huge}, {rest[1:-1]}' if way < 0.25 else f'{rest[1:-1]}, "{name}": {huge}')
        place = draw.choice(_MEMBERS) if way < 0.1 else "data"
        members = {"status": "200", "data": "[]"} | {place: f"[{odd}]" if place == "data" else huge}
        return _object(draw, members.items())
    wrong = draw.choice((0.0, 0.0, 0.05, 0.5))
    some = [record(draw, wrong=wrong) for _ in range(12)]
    size = draw.choice((140_000, 140_000, 280_000, 300_000, 600_000))
    records = (
        draw.choices(some, k=size // (sum(map(len, some)) // len(some) + 2) + 1) if max(map(len, some)) < 5000 else some
    )
    if draw.random() < 0.4:
        records[draw.randrange(len(records))] = value(draw) if draw.random() < 0.3 else record(draw, wrong=1.0)
    return _braced(f'"status": "200", "data": [{", ".join(records)}]')


# --- bytes

_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[\[\]{},:]', re.DOTALL)
_BYTES: Final = (
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b",,",
        b'"',
        b"\\",
        b"/**/",
        b"\0",
        b"'",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xc0\x80",
    ),
    *(
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc3",
        b"\xe2\x80\xa8",
        b"\\ud800",
        b"\\u0000",
        b"\n",
        b"\x0b",
        b"\xa0",
        b"{}",
    ),
    *(b"[]", b"null", b"1e999", b"-0", b"9" * 40, b'"200"', b'"Static"', b'"type"', b'"data"', b'"status": 500,'),
)
_NO_JSON: Final = (
    *(b"", b" ", b"\n", b"\0", b"null", b"[]", b"{}", b'""', b"0", b"-", b"1e999", b"nul", b"<html>Busy</html>", b"OK"),
    *(
        _BOM,
        _BOM + b"{}",
        _BOM + _BOM + b"{}",
        b"\xff\xfe",
        b"\xfe\xff",
        b"\x1f\x8b\x08\0",
        b"data: {}\n\n",
        b"{",
        b"[",
        b'"',
    ),
    *(b"{}{}", b"{}\n{}\n", b"9" * 5000, b'"\\ud800"', b'{"status"', b'{"status":', b'{"status": 200', b"[" * 100_000),
    *(
        b'{"":' * 100_000,
        b'{"status": 200, "data": ' + b"[" * 100_000,
        b"[" * 1200 + b"]" * 1200,
        b"\xed\xa0\x80",
        b")]}',\n{}",
    ),
)


def mutated(draw: Random, body: bytes) -> bytes:
    """Apply one to three mutations to some bytes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        body = draw.choice(_MUTATIONS)(draw, body)
    return body


def _flip(draw: Random, body: bytes) -> bytes:
    at = draw.randrange(len(body) + 1)
    return body[:at] + bytes([body[at] ^ (1 << draw.randrange(8))]) + body[at + 1 :] if at < len(body) else body


def _delete(draw: Random, body: bytes) -> bytes:
    at = draw.randrange(len(body) + 1)
    return body[:at] + body[at + draw.choice((1, 1, 2, 8, 60)) :]


def _insert(draw: Random, body: bytes) -> bytes:
    at = draw.randrange(len(body) + 1)
    return body[:at] + (draw.choice(_BYTES) if draw.random() < 0.8 else draw.randbytes(2)) + body[at:]


def _truncate(draw: Random, body: bytes) -> bytes:
    return body[: draw.randrange(len(body) + 1)]


def _splice(draw: Random, body: bytes) -> bytes:
    other = _encoded(envelope(draw))
    if draw.random() < 0.2:
        return body + other
    return body[: draw.randrange(len(body) + 1)] + other[draw.randrange(len(other) + 1) :]


def _repeat_member(draw: Random, body: bytes) -> bytes:
    places = [found.end() for found in re.finditer(rb"\{", body[:2000])]
    if not places:
        return body
    at = draw.choice(places)
    member = _encoded(f"{quoted(draw, draw.choice((*_MEMBERS, *_FIELDS)))}: {value(draw)}")
    return body[:at] + member + (b"" if body[at:].lstrip()[:1] == b"}" else b", ") + body[at:]


def _swap_token(draw: Random, body: bytes) -> bytes:
    tokens = list(_TOKEN.finditer(body[:4000]))
    if not tokens:
        return body
    token = draw.choice(tokens)
    other = _encoded(value(draw)) if draw.random() < 0.7 else draw.choice(tokens)[0]
    return body[: token.start()] + other + body[token.end() :]


def _recode(draw: Random, body: bytes) -> bytes:
    way = draw.random()
    if way < 0.4:
        return _BOM * draw.choice((1, 1, 1, 2)) + body
    if way < 0.6:
        return body.replace(b"e", draw.choice((b"\\u0065", b"\\u0045", b"\xc3\xa9", b"\xe9")), draw.randrange(1, 9))
    coding = draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "utf-8-sig"))
    return body.decode(errors="replace").encode(coding)


_MUTATIONS: Final = (
    *(
        _flip,
        _delete,
        _insert,
        _truncate,
        _splice,
        _repeat_member,
        _repeat_member,
        _swap_token,
        _swap_token,
        _swap_token,
    ),
    _recode,
)


def _encoded(said: str) -> bytes:
    return said.encode("utf-8", "surrogateescape" if "\udc80" <= max(said, default="") <= "\udcff" else "surrogatepass")


def body_of(seed: int, index: int) -> bytes:
    """Return the body of a seed at an index, always the same one."""
    draw = Random((seed << 40) + index)
    way = draw.random()
    if way < 0.45:
        return _encoded(envelope(draw))
    if way < 0.93:
        return mutated(draw, _encoded(envelope(draw)))
    if way < 0.96:
        return _encoded(value(draw))
    if way < 0.985:
        return draw.choice(_NO_JSON) if way < 0.975 else draw.randbytes(draw.randrange(40))
    if way < 0.9993:
        return mutated(draw, draw.choice(_NO_JSON))
    body = _encoded(large(draw))
    return mutated(draw, body) if draw.random() < 0.2 else body


# --- checks

_STATUSES: Final = (201, 204, 206, 299, 300, 302, 304, 400, 401, 403, 404, 408, 429, 500, 502, 503, 504, 599, 999)
_CLASSES: Final[Mapping[int, type[StatusError]]] = {
    400: BadRequestError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    429: TooManyRequestsError,
}
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STEPS: Final = bytes.maketrans(b"[{]}", b"\2\2\0\0")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
# An integer of more than 4,300 characters, which msgspec rejects. Adjacent strings are left alone.
_LONG_INTEGER: Final = re.compile(
    rb'"(?:[^"\\]|\\.)*"|(?<![0-9.eE+\-])(?P<integer>-[1-9][0-9]{4299,}|[1-9][0-9]{4300,})(?![0-9.eE])', re.DOTALL
)
_DIGITS: Final = re.compile(rb"[0-9]{4300}")

Result = AudiencesResponse | AudiencesError


class CheckError(Exception):
    """A result that the contract does not allow.

    Attributes:
        kind: Kind of the violation, for the table.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@frozen
class Fault:
    """A failed check and its place."""

    seed: int
    index: int
    kind: str
    detail: str
    body: bytes

    def __str__(self) -> str:
        shown = repr(self.body[:300]) + ("..." if len(self.body) > 300 else "")
        return f"seed {self.seed}, index {self.index}: {self.detail[:500]}\n  {len(self.body)} bytes: {shown}"


@define
class Report:
    """Totals over many bodies.

    Attributes:
        outcomes: Number of bodies per kind of outcome.
        faults: The first fault of each kind.
        counts: Number of faults per kind.
        slowest: Seconds of the slowest decoding, and its index.
    """

    outcomes: Counter[str] = field(factory=Counter)
    faults: dict[str, Fault] = field(factory=dict)
    counts: Counter[str] = field(factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)


def run(seed: int, indices: Iterable[int], *, progress: Callable[[int], None] | None = None) -> Report:
    """Decode the bodies of a seed and check each result.

    Args:
        seed: The seed.
        indices: Indices of the bodies.
        progress: Called with the number of bodies so far, once every 20,000.
    """
    report = Report()
    for done, index in enumerate(indices, 1):
        body = body_of(seed, index)
        try:
            outcome, seconds = check(body, Random(index))
        except CheckError as error:
            outcome = f"FAULT {error.kind}"
            report.counts[error.kind] += 1
            report.faults.setdefault(error.kind, Fault(seed, index, error.kind, str(error), body))
        else:
            report.slowest = max(report.slowest, (seconds, index))
        report.outcomes[outcome] += 1
        if progress is not None and done % 20_000 == 0:
            progress(done)
    return report


def check(body: bytes, draw: Random) -> tuple[str, float]:
    """Decode a body in every way and check the results against the contract.

    Returns:
        The kind of outcome, and the seconds that `decode` took.

    Raises:
        CheckError: A check failed.
    """
    start = clock.perf_counter()
    decoded = _result("decode", lambda: decode(body))
    seconds = clock.perf_counter() - start
    outcome = _kind(decoded)
    reply = Reply(200, _HEADERS, body)
    through = _result("wire.read", lambda: _to_its_end(reply))
    if _kind(through) != outcome:
        raise CheckError("decode and wire.read disagree", f"{outcome} against {_kind(through)}")
    if isinstance(decoded, AudiencesResponse):
        _check_the_same(body, decoded, through)
        _check_the_same(body, decoded, _result("wire.read_plain", lambda: read_plain(reply, _KEY) or decoded))
    else:
        _check_error(decoded)
        assert isinstance(through, AudiencesError)
        _check_error(through)
        if isinstance(decoded, InvalidResponseError) and getattr(through, "problems", None) != decoded.problems:
            raise CheckError("decode and wire.read have different problems", f"{decoded} against {through}")
    if draw.random() < 0.2:
        _check_another_status(body, draw)
    _check_contract(body, decoded, outcome, thorough=len(body) < 2000 or draw.random() < 0.1)
    return outcome, seconds


def _to_its_end(reply: Reply) -> Result:
    steps = read(reply, _KEY, now=_NOW)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


def _result(what: str, call: Callable[[], Any]) -> Result:
    try:
        result = call()
    except (InvalidResponseError, StatusError) as error:
        if isinstance(error, StatusError) and not 300 <= error.status <= 999:
            raise CheckError("a StatusError with a status that is none", f"{error.status.bit_length()} bits") from error
        return error
    except Exception as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        raise CheckError(f"untyped {kind} from {what}", str(error)[:200]) from error
    if not isinstance(result, AudiencesResponse | InvalidResponseError | StatusError):
        raise CheckError(f"{what} gives a {type(result).__name__}")
    if isinstance(result, StatusError) and not 300 <= result.status <= 999:
        raise CheckError("a StatusError with a status that is none", f"{result.status.bit_length()} bits")
    return result


def _kind(result: Result) -> str:
    if isinstance(result, AudiencesResponse):
        return "answer"
    return f"refusal {result.status}" if isinstance(result, StatusError) else "invalid"


def _check_the_same(body: bytes, one: Result, other: Result) -> None:
    # 1, 1.0 and true are equal, but written differently.
    if one != other or (len(body) < 4000 and repr(one) != repr(other)):
        raise CheckError("decode and wire.read give different answers", f"{one!r:.200} against {other!r:.200}")


def _check_error(error: AudiencesError) -> None:
    if isinstance(error, StatusError):
        expected = _CLASSES.get(error.status, ServerError if 500 <= error.status <= 599 else StatusError)
        if type(error) is not expected:
            raise CheckError("a StatusError of another class", f"{type(error).__name__} for {error.status}")
    elif isinstance(error, InvalidResponseError) and not isinstance(error, ResponseTooLargeError):
        if not error.problems:
            raise CheckError("an InvalidResponseError without problems", str(error))
        for problem in error.problems:
            if not problem.startswith("$"):
                raise CheckError("a problem without a path", problem)
    _check_presentable(error)


def _check_presentable(error: AudiencesError) -> None:
    try:
        restored = pickle.loads(pickle.dumps(error))
        line = str(error)
    except Exception as error_of_error:
        raise CheckError(
            f"an error that cannot be pickled or shown: {type(error_of_error).__name__}"
        ) from error_of_error
    if type(restored) is not type(error) or vars(restored) != vars(error) or str(restored) != line:
        raise CheckError("a pickled error changes", line)
    if not line.isprintable():
        raise CheckError("an error of more than one printable line", repr(line))


def _check_another_status(body: bytes, draw: Random) -> None:
    """Read the body as that of a response with another status: the HTTP status decides, whatever the body is."""
    status = draw.choice(_STATUSES)
    result = _result("wire.read of another status", lambda: _to_its_end(Reply(status, _HEADERS, body)))
    expected = f"refusal {status}" if status >= 300 else "invalid"
    if _kind(result) != expected:
        raise CheckError("a reply of another status is read wrongly", f"{_kind(result)} for HTTP {status}")
    assert isinstance(result, AudiencesError)
    _check_presentable(result)
    capped = _result("wire.read of a cut body", lambda: _to_its_end(Reply(200, _HEADERS, body, 100)))
    if type(capped) is not ResponseTooLargeError:
        raise CheckError("a body above the cap is read", _kind(capped))
    _check_presentable(capped)


# --- what the contract has to say


def _check_contract(body: bytes, result: Result, outcome: str, *, thorough: bool) -> None:
    depth = depth_of(body)
    if depth > MAX_DEPTH + _DEPTH_SLACK and outcome == "answer" and _is_deep_in_a_record(body):
        raise CheckError("nested too deeply in a record, and read as an answer", f"depth {depth}")
    expected = verdict(body, thorough=thorough) if depth <= MAX_DEPTH else None
    if expected is None:
        return
    if outcome != expected and not (outcome == "invalid" and expected != "invalid" and _is_unreadable_below(body)):
        what = re.sub("[0-9]+", "N", f"{expected} expected, got {outcome}")
        problems = f" {result.problems}" if isinstance(result, InvalidResponseError) else ""
        raise CheckError(f"the contract disagrees: {what}", f"{expected}, {outcome}{problems}")
    if thorough and isinstance(result, AudiencesResponse):
        _check_answer(body, result)


def verdict(body: bytes, *, thorough: bool) -> str | None:
    """Return the outcome that the contract requires, by an independent reader; ``None`` if it cannot decide.

    The body must not be nested deeply.

    Args:
        body: The body.
        thorough: Whether to check the records, which is slow.
    """
    plain = _with_short_integers(body)
    try:
        document = contract.document_of(plain)
    except contract.RefusedError:
        return "invalid"
    refused = _refused_status(document)
    if refused is not None:
        return f"refusal {refused}"
    if not thorough:
        return None
    try:
        answer = contract.read(plain)
    except contract.RefusedError:
        return "invalid"
    # A record cannot keep a number that Python cannot hold; the envelope ignores it.
    return "invalid" if any(_has_infinity(dict(row.beyond)) for row in answer.rows) else "answer"


def _refused_status(document: Any) -> int | None:
    status = document.get("status") if isinstance(document, dict) else None
    if isinstance(status, str) and re.fullmatch("[0-9]{3}", status, re.ASCII):
        status = int(status)
    return status if type(status) is int and 300 <= status <= 599 else None


def _is_deep_in_a_record(body: bytes) -> bool:
    try:
        level = [json.loads(_with_short_integers(body).decode("utf-8-sig"))["data"]]
    except RecursionError:
        return False  # undecided
    for _ in range(MAX_DEPTH):
        level = [below for each in level if isinstance(each, dict | list) for below in _children(each)]
    return bool(level)


def _children(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _is_unreadable_below(body: bytes) -> bool:
    """Return whether a value replaced by a later duplicate has half a surrogate pair, or a number that is not finite.

    The contract does not look at such a value; the package may.
    """
    found = False

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        read = dict(pairs)
        if len(read) < len(pairs):
            shown = json.dumps(pairs, ensure_ascii=False)
            found = found or _has_infinity(pairs) or any("\ud800" <= c <= "\udfff" for c in shown)
        return read

    json.loads(_with_short_integers(body).decode("utf-8-sig"), object_pairs_hook=members)
    return found


def _with_short_integers(body: bytes) -> bytes:
    """Replace integers that are too long to be read by another number out of range."""
    if not _DIGITS.search(body):
        return body
    return _LONG_INTEGER.sub(lambda found: found[0] if found["integer"] is None else b"1e999", body)


def _has_infinity(document: Any) -> bool:
    level = [document]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            level += each.values()
        elif isinstance(each, list | tuple):
            level += each
        elif isinstance(each, float) and math.isinf(each):
            return True
    return False


def depth_of(body: bytes) -> int:
    """Return the nesting depth of arrays and objects, 0 for a scalar; any number if the body is not JSON."""
    most = body.count(b"[") + body.count(b"{")
    if most <= MAX_DEPTH:
        return most  # maximum depth
    steps = _STRING.sub(b"", body).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate((step - 1 for step in steps), initial=0))


def _check_answer(body: bytes, response: AudiencesResponse) -> None:
    try:
        answer = contract.read(_with_short_integers(body))
    except contract.RefusedError:
        return  # too deep for the reader, whose verdict is already known
    envelopes = [
        (response.status, response.description, response.response_time, len(response)),
        (answer.status, answer.description, answer.response_time, len(answer.rows)),
    ]
    if envelopes[0] != envelopes[1]:
        raise CheckError("the contract reads another envelope", f"{envelopes[0]} against {envelopes[1]}")
    for audience, row in zip(response.data, answer.rows, strict=True):
        beyond = audience.raw if isinstance(audience, UnknownAudience) else audience.extra
        mine = [audience.type, audience.id, audience.name, getattr(audience, "user_count", None), dict(beyond)]
        theirs = [row.kind, row.id, row.name, row.user_count, dict(row.beyond)]
        if not contract.same(mine, theirs) or audience.created_time != row.created_time:
            raise CheckError("the contract reads another record", f"{audience!r:.200} against {row!r:.200}")


# --- the command


def main(arguments: list[str] | None = None) -> int:
    """Run the checks from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Decode many generated reply bodies.")
    parser.add_argument("--count", type=int, default=200_000, help="how many bodies (default: 200000)")
    parser.add_argument("--seed", type=int, help="the seed (default: a new one)")
    parser.add_argument("--index", type=int, help="show this body of the seed, and check it alone")
    options = parser.parse_args(arguments)
    seed: int = SystemRandom().randrange(10**9) if options.seed is None else options.seed
    _say(f"seed {seed}")
    if options.index is not None:
        _say(repr(body_of(seed, options.index)))
    indices = range(options.count) if options.index is None else range(options.index, options.index + 1)
    start = clock.perf_counter()
    report = run(seed, indices, progress=lambda done: _say(f"{done} bodies, {clock.perf_counter() - start:.0f} s"))
    _say(f"{len(indices)} bodies in {clock.perf_counter() - start:.1f} s")
    for outcome, count in report.outcomes.most_common():
        _say(f"{count:>8}  {outcome}")
    _say(f"slowest decoding: {report.slowest[0] * 1000:.1f} ms, index {report.slowest[1]}")
    untyped = sum(count for kind, count in report.counts.items() if kind.startswith("untyped"))
    _say(f"{untyped} untyped exceptions, {sum(report.counts.values())} faults in all")
    for kind, fault in report.faults.items():
        _say(f"\n{kind} ({report.counts[kind]} times)\n{fault}")
    return 1 if report.faults else 0


def _say(line: str) -> None:
    sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
