"""Generated response bodies, valid and hostile: each is an answer or one of our errors, by the contract.

There are 4,000 of them, or 20,000 with ``AUDIENCES_FUZZ_EXAMPLES=0``, which CI sets on the oldest Python.
``python tests/bodies.py`` tries many more of them, new ones in every run.
"""

import os
from random import Random

import bodies
import pytest

from audiences_async import AudiencesResponse, InvalidResponseError

pytestmark = [pytest.mark.once, pytest.mark.slow]

SEED = 20_251_001
PART = min(5_000, 10 * int(os.environ.get("AUDIENCES_FUZZ_EXAMPLES", "100")) or 5_000)
RECORD = b'{"type": "Dynamic", "id": "1", "name": "", "created_time": "%s"}'


@pytest.mark.long
@pytest.mark.once
@pytest.mark.parametrize("part", range(4))
def test_any_body_is_an_answer_or_a_typed_error(part: int) -> None:
    """Read every body as an answer, an InvalidResponseError with paths, or the StatusError of its envelope."""
    report = bodies.run(SEED, range(part * PART, (part + 1) * PART))
    assert not report.faults, "\n".join(
        f"{kind} ({report.counts[kind]} times)\n{report.faults[kind]}" for kind in report.faults
    )
    assert report.outcomes["answer"] > PART / 10
    assert report.outcomes["invalid"] > PART / 10


def test_a_seed_and_an_index_make_the_same_body_again() -> None:
    """Generate the same body from a seed and an index, regardless of the bodies before it."""
    assert bodies.body_of(7, 3) == (
        b'{"status": "299", "description": "Audiences retrieved", "response_time": "2025-11-15T18:10:00Z", "data": '
        b'[{"id": "996476", "name": "VIP", "created_time": "2025-12-20T21:10:00Z", "type"[[]] "Dynamic"}]}'
    )
    forwards = [bodies.body_of(SEED, index) for index in range(200)]
    assert [bodies.body_of(SEED, index) for index in reversed(range(200))] == forwards[::-1]
    assert len(set(forwards)) > 150
    assert [bodies.body_of(SEED + 1, index) for index in range(200)] != forwards


@pytest.mark.parametrize(
    "body",
    [
        b'{"status": 200, "data": 1e999}',
        b'{"status": 9999999999999999999999999999999999999999, "data": []}',
        b'{"status": "600", "data": []}',
        b'{"status": 200, "data": [], "x": %s1%s}' % (b"[" * 150, b"]" * 150),
        b'{"status": 200, "data": [%s]}' % (RECORD % b"2025-10-01T24:00:00Z"),
        b'{"status": 200, "data": [%s]}' % (RECORD % b"2025-10-01T23:59:60Z"),
        b'{"status": 200, "data": [%s]}' % (RECORD % rb"2025-10-01T09:10:00\u0000Z"),
        b'{"status": 200, "data": [], "response_time": "2025-10-01T09:10:00\\u0000Z"}',
        b'{"status": 200, "data": [{"type": 1e999, "type": "New"}]}',
        b'{"status": 200, "data": [], "x": %s1%s}' % (b"[" * 300, b"]" * 300),
        b'{"status": 200, "data": [{"type": "New", "x": %s}]}' % (b"9" * 5000),
        b'{"status": "429", "data": null}',
    ],
)
def test_bodies_that_were_read_wrongly_once(body: bytes) -> None:
    """Apply the checks for generated bodies to the bodies of earlier bugs."""
    bodies.check(body, Random(0))


def test_the_checks_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the checks for an untyped error, an error without problems and a lost record."""
    body = b'{"status": 200, "data": [{"type": "New"}]}'
    bodies.check(body, Random(0))

    def untyped(_: bytes) -> AudiencesResponse:
        raise ZeroDivisionError("no")

    def pathless(_: bytes) -> AudiencesResponse:
        raise InvalidResponseError("the reply cannot be read")

    def lost(_: bytes) -> AudiencesResponse:
        return AudiencesResponse(200, "", None, ())

    for wrong, what in (
        (untyped, "untyped ZeroDivisionError from decode"),
        (pathless, "disagree"),
        (lost, "different"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(bodies, "decode", wrong)
            with pytest.raises(bodies.CheckError, match=what):
                bodies.check(body, Random(0))
