"""Outcomes on disk: NDJSON, one account a line, which is also the checkpoint that a job goes on from."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Final, Self

import msgspec
from attrs import frozen

from audiences_async.errors import AudiencesError, ConfigurationError, StatusError, printable
from audiences_async.models import Fetched, Outcome
from audiences_async.structuring import record

_encode: Final = msgspec.json.Encoder().encode


def line(outcome: Outcome) -> bytes:
    """The outcome as a line of NDJSON: the account with its audiences, or with its error."""
    told: dict[str, Any] = {
        "account": outcome.account.name,
        "ok": outcome.ok,
        "elapsed": round(outcome.elapsed, 6),
    }
    if isinstance(outcome, Fetched):
        told["audiences"] = [record(audience) for audience in outcome.response]
    else:
        told["error"] = _error_record(outcome.error)
    return _encode(told) + b"\n"


def _error_record(error: AudiencesError) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": error.summary,
        "status": error.status if isinstance(error, StatusError) else None,
        "retry_after": error.retry_after,
        "stop_reason": error.stop_reason,
    }


class _Head(msgspec.Struct):
    """What a line tells of its account; the rest of the line is not decoded."""

    account: str
    ok: bool


@frozen
class Line:
    """A line of a file of outcomes.

    Attributes:
        account: The account's name.
        ok: Whether it was fetched.
        text: The line as it stands, with its line break.
    """

    account: str
    ok: bool
    text: bytes


def lines(path: Path) -> Iterator[Line]:
    """The whole lines of a file of outcomes; a last one without its line break was torn by a crash, and left out.

    Raises:
        ConfigurationError: A line that `line` does not write.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            try:
                head = _decode(text)
            except msgspec.MsgspecError:
                problem = f"{printable(str(path))}, line {number}, is no outcome of an account; give another file"
                raise ConfigurationError(problem) from None
            yield Line(head.account, head.ok, text)


_decode: Final = msgspec.json.Decoder(_Head).decode


class OutcomeFile:
    """Outcomes appended to a file, each at once and whole; one process at a time.

    Args:
        path: The file; not there yet, or empty, unless *resume*.
        resume: Go on with what is there: accounts that were fetched are kept, and the others' lines and a torn last one
            are taken out, in a single step that a crash leaves undone or done.

    Attributes:
        fetched: Names of the accounts that the file has.

    Raises:
        ConfigurationError: There is a file already, or one to go on from is none of ours; another process writes it.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self._file = _open_alone(path)
        self._is_regular = path.is_file()  # and no pipe or terminal
        self._path = path.resolve() if self._is_regular else path  # a link stays where it is
        self.fetched: set[str] = set()
        try:
            if resume:
                self._go_on()
            else:
                check_new(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            if self._is_regular:
                os.fsync(self._file.fileno())

    def write(self, outcome: Outcome) -> None:
        """Append an outcome; it is there when this returns, also if the process is killed then."""
        self.append(line(outcome))

    def append(self, text: bytes) -> None:
        """As `write`, of a line as it stands."""
        self._file.write(text)
        self._file.flush()

    def _go_on(self) -> None:
        if not self._is_regular:
            raise ConfigurationError(f"{printable(str(self._path))} is no file that can be read again")
        kept = sum(len(each.text) for each in self._fetched_lines())
        if kept < self._path.stat().st_size:
            self._rewrite()

    def _fetched_lines(self) -> Iterator[Line]:
        """The first line of each account that was fetched."""
        self.fetched.clear()
        for each in lines(self._path):
            if each.ok and each.account not in self.fetched:
                self.fetched.add(each.account)
                yield each

    def _rewrite(self) -> None:
        with successor(self._path) as mended:
            fcntl.flock(mended, fcntl.LOCK_EX)
            mended.writelines(each.text for each in self._fetched_lines())
            mended.flush()
            alone = os.fdopen(os.dup(mended.fileno()), "ab")  # has the lock, too
        self._file.close()
        self._file = alone


def check_new(path: Path) -> None:
    """Refuse a file that has something in it already.

    Raises:
        ConfigurationError: It has.
    """
    if path.is_file() and path.stat().st_size:
        raise ConfigurationError(f"{printable(str(path))} is there already; resume it, or give another file")


def write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file at once: whoever looks, also after a crash, finds the one that was there, or the new one whole."""
    with successor(path) as file:
        file.writelines(chunks)


@contextmanager
def successor(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of *path*, whole, where the block is left without an error."""
    # Several machines may be at the same file, so a process's number does not tell them apart.
    temporary = path.with_name(f".{path.name}.{token_hex(8)}.tmp")
    file = temporary.open("wb")
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):  # of a full disk, once more
            file.close()


def _open_alone(path: Path) -> BinaryIO:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it before may have put a mended one in its place.
        alone = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        alone = False
    if not alone:
        file.close()
        raise ConfigurationError(f"{printable(str(path))} is being written by another process")
    return file
