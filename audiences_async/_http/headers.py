"""The headers of a reply as callers see them."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async.credentials import ApiKey
from audiences_async.errors import printable

# Most are conventions of frameworks, clouds and proxies; none is standardized.
_REQUEST_IDS: Final = (
    "X-Request-Id", "Request-Id", "X-Correlation-Id", "Correlation-Id", "X-Ms-Request-Id", "X-Amzn-RequestId",
    "X-Trace-Id", "CF-Ray",
)  # fmt: skip
_TRACE: Final = "traceId"  # in the problems of ASP.NET
_LONGEST_ID: Final = 100  # characters


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


def request_id(headers: Mapping[str, str], envelope: Mapping[str, object], key: ApiKey) -> str | None:
    """Return a reply's own identifier, without the key; ``None`` if there is none."""
    found = (headers.get(name) for name in _REQUEST_IDS)
    sent = next((value for value in found if value), None) or envelope.get(_TRACE)
    return printable(key.redact(sent), _LONGEST_ID) if isinstance(sent, str) and sent else None
