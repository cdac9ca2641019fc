"""Compressed files: a name that ends in ``.gz`` selects gzip, and in ``.zst`` Zstandard; others are not compressed."""

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from attrs import frozen

from audiences_async.errors import ConfigurationError

_LEVEL: Final = 6  # of gzip: 9, the default of the module, takes three times as long for 1 % less
_PIECE: Final = 2**16  # bytes, read at once
_GZIP: Final = 16 + zlib.MAX_WBITS  # has zlib expect a gzip header


class UnreadableError(Exception):
    """The file is not compressed as its name says, or is corrupt."""


class _Decompressor(Protocol):
    """What `zlib` and `zstd` have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


@frozen
class _Codec:
    """A kind of compression.

    Attributes:
        writer: Returns a file that compresses into another one; closing it leaves the other one open.
        decompressor: Returns a decompressor of one member or frame.
        errors: What it raises for corrupt data.
    """

    writer: Callable[[BinaryIO], Any]
    decompressor: Callable[[], _Decompressor]
    errors: tuple[type[Exception], ...]


def is_compressed(path: Path) -> bool:
    """Return whether the file's name selects a compression."""
    return path.suffix.lower() in _CODECS


def check_available(path: Path) -> None:
    """Refuse a name whose compression needs an extra that is not installed.

    Raises:
        ConfigurationError: The extra is missing.
    """
    if is_compressed(path):
        _codec(path)


def compressing(file: BinaryIO, path: Path) -> AbstractContextManager[BinaryIO]:
    """Return a file that compresses into *file* as the name of *path* says; closing it completes the last member.

    What was written before a ``flush()`` can be read even if the file is cut off after it.
    """
    return _codec(path).writer(file) if is_compressed(path) else nullcontext(file)


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed. The last one has no line break if the file was cut off in it.

    Raises:
        UnreadableError: The file is corrupt.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        yield from _lines(_decompressed(file, _codec(path))) if is_compressed(path) else file


def _codec(path: Path) -> _Codec:
    return _CODECS[path.suffix.lower()]()


def _gzip() -> _Codec:
    def writer(file: BinaryIO) -> Any:
        return gzip.GzipFile(fileobj=file, filename="", mode="wb", compresslevel=_LEVEL)

    return _Codec(writer, lambda: zlib.decompressobj(_GZIP), (zlib.error,))


def _zstd() -> _Codec:
    zstd: Any = _zstd_module()
    return _Codec(lambda file: zstd.ZstdFile(file, "w"), zstd.ZstdDecompressor, (zstd.ZstdError,))


def _zstd_module() -> Any:
    """Import the standard library's module, which is new in Python 3.14, or its backport."""
    try:
        return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        problem = "a file that ends in .zst needs the extra 'zstd': pip install 'audiences_async[zstd]'"
        raise ConfigurationError(problem) from None


_CODECS: Final[Mapping[str, Callable[[], _Codec]]] = {".gz": _gzip, ".zst": _zstd}


def _decompressed(file: BinaryIO, codec: _Codec) -> Iterator[bytes]:
    """Yield what can be decompressed, member by member; a last one that is cut off ends without an error."""
    decompressor = codec.decompressor()
    while data := file.read(_PIECE):
        while data:
            if decompressor.eof:
                decompressor = codec.decompressor()
            try:
                yield decompressor.decompress(data)
            except codec.errors as error:
                raise UnreadableError(str(error)) from None
            data = decompressor.unused_data


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for piece in pieces:
        first, *more = piece.split(b"\n")
        rest.append(first)
        for each in more:
            yield b"".join(rest) + b"\n"
            rest = [each]
    last = b"".join(rest)
    if last:
        yield last
