"""The API key: behind a mask, and fresh where a function gives it."""

import asyncio
import html
import inspect
import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Final, TypeAlias

from audiences_async.errors import ConfigurationError

KeyProvider: TypeAlias = Callable[[], str | Awaitable[str]]
"""A function, sync or async, that gives the current API key. A sync one must not block."""

MASK: Final = "***"


class ApiKey:
    """An API key that does not print; `reveal` is the only way to its text.

    Not a ``str``: slices and joins of one would be plain text again.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"ApiKey('{MASK}')"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, ApiKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def reveal(self) -> str:
        """The key's text."""
        return self._text

    def redact(self, text: str) -> str:
        """The same text with every occurrence of the key masked, however a server may have escaped it."""
        return _spellings(self).sub(MASK, text)

    def redact_bytes(self, body: bytes) -> bytes:
        """As `redact`, for a body of any encoding."""
        return self.redact(body.decode(errors="surrogateescape")).encode(errors="surrogateescape")

    def validate(self, *, account: str | None) -> None:
        """Refuse what cannot be a bearer token.

        Raises:
            ConfigurationError: The key is no text, is empty, is padded with white space, or has control characters.
        """
        problem = self._problem()
        if problem:
            raise ConfigurationError(f"the API key {problem}", account=account)

    def _problem(self) -> str | None:
        text: object = self._text
        if not isinstance(text, str):
            return f"must be text or a function that gives text, got {type(text).__name__}"
        if not text:
            return "is empty"
        if any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
            return "has a line break or another control character; was it read from a file with its last newline?"
        if text != text.strip():
            return "has white space around it"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "has a character that UTF-8 cannot encode"
        return None


@lru_cache(maxsize=64)
def _spellings(key: ApiKey) -> re.Pattern[str]:
    r"""Finds the key as it is and as JSON, a URL or HTML would spell it: .NET writes ``+`` as ``\u002B``."""
    return re.compile("".join(_spellings_of(character) for character in key.reveal()), re.IGNORECASE)


def _spellings_of(character: str) -> str:
    code = ord(character)
    url = "".join(f"%{byte:02x}" for byte in character.encode())
    named = re.escape(html.escape(character))
    return rf"(?:\\?{re.escape(character)}|\\u{code:04x}|{url}|&\#0*{code};|&\#x0*{code:x};|{named})"


class KeySource:
    """The key that a function gives, shared by the calls of one account that run at the same time."""

    def __init__(self, provider: KeyProvider) -> None:
        self._provider = provider
        self._lock = asyncio.Lock()
        self._key: ApiKey | None = None

    async def get(self, *, account: str, refused: ApiKey | None = None) -> ApiKey:
        """The current key; a fresh one where the current one is *refused*.

        A lock and not a shared task: a caller that is cancelled while it asks leaves the asking to the next one.

        Raises:
            ConfigurationError: The function raised, or gave what cannot be a key.
        """
        async with self._lock:
            if self._key is None or self._key is refused:
                self._key = await _ask(self._provider, account)
            return self._key


async def _ask(provider: KeyProvider, account: str) -> ApiKey:
    try:
        answer = provider()
        key = ApiKey(await answer if inspect.isawaitable(answer) else answer)
    except Exception as error:
        message = f"the function for the API key raised {type(error).__name__}"
        raise ConfigurationError(message, account=account) from error
    del answer  # the plain key leaves this frame before anything else can raise
    key.validate(account=account)
    return key
