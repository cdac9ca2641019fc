"""The failed accounts of a job as an account file, which the next job reads; it never holds a key."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from audiences_async._jobs.outcome_files import lines, write_whole
from audiences_async.accounts import AccountFile
from audiences_async.cli import cells
from audiences_async.errors import ConfigurationError, printable

_COLUMNS: Final = (
    "error", "name", "api_key_env", "api_key_from", "status", "stop_reason", "retry_after", "message",
)  # fmt: skip
_SUFFIXES: Final = (".csv", ".ndjson", ".jsonl")
_HEADER: Final = cells.encode([_COLUMNS])
# How the files begin that `write` writes; an account file of the user's own does not begin like this.
_START: Final = re.compile(rb'\{"error":"\w+","name":"|' + re.escape(_HEADER))


def check(path: Path) -> None:
    """Refuse a file that `write` could not write, or must not replace.

    Raises:
        ConfigurationError: The name has none of the supported extensions; or the file exists, and is something else.
        OSError: The file cannot be read.
    """
    if path.suffix.lower() not in _SUFFIXES:
        problem = f"--errors {printable(str(path))}: the name must end in one of {', '.join(_SUFFIXES)}"
        raise ConfigurationError(f"{problem}, so that --accounts can read it")
    if path.exists():
        if path.is_file():
            with path.open("rb") as file:
                start = file.readline()
            if not start or _START.match(start):
                return
        problem = f"{printable(str(path))} was not written by --errors"
        raise ConfigurationError(f"{problem}; choose another file")


def write(path: Path, outcomes: Path, accounts: AccountFile) -> None:
    """Write the failed accounts of the NDJSON *outcomes*, atomically; without any, the file has no account.

    Instead of its key, an account has ``api_key_env``, or ``api_key_from``: the account file with its key.
    """
    failed = {line.account: line.text for line in lines(outcomes) if not line.ok}
    sources = accounts.key_sources(failed)
    records = (_record(name, text, sources[name]) for name, text in failed.items())
    write_whole(path, _as_csv(records) if path.suffix.lower() == ".csv" else _as_ndjson(records), like=outcomes)


def _record(name: str, text: bytes, source: tuple[str, str]) -> dict[str, Any]:
    error = msgspec.json.decode(text)["error"]
    known = error | {"error": error["type"], "name": name, source[0]: source[1]}
    return {column: known.get(column) for column in _COLUMNS}


def _as_ndjson(records: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    return (msgspec.json.encode(record) + b"\n" for record in records)


def _as_csv(records: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    yield _HEADER
    for record in records:
        # What comes from the account file goes back to it unchanged; an apostrophe would change the name.
        ours = {name: record[name] or "" for name in ("name", "api_key_env", "api_key_from")}
        yield cells.encode([[ours[name] if name in ours else cells.cell(value) for name, value in record.items()]])
