"""Outcome files: NDJSON with one account per line, which is also the checkpoint of a job."""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Final, Self

import msgspec
from attrs import frozen

from audiences_async._base.dates import iso_with_z
from audiences_async._jobs import compression
from audiences_async.errors import AudiencesError, ConfigurationError, StatusError, printable
from audiences_async.models import Fetched, Outcome

_LONGEST_NAME: Final = 200  # bytes, of the 255 that a file name may have
_encode: Final = msgspec.json.Encoder().encode
_NULL: Final = msgspec.Raw(b"null")
_EMPTY: Final = msgspec.Raw(b"[]")
# Beginning of each line after the account's name; anything may follow.
_STARTS: Final = (b'","ok":true,"elapsed":', b'","ok":false,"elapsed":')
_NAME: Final = re.compile(rb'\{"account":"(?:[^"\\]|\\.)*\\?')


def line(outcome: Outcome, *, fetched_at: datetime | None = None) -> bytes:
    """Return the outcome as a line of NDJSON: the account with its audiences or its error, always with the same keys.

    Args:
        outcome: The outcome.
        fetched_at: When it came; ``None`` means now.
    """
    time = _response_time(outcome)
    fields = {
        "account": outcome.account.name,
        "ok": outcome.ok,
        "elapsed": round(outcome.elapsed, 6),
        "fetched_at": iso_with_z(fetched_at or datetime.now(UTC)),
        "response_time": None if time is None else iso_with_z(time),
        "audiences": [audience.to_dict() for audience in outcome.response] if isinstance(outcome, Fetched) else [],
        "error": None if isinstance(outcome, Fetched) else _error_record(outcome.error),
    }
    return _encode(fields) + b"\n"


def _response_time(outcome: Outcome) -> datetime | None:
    """Return the service's clock when it answered, also if it refused; ``None`` if it is not known."""
    if isinstance(outcome, Fetched):
        return outcome.response.response_time
    return outcome.error.response_time if isinstance(outcome.error, StatusError) else None


def _error_record(error: AudiencesError) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": error.summary,
        "status": error.status if isinstance(error, StatusError) else None,
        "retry_after": error.retry_after,
        "stop_reason": error.stop_reason,
    }


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    """A line whose values stay as they are. A line of version 0.2 lacks some keys: it gets them here."""

    account: str
    ok: bool
    elapsed: float = 0.0
    fetched_at: msgspec.Raw = _NULL
    response_time: msgspec.Raw = _NULL
    audiences: msgspec.Raw = _EMPTY
    error: msgspec.Raw = _NULL


@frozen
class Line:
    """A line of an outcome file.

    Attributes:
        account: The account's name.
        ok: Whether the account was fetched.
        text: The line with its line break; it has every key.
    """

    account: str
    ok: bool
    text: bytes


def lines(path: Path) -> Iterator[Line]:
    """Yield the complete lines of an outcome file, without a last line that a crash has cut off.

    Raises:
        ConfigurationError: A line was not written by `line`.
        OSError: The file cannot be read.
    """
    try:
        yield from read_lines(compression.lines(path), str(path))
    except compression.UnreadableError as error:
        problem = f"{printable(str(path))} is not compressed as its name says, or is corrupt: {error}"
        raise ConfigurationError(f"{problem}; choose another file") from None


def read_lines(texts: Iterable[bytes], name: str) -> Iterator[Line]:
    """Do the same with the lines of an open file, whose *name* is for messages."""
    for number, text in enumerate(texts, 1):
        if not text.endswith(b"\n") and _is_torn(text):
            return
        head = _head(name, number, text)
        yield Line(head.account, head.ok, _encode(head) + b"\n")


def _head(name: str, number: int, text: bytes) -> _Head:
    with suppress(msgspec.MsgspecError):
        return _decode(text)
    where = f"{printable(name)}, line {number},"
    hint = "choose another file, or use the options --output and --rows that it was written with"
    raise ConfigurationError(f"{where} is not the outcome of an account; {hint}")


_decode: Final = msgspec.json.Decoder(_Head).decode


def _is_torn(text: bytes) -> bool:
    """Return whether *text* is the beginning of a line that `line` writes."""
    name = _NAME.match(text)
    if name is None:
        return b'{"account":"'.startswith(text)
    rest = text[name.end() :]
    return any(start.startswith(rest[: len(start)]) for start in _STARTS)


