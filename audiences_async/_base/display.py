"""Short forms of long values, for a prompt, a log or a notebook."""

from collections.abc import Iterable, Sequence
from reprlib import Repr
from typing import Final

SHOWN: Final = 3
"""Items of a long sequence that its ``repr`` shows."""

_short: Final = Repr()
_short.maxtuple = _short.maxlist = _short.maxdict = SHOWN
_short.maxlevel = 4
_short.maxstring = _short.maxother = 200  # characters


def short(value: object) -> str:
    """Return the ``repr`` of *value*; if it is long, its middle or its end is left out."""
    return _short.repr(value)


def short_tuple(items: tuple[object, ...]) -> str:
    """Return the ``repr`` of a tuple; of a long one, the first items and the number of the others."""
    if len(items) <= SHOWN:
        return short(items)
    shown = ", ".join(short(item) for item in items[:SHOWN])
    return f"({shown}, ... {len(items) - SHOWN} more)"


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in HTML, every text escaped and long ones cut; an absent value is an empty cell."""
    from html import escape  # noqa: PLC0415 - its table of entities takes a millisecond, and few need it

    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    cells = ("".join(f"<td>{escape(_cell(value))}</td>" for value in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _short.maxstring else text[: _short.maxstring] + "…"
