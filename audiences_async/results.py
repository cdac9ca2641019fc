"""Outcomes on disk: NDJSON, one account a line, which is also the checkpoint that a job goes on from."""

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Final, Self

import msgspec
from attrs import frozen

from audiences_async.errors import AudiencesError, ConfigurationError, StatusError, printable
from audiences_async.models import Fetched, Outcome
from audiences_async.structuring import record

_LONGEST_NAME: Final = 200  # bytes; of 255 that a file's name may have
_encode: Final = msgspec.json.Encoder().encode
# How each line goes on after its name, up to where anything may stand.
_STARTS: Final = (b'","ok":true,"elapsed":', b'","ok":false,"elapsed":')
_NAME: Final = re.compile(rb'\{"account":"(?:[^"\\]|\\.)*\\?')


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


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    """What a line says of its account; the rest of the line is not decoded."""

    account: str
    ok: bool
    elapsed: float = 0.0
    audiences: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


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
    """Yield the whole lines of a file of outcomes; a last one that a crash has torn is left out.

    Raises:
        ConfigurationError: A line that `line` does not write.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n") and _is_torn(text):
                return
            try:
                head = _decode(text)
            except msgspec.MsgspecError:
                problem = (
                    f"{printable(str(path))}, line {number}, is not the outcome of an account; choose another file"
                )
                raise ConfigurationError(problem) from None
            yield Line(head.account, head.ok, text)


_decode: Final = msgspec.json.Decoder(_Head).decode


def _is_torn(text: bytes) -> bool:
    """Return whether it is the beginning of a line that `line` writes."""
    name = _NAME.match(text)
    if name is None:
        return b'{"account":"'.startswith(text)
    rest = text[name.end() :]
    return any(start.startswith(rest[: len(start)]) for start in _STARTS)


class OutcomeFile:
    """Outcomes appended to a file, each at once and whole; one process at a time.

    While it is open, the file ``.NAME.lock`` beside it is locked; it stays there.

    Args:
        path: The file; new or empty, unless *resume*.
        resume: Continue what is there: accounts that were fetched are kept, and the others' lines and a torn last one
            are taken out, in a single step that a crash leaves undone or done.
        accounts: Names of the accounts that the file may have when it is resumed; ``None`` means any.

    Attributes:
        fetched: Names of the accounts that the file has.

    Raises:
        ConfigurationError: The file already exists, or is not the checkpoint of this job, or another process writes it.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path, *, resume: bool = False, accounts: Collection[str] | None = None) -> None:
        self._is_regular = not path.exists() or path.is_file()  # and no pipe or terminal
        self._path = path.resolve() if self._is_regular else path  # a link stays where it is
        self._accounts = accounts
        self.fetched: set[str] = set()
        with ExitStack() as stack:
            if self._is_regular:
                stack.enter_context(_locked(self._path))
            if resume:
                self._resume()
            else:
                check_new(path)
            self._file = stack.enter_context(self._path.open("ab"))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if self._is_regular:
                os.fsync(self._file.fileno())

    def write(self, outcome: Outcome) -> None:
        """Append an outcome; it is there when this returns, also if the process is killed then."""
        self.append(line(outcome))

    def append(self, text: bytes) -> None:
        """As `write`, of a line as it stands."""
        self._file.write(text)
        self._file.flush()

    def _resume(self) -> None:
        if not self._is_regular:
            raise ConfigurationError(f"{printable(str(self._path))} is not a regular file, and cannot be resumed")
        if not self._path.exists():
            return
        kept = sum(len(each.text) for each in self._fetched_lines())
        if kept < self._path.stat().st_size:
            with successor(self._path) as mended:
                mended.writelines(each.text for each in self._fetched_lines())

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
def _locked(path: Path) -> Iterator[None]:
    if not path.parent.is_dir():  # which filelock would create
        raise FileNotFoundError(2, "No such directory", str(path.parent))
    import filelock  # noqa: PLC0415 - of optional extras, and a twentieth of a second

    try:
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except filelock.Timeout:
        raise ConfigurationError(f"{printable(str(path))} is being written by another process") from None


def check_new(path: Path) -> None:
    """Refuse a file that has something in it already.

    Raises:
        ConfigurationError: It has.
    """
    if path.is_file() and path.stat().st_size:
        raise ConfigurationError(
            f"output already exists: {printable(str(path))}; use --resume to continue it, or choose another file"
        )


def write_whole(path: Path, chunks: Iterable[bytes], *, like: Path | None = None) -> None:
    """Write a file at once: whoever looks, also after a crash, finds the one that was there, or the new one whole.

    Args:
        path: The file; behind a link, what that leads to.
        chunks: What it is to hold.
        like: The file whose mode and owner it gets if it is new.
    """
    with successor(path.resolve(), like=like) as file:
        file.writelines(chunks)


@contextmanager
def successor(path: Path, *, like: Path | None = None) -> Iterator[BinaryIO]:
    """A new file, which takes the place of *path*, whole, where the block is left without an error."""
    # Several machines may be at the same file, so a process's number does not tell them apart.
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
        with suppress(OSError):  # of a full disk, once more
            file.close()
        temporary.unlink(missing_ok=True)
        raise


def _open_like(path: Path, temporary: Path) -> BinaryIO:
    """Create a file with the mode and, where that is allowed, the owner of the one that it will replace."""
    try:
        like = path.stat()
    except FileNotFoundError:
        return temporary.open("xb")
    mode = stat.S_IMODE(like.st_mode)
    # Never readable by more people than the other, not even for a moment.
    file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode), "wb")
    with suppress(OSError):
        if hasattr(os, "chown"):
            os.chown(temporary, like.st_uid, like.st_gid)
    with suppress(OSError):
        temporary.chmod(mode)  # which the umask has narrowed, and chown perhaps too
    return file
