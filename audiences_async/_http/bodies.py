"""The body of a response, read and decompressed in pieces that neither exceed its cap nor block the event loop."""

import asyncio
import zlib
from collections.abc import Awaitable, Iterator
from functools import partial
from typing import Any, Final, Literal

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy

from audiences_async._http.wire import MAX_ERROR_BODY, Reply

_PIECE_SIZE: Final = 256 * 1024
_CODINGS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class ReplyReader:
    """Reads a response's body into a `Reply`; what has been read so far is a reply too."""

    __slots__ = ("_data", "_headers", "response")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response: aiohttp.ClientResponse = response
        headers: Any = response.headers
        self._headers: CIMultiDictProxy[str] = headers if isinstance(headers, CIMultiDictProxy) else _split(response)
        self._data: bytes | bytearray = b""

    def reply(self, *, exceeded: int | None = None) -> Reply:
        """Return the response, with what has been read of its body."""
        return Reply(self.response.status, self._headers, bytes(self._data), exceeded)

    def whole(self, cap: int) -> Reply | None:
        """Return the response if its plain body has arrived already and is not above *cap* bytes; else ``None``."""
        content, headers = self.response.content, self._headers
        is_plain = hdrs.TRANSFER_ENCODING not in headers and hdrs.CONTENT_ENCODING not in headers
        if is_plain and hdrs.CONTENT_LENGTH in headers and content.is_eof() and content.total_bytes <= cap:
            return Reply(self.response.status, headers, content.read_nowait())
        return None

    @property
    def has_end(self) -> bool:
        """Whether the head announces the end of the body; otherwise the body ends with the connection."""
        return hdrs.CONTENT_LENGTH in self._headers or hdrs.TRANSFER_ENCODING in self._headers

    def read(self, cap: int) -> Awaitable[bool]:
        """Read the body to its end; return ``False`` if it is larger than *cap* bytes and was truncated.

        Raises:
            aiohttp.ClientPayloadError: The body has an unexpected coding, or ended early.
            zlib.error: The compressed data is corrupt, or ended early.
        """
        if hdrs.TRANSFER_ENCODING in self._headers and self._codings(hdrs.TRANSFER_ENCODING) != "chunked":
            raise aiohttp.ClientPayloadError("unexpected Transfer-Encoding")
        coding = self._codings(hdrs.CONTENT_ENCODING) if hdrs.CONTENT_ENCODING in self._headers else "identity"
        if coding in {"", "identity"}:
            return self._read_plain(cap)
        if coding not in _CODINGS:
            sent = ", ".join(self._headers.getall(hdrs.CONTENT_ENCODING))
            raise aiohttp.ClientPayloadError(f"unexpected Content-Encoding {sent}")
        return self._read_compressed(cap, _Inflater(_CODINGS[coding]))

    def _codings(self, name: str) -> str:
        """Return all codings of a header that may occur more than once."""
        return ", ".join(self._headers.getall(name)).strip().lower()

    async def _read_plain(self, cap: int) -> bool:
        content = self.response.content
        self._data = await content.readany()
        if not content.at_eof():
            if (self.response.content_length or 0) > cap:
                cap = min(cap, MAX_ERROR_BODY)  # only the start is kept
            self._data = bytearray(self._data)
            while len(self._data) <= cap and not content.at_eof():
                self._data += await content.readany()
        return len(self._data) <= cap or self._truncated(cap)

    async def _read_compressed(self, cap: int, inflater: "_Inflater") -> bool:
        self._data = bytearray()
        while chunk := await self.response.content.readany():
            for piece in inflater.pieces(chunk):
                self._data += piece
                if len(self._data) > cap:
                    return self._truncated(cap)
                if len(piece) in {0, _PIECE_SIZE} or inflater.members > 1:
                    await asyncio.sleep(0)  # a bomb, or many tiny members, block the event loop for one piece only
        inflater.finish()
        return True

    def _truncated(self, cap: int) -> Literal[False]:
        """Keep no more of a body that exceeds *cap* than an error may show."""
        self._data = self._data[: min(cap, MAX_ERROR_BODY)]
        return False


def _split(response: aiohttp.ClientResponse) -> CIMultiDictProxy[str]:
    """Return the headers one by one: aiohttp 4 joins equal names, and splits lists."""
    text = partial(str, encoding="utf-8", errors="surrogateescape")
    return CIMultiDictProxy(CIMultiDict((text(name), text(value)) for name, value in response.raw_headers))


class _Inflater:
    """Decompress gzip or deflate in pieces of bounded size."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._zlib: zlib._Decompress | None = None
        self.members: int = 0
        """Number of members read to their end."""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield the next part of the body decompressed, in pieces that may be empty."""
        piece = b""
        while data or len(piece) == _PIECE_SIZE:  # zlib may hold more output than fits into a piece
            if self._zlib is None:
                data = data.lstrip(b"\0") if self.members else data  # padding
                if not data:
                    return
                self._zlib = zlib.decompressobj(self._wbits_for(data))
            piece = self._zlib.decompress(data, _PIECE_SIZE)
            data = self._zlib.unconsumed_tail
            if self._zlib.eof:
                # Another member may follow: RFC 1952, section 2.2.
                data, self._zlib = self._zlib.unused_data, None
                self.members += 1
            yield piece

    def finish(self) -> None:
        """Raise if the compressed data was cut short."""
        if self._zlib is not None:
            raise zlib.error("the compressed body is cut short")

    def _wbits_for(self, start: bytes) -> int:
        # RFC 9110, section 8.4.1.2: some servers send "deflate" without the zlib wrapper.
        raw = self._wbits == zlib.MAX_WBITS and start[0] & 0x0F != zlib.DEFLATED
        return -zlib.MAX_WBITS if raw else self._wbits