class OutcomeFile:
    """Append outcomes to a file, each one immediately and whole. Only one process can write it.

    While it is open, the file ``.NAME.lock`` beside it is locked; the lock file stays there.

    Args:
        path: The file; new or empty, unless *resume*.
        resume: Whether to continue an existing file: fetched accounts are kept; failed accounts and an incomplete last
            line are removed, in one atomic step.
        accounts: Names that a resumed file may contain; ``None`` means any.

    Attributes:
        fetched: Names of the accounts in the file that were fetched.

    Raises:
        ConfigurationError: The file already exists, is not the checkpoint of this job, or is open in another process.
        OSError: The file cannot be read or written.
    """

    def __init__(self, path: Path, *, resume: bool = False, accounts: Collection[str] | None = None) -> None:
        self._is_regular = not path.exists() or path.is_file()  # not a pipe or terminal
        self._path = path  # its name selects the compression
        self._target = path.resolve() if self._is_regular else path  # a symbolic link stays in place
        self._accounts = accounts
        self.fetched: set[str] = set()
        compression.check_available(path)
        with ExitStack() as stack:
            if self._is_regular:
                stack.enter_context(_locked(self._target))
            if resume:
                self._resume()
            else:
                check_new(path)
            file = stack.enter_context(self._target.open("ab"))
            if self._is_regular:
                stack.callback(lambda: os.fsync(file.fileno()))
            self._file = stack.enter_context(_flushed(file, path))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, outcome: Outcome) -> None:
        """Append an outcome. It survives a kill of the process once this returns."""
        self.append(line(outcome))

    def append(self, text: bytes) -> None:
        """Append a complete line, as `write` does."""
        self._file.write(text)
        self._file.flush()

    def _resume(self) -> None:
        if not self._is_regular:
            raise ConfigurationError(f"{printable(str(self._path))} is not a regular file and cannot be resumed")
        if not self._path.exists() or self._is_as_kept():
            return
        with successor(self._target) as file, compression.compressing(file, self._path) as mended:
            mended.writelines(each.text for each in self._fetched_lines())

    def _is_as_kept(self) -> bool:
        """Return whether the file has nothing but the lines to keep, so that it can be appended to."""
        kept = (each.text for each in self._fetched_lines())
        same = all(new == old for new, old in zip_longest(kept, compression.lines(self._path)))
        # A compressed file may lack the end of its last member: it is always written anew.
        return same and not compression.is_compressed(self._path)

    def _fetched_lines(self) -> Iterator[Line]:
        """Yield the first line of each account that was fetched."""
        self.fetched.clear()
        for each in lines(self._path):
            if self._accounts is not None and each.account not in self._accounts:
                problem = f"has account '{printable(each.account)}', which is not in the accounts file"
                hint = "use --resume with the accounts that it was written for, or choose another file"
                raise ConfigurationError(f"{printable(str(self._path))} {problem}; {hint}")
            if each.ok and each.account not in self.fetched:
                self.fetched.add(each.account)
                yield each


@contextmanager
def _flushed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """Yield a file that compresses into *file*, all of which has reached the system at the end of the block."""
    with compression.compressing(file, path) as compressed:
        yield compressed
    file.flush()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    if not path.parent.is_dir():  # filelock would create it
        raise FileNotFoundError(2, "No such directory", str(path.parent))
    import filelock  # noqa: PLC0415 - an optional dependency that takes 50 ms to import

    try:
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except filelock.Timeout:
        raise ConfigurationError(f"{printable(str(path))} is being written by another process") from None


def check_new(path: Path) -> None:
    """Refuse a file that already has content.

    Raises:
        ConfigurationError: The file has content.
    """
    if path.is_file() and path.stat().st_size:
        raise ConfigurationError(
            f"output already exists: {printable(str(path))}; use --resume to continue it, or choose another file"
        )


def write_whole(path: Path, chunks: Iterable[bytes], *, like: Path | None = None) -> None:
    """Write a file atomically: readers see the old content or the new, even after a crash.

    Args:
        path: The file; a symbolic link is followed.
        chunks: The new content.
        like: File whose mode and owner a new file gets.
    """
    with successor(path.resolve(), like=like) as file, compression.compressing(file, path) as end:
        end.writelines(chunks)


@contextmanager
def successor(path: Path, *, like: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a new file, which replaces *path* if the block ends without an error."""
    # A random name, because processes on several machines may share the directory and a process id is not unique.
    name = path.name if len(os.fsencode(path.name)) <= _LONGEST_NAME else ""
    temporary = path.with_name(f".{name}.{token_hex(8)}.tmp")
    file = _open_like(path if like is None or path.exists() else like, temporary)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # a full disk fails again
            file.close()
        temporary.unlink(missing_ok=True)
        raise


def _open_like(path: Path, temporary: Path) -> BinaryIO:
    """Create *temporary* with the mode and, if permitted, the owner of the file that it will replace."""
    try:
        like = path.stat()
    except FileNotFoundError:
        return temporary.open("xb")
    mode = stat.S_IMODE(like.st_mode)
    # Never readable by more users than the file it replaces, not even for a moment.
    file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode), "wb")
    with suppress(OSError):
        if hasattr(os, "chown"):
            os.chown(temporary, like.st_uid, like.st_gid)
    with suppress(OSError):
        temporary.chmod(mode)  # restore what the umask, and perhaps chown, has removed
    return file
