"""CSV for programs and spreadsheets: a spreadsheet executes no cell, and a program gets each text back unchanged."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from audiences_async._base.dates import iso_with_z

AUDIENCE: Final = ("id", "name", "type", "created_time", "user_count")
"""Documented fields of an audience."""

# Spreadsheets take a cell with one of these first for a formula: https://owasp.org/www-community/attacks/CSV_Injection.
# The apostrophe is added to them, so that a program can remove it from any cell that has it.
_DEFUSED: Final = tuple("=+-@\t\r\n\0\uff1d\uff0b\uff0d\uff20'")  # the last but one are = + - @ in full width


def encode(rows: Iterable[Sequence[str]]) -> bytes:
    """Return rows as CSV, in UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def of_audience(record: Mapping[str, Any]) -> list[str]:
    """Return the cells of an audience: one for each documented field, and one for all others, as JSON."""
    extra = {name: value for name, value in record.items() if name not in AUDIENCE}
    return [*(cell(record.get(name)) for name in AUDIENCE), cell(extra or None)]


def cell(value: Any) -> str:
    """Return the text of a cell: empty for ``None``, text as it is, times in ISO 8601, and JSON for anything else.

    A text that a spreadsheet would execute gets an apostrophe in front, and so does one that begins with an apostrophe:
    without its first apostrophe, if it has one, each cell is the original text.
    """
    if value is None:
        return ""
    if isinstance(value, datetime):
        return iso_with_z(value)
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return f"'{text}" if text.startswith(_DEFUSED) else text
