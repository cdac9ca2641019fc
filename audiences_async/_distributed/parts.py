"""Where workers put their parts: a directory that all machines share, or object storage (extra ``objectstore``)."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING, Any, Final, ParamSpec, Protocol, TypeVar, runtime_checkable
from urllib.parse import unquote, urlsplit

from attrs import frozen

from audiences_async._jobs import outcome_files
from audiences_async.errors import AudiencesError, ConfigurationError, printable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_P = ParamSpec("_P")
_T = TypeVar("_T")

IN_MEMORY: Final = 2**20
"""Bytes of a part that are kept in memory; a larger one goes to a temporary file."""

# obstore's own retries would go on for three minutes, while a worker tries again by itself.
_OPTIONS: Final[Any] = {"retry_config": {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}}
_REASONS: Final = {
    "FileNotFoundError": "it does not exist",
    "PermissionDeniedError": "permission denied",
    "UnauthenticatedError": "the credentials are not valid",
}
_SCHEMES: Final = ("s3", "gs", "az", "memory")


class PartsError(AudiencesError):
    """The parts cannot be read or written: this machine's or the store's fault, and not that of any account."""

    hint = "check the directory, its free space and permissions, or the bucket and the credentials in the environment"


@runtime_checkable
class PartStore(Protocol):
    """A store of parts, by name: the job's id, a slash, and a file name.

    Every method raises `PartsError` if the store fails.
    """

    @property
    def place(self) -> str:
        """Where the store is, for messages."""

    async def put(self, name: str, content: IO[bytes]) -> None:
        """Write a part atomically: readers see all of it or nothing. An existing part is replaced."""

    async def get(self, name: str) -> IO[bytes] | None:
        """Open a part; ``None`` if it is missing. The caller closes it."""

    async def names(self, job: str) -> list[str]:
        """Return the names of all parts of a job."""

    async def remove(self, name: str) -> None:
        """Remove a part, if it exists."""

    async def remove_all(self, job: str) -> None:
        """Remove all that the job has left in the store, incomplete parts included."""


def open_store(where: "str | os.PathLike[str] | PartStore") -> PartStore:
    """Return the store at a path or a URL: ``s3://``, ``gs://``, ``az://``, ``file://``, or ``memory://`` for tests.

    Raises:
        ConfigurationError: The URL is invalid, or the extra ``objectstore`` is missing.
    """
    if isinstance(where, PartStore):
        return where
    scheme, separator, rest = os.fspath(where).partition("://")
    if not scheme:
        raise ConfigurationError("the place of the parts is empty; name a directory or a URL")
    if not separator:
        return Directory(Path(where))
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigurationError("a file:// URL of the parts must have an absolute path and no host: file:///path")
        return Directory(Path(unquote(urlsplit(os.fspath(where)).path)))
    if scheme not in _SCHEMES:
        known = ", ".join(f"{each}://" for each in (*_SCHEMES[:-1], "file"))
        raise ConfigurationError(f"parts must be in a directory or at a URL that begins with {known}")
    if "@" in rest or "?" in rest:
        raise ConfigurationError("the URL of the parts must not contain credentials; set them in the environment")
    if find_spec("obstore") is None:
        raise ConfigurationError("object storage needs an extra: pip install 'audiences_async[objectstore]'")
    return Objects(f"{scheme}://{rest}")


async def check(store: PartStore) -> None:
    """Write and remove an object, so that a wrong place or credential shows before any account is fetched.

    Raises:
        PartsError: The store cannot be written.
    """
    folder = f"check-{token_hex(8)}"
    with SpooledTemporaryFile(IN_MEMORY) as nothing:
        await store.put(f"{folder}/empty", nothing)
    await store.remove_all(folder)


@frozen
class Directory:
    """A directory that all machines share."""

    path: Path

    @property
    def place(self) -> str:
        """The path."""
        return printable(str(self.path))

    async def put(self, name: str, content: IO[bytes]) -> None:
        """Write a part to a temporary file beside it, and rename that."""
        await self._run("write to", _write, self.path / name, content)

    async def get(self, name: str) -> IO[bytes] | None:
        """Open a part; ``None`` if it is missing."""
        return await self._run("read", _open, self.path / name)

    async def names(self, job: str) -> list[str]:
        """Return the names of all parts of a job, without incomplete ones."""
        found = await self._run("read", _entries, self.path / job)
        return [f"{job}/{name}" for name in found if not name.startswith(".")]

    async def remove(self, name: str) -> None:
        """Remove a part, if it exists."""
        await self._run("write to", _unlink, self.path / name)

    async def remove_all(self, job: str) -> None:
        """Remove the job's folder."""
        await asyncio.to_thread(shutil.rmtree, self.path / job, ignore_errors=True)

    async def _run(self, action: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except OSError as error:
            raise PartsError(f"cannot {action} {self.place}: {error.strerror or error}") from error


def _write(path: Path, content: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content.seek(0)
    with outcome_files.successor(path) as file:
        shutil.copyfileobj(content, file)


def _open(path: Path) -> IO[bytes] | None:
    with suppress(FileNotFoundError):
        return path.open("rb")
    return None


def _entries(folder: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return [path.name for path in folder.iterdir()]
    return []


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


class Objects:
    """Object storage, through obstore, which finds the credentials in the environment.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, or ``memory://``.

    Raises:
        ConfigurationError: The URL is invalid.
    """

    def __init__(self, url: str) -> None:
        import obstore  # noqa: PLC0415 - of an optional extra
        from obstore.store import from_url  # noqa: PLC0415

        self._api = obstore
        self._url = url
        try:
            self._store: ObjectStore = from_url(url, **({} if url.startswith("memory:") else _OPTIONS))
        except Exception as error:  # noqa: BLE001 - obstore raises its own errors, and built-in ones
            raise ConfigurationError(f"invalid URL of parts {self.place}: {_reason(error)}") from None

    @property
    def place(self) -> str:
        """The URL."""
        return printable(self._url)

    async def put(self, name: str, content: IO[bytes]) -> None:
        """Upload a part; it is seen when it is complete."""
        content.seek(0)
        await self._run("write to", self._api.put_async(self._store, name, content))

    async def get(self, name: str) -> IO[bytes] | None:
        """Download a part; ``None`` if there is none."""
        return await self._run("read", self._download(name))

    async def names(self, job: str) -> list[str]:
        """Return the names of all parts of a job."""
        return await self._run("read", self._listed(job))

    async def remove(self, name: str) -> None:
        """Remove a part, if it exists."""
        await self._run("write to", self._delete(name))

    async def remove_all(self, job: str) -> None:
        """Remove all parts of a job."""
        await asyncio.gather(*(self.remove(name) for name in await self.names(job)))

    async def _download(self, name: str) -> IO[bytes] | None:
        try:
            found = await self._api.get_async(self._store, name)
        except FileNotFoundError:
            return None
        content = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - the caller closes it
        async for piece in found.stream():
            content.write(piece)
        content.seek(0)
        return content

    async def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            await self._api.delete_async(self._store, name)

    async def _listed(self, job: str) -> list[str]:
        found = [each["path"] async for page in self._api.list(self._store, prefix=job) for each in page]
        return [str(path) for path in found]

    async def _run(self, action: str, doing: Awaitable[_T]) -> _T:
        try:
            return await doing
        except Exception as error:  # noqa: BLE001 - obstore raises its own errors, and built-in ones
            raise PartsError(f"cannot {action} {self.place}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return why obstore failed, without its message, which may hold a credential."""
    return _REASONS.get(type(error).__name__, type(error).__name__)
