"""The headers of a reply as callers see them."""

from collections.abc import Iterator, Mapping
from typing import Any

from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async.credentials import ApiKey


class ReplyHeaders(Mapping[str, str]):
    """The headers of an answer, without the key; names are case-insensitive.

    The key is looked for when they are first read: most callers never read them.
    """

    __slots__ = ("_key", "_readable", "_sent")

    def __init__(self, sent: CIMultiDictProxy[str], key: ApiKey) -> None:
        self._sent = sent
        self._key = key
        self._readable: CIMultiDict[str] | None = None

    def __getitem__(self, name: str) -> str:
        return self._redacted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._redacted)

    def __len__(self) -> int:
        return len(self._sent)

    def __repr__(self) -> str:
        return repr(self._redacted)

    def __reduce__(self) -> tuple[Any, ...]:
        return CIMultiDict, (list(self._redacted.items()),)

    @property
    def _redacted(self) -> CIMultiDict[str]:
        if self._readable is None:
            self._readable = redacted(self._sent, self._key)
        return self._readable


def redacted(headers: Mapping[str, str], key: ApiKey) -> CIMultiDict[str]:
    """Return a copy of *headers* with the key masked, in names too."""
    return CIMultiDict((key.redact(name), key.redact(value)) for name, value in headers.items())
