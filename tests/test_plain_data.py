"""Audiences as plain data: for JSON, data frames, cattrs, prompts and notebooks; test_web has web frameworks."""

import json
import re
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
import cattrs
import pytest
from rich.console import Console
from services import missing_module

from audiences_async import (
    Account,
    AudiencesClient,
    AudiencesResponse,
    DynamicAudience,
    Fetched,
    StaticAudience,
    UnknownAudience,
)
from audiences_async.models import Audience
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Sandbox
from audiences_async.structuring import configure_converter, decode

README = Path(__file__).parent.parent / "README.md"
WHEN = datetime(2025, 10, 1, 9, 10, tzinfo=UTC)
KEYS = ["id", "name", "created_time", "user_count", "type"]
STATIC = StaticAudience("1", "one", WHEN, 7, {"owner": "me"})
DYNAMIC = DynamicAudience("2", "two", WHEN)
UNKNOWN = UnknownAudience("New", raw={"type": "New", "id": 9})
RESPONSE = AudiencesResponse(200, "OK", None, (DYNAMIC, STATIC, UNKNOWN))


def as_printed(library: str) -> Any:
    """Return what README's expression for a library gives, of 199 dynamic audiences and a static one."""
    (expression,) = re.findall(rf"^\| {library} \| `(.*)` \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name: import_module(name) for name in ("duckdb", "pandas", "polars", "pyarrow") if name in expression}
    return eval(expression, {"response": many(200), **names})


def many(count: int) -> AudiencesResponse:
    """Return a response of dynamic audiences and a static one, the last."""
    return AudiencesResponse(200, "", WHEN, (*(DYNAMIC for _ in range(count - 1)), STATIC))


def test_an_audience_is_the_services_own_record() -> None:
    """Return each field as sent, the type and undocumented fields included."""
    created = "2025-10-01T09:10:00Z"
    own = {"id": "1", "name": "one", "created_time": created, "user_count": 7, "type": "Static", "owner": "me"}
    assert STATIC.to_dict() == own
    assert DYNAMIC.to_dict() == {"id": "2", "name": "two", "created_time": created, "type": "Dynamic"}
    assert UNKNOWN.to_dict() == {"type": "New", "id": 9}


def test_all_rows_have_the_same_keys() -> None:
    """Give each row every documented and undocumented key of the answer, in the same order."""
    rows = RESPONSE.to_dicts()
    assert [list(row) for row in rows] == [[*KEYS, "owner"]] * 3
    assert [row["user_count"] for row in rows] == [None, 7, None]
    assert AudiencesResponse(200, "", None, ()).to_dicts() == []


def test_the_rows_are_json() -> None:
    """Write and read the rows with `json`, whatever the size of their numbers."""
    large = AudiencesResponse(200, "", None, (StaticAudience("é", "</b>", WHEN, 2**70),))
    for response in (RESPONSE, large):
        assert json.loads(response.to_json()) == json.loads(json.dumps(response.to_dicts())) == response.to_dicts()


@attrs.frozen
class Report:
    """A class of a user's, with audiences in it."""

    response: AudiencesResponse
    audiences: tuple[Audience, ...]


def test_a_users_converter_writes_and_reads_the_same_records() -> None:
    """Write a response as the service's envelope and an audience as its record, and read them back."""
    converter = cattrs.Converter()
    configure_converter(converter)
    report = Report(RESPONSE, (STATIC, DYNAMIC, UNKNOWN))
    written = converter.unstructure(report)
    assert written["response"]["data"] == [audience.to_dict() for audience in RESPONSE]
    assert decode(json.dumps(written["response"]).encode()).data[:2] == RESPONSE.data[:2]
    assert converter.structure(json.loads(json.dumps(written)), Report) == report
    assert converter.unstructure(STATIC) == STATIC.to_dict()
    assert converter.unstructure(many(1))["response_time"] == "2025-10-01T09:10:00Z"


def test_the_json_of_readme() -> None:
    """Write the rows as README's table says."""
    assert json.loads(as_printed("JSON")) == many(200).to_dicts()


@pytest.mark.once
@pytest.mark.skipif(missing_module("pandas"), reason="pandas is not installed")
def test_pandas_reads_the_rows() -> None:
    """Read every column, with types, as README's table says."""
    frame = as_printed("pandas")
    assert list(frame.columns) == [*KEYS, "owner"]
    assert frame["user_count"].sum() == 7
    assert datetime.fromisoformat(frame["created_time"].iloc[0]) == WHEN


@pytest.mark.once
@pytest.mark.skipif(missing_module("polars"), reason="polars is not installed")
def test_polars_reads_the_rows() -> None:
    """Read every column, with types, also if the first value comes late."""
    frame = as_printed("polars")
    assert frame.columns == [*KEYS, "owner"]
    assert (str(frame["user_count"].dtype), frame["user_count"].sum()) == ("Int64", 7)
    assert frame["created_time"].str.to_datetime(time_zone="UTC")[0] == WHEN


@pytest.mark.once
@pytest.mark.skipif(missing_module("pyarrow") or missing_module("duckdb"), reason="pyarrow or duckdb is not installed")
def test_pyarrow_and_duckdb_read_the_rows() -> None:
    """Read every column with types: pyarrow takes them from the first row."""
    table, rows = as_printed("pyarrow"), as_printed("duckdb")
    assert table.schema.names == rows.columns == [*KEYS, "owner"]
    found = rows.aggregate("sum(user_count), min(created_time::timestamptz at time zone 'UTC')")
    assert found.fetchall() == [(7, WHEN.replace(tzinfo=None))]


async def test_an_answer_is_indexed(sandbox: Sandbox) -> None:
    """Index and slice an answer like a tuple."""
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        response = await client.get_audiences(sandbox.add_account("north"))
    assert response[0].to_dict() == EXAMPLE_AUDIENCES[0]
    assert (response[-1], response[1:]) == (response.data[-1], response.data[1:])
    with pytest.raises(IndexError):
        response[2]


def test_a_repr_is_bounded() -> None:
    """Show the first audiences and the number of the others; few are shown in full."""
    long = AudiencesResponse(200, "x" * 9999, None, (StaticAudience("1", "n" * 9999, WHEN, 1),) * 20_000)
    for shown in (repr(long), repr(Fetched(Account("north", "key"), 1.0, long))):
        assert len(shown) < 1500
        assert "... 19997 more" in shown
    assert repr(DYNAMIC) in repr(RESPONSE)
    assert len(repr(UnknownAudience("New", raw={"type": "New", "x": list(range(9999))}))) < 300


def test_rich_shows_a_bounded_answer() -> None:
    """Show the first audiences and the number of the others in rich's pretty print."""
    console = Console(width=100)
    with console.capture() as capture:
        console.print(many(20_000), RESPONSE)
    shown = capture.get()
    assert shown.count("more=") == shown.count("more=19997") == 1
    assert len(shown.splitlines()) < 60


def test_a_notebook_shows_a_small_table() -> None:
    """Show the first rows in HTML, with every text escaped and cut."""
    odd = StaticAudience("<b>", "<script>" + "x" * 999, WHEN, 1)
    shown = AudiencesResponse(200, "", None, (odd, *(DYNAMIC,) * 99))._repr_html_()
    assert "100 audiences, the first 10" in shown
    assert "<b>" not in shown
    assert "<td>&lt;script&gt;x" in shown
    assert len(shown) < 4000
    assert "3 audiences</caption>" in RESPONSE._repr_html_()


async def test_a_snapshot_is_json(sandbox: Sandbox) -> None:
    """Return a client's state as plain data, before its first use and after it; no budget is `None`."""
    client = AudiencesClient(base_url=sandbox.base_url, budget=None)
    assert client.snapshot().to_dict() == {"accounts": [], "budget_left": None, "service": None}
    async with client:
        await client.get_audiences(sandbox.add_account("north"))
        shown = client.snapshot().to_dict()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert (shown["accounts"][0]["account"], shown["service"]["state"]) == ("north", "open")
