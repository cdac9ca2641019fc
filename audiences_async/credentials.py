"""The API key: behind a mask, and fresh where a function gives it."""

import asyncio
import html
import inspect
import json
import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Final, TypeAlias
from urllib.parse import quote, quote_plus

from audiences_async.errors import ConfigurationError

KeyProvider: TypeAlias = Callable[[], str | Awaitable[str]]
"""A function, sync or async, that gives the current API key. A sync one must not block."""

MASK: Final = "***"

# What .NET's encoders escape beyond what JSON and HTML need; the service is a .NET one.
_DOTNET_JSON: Final = "\"&'+<>`"
_DOTNET_HTML: Final = "+`"
_TELLING: Final = 4  # characters of a key that may stand at a cut without telling anything


class ApiKey:
    """An API key that does not print; `reveal` is the only way to its text.

    Not a ``str``: slices and joins of one would be plain text again.
    """

    __slots__ = ("_text", "before")

    def __init__(self, text: str, *, before: "ApiKey | None" = None) -> None:
        self._text = text
        self.before: ApiKey | None = before
        """The key that this one took the place of; a late reply may still echo it."""

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
        redacted = _finder(self._text).sub(MASK, text)
        return redacted if self.before is None else self.before.redact(redacted)

    def redact_start(self, body: bytes, limit: int) -> bytes:
        """The first *limit* bytes of a body, as `redact`; a key that the cut would leave a part of is masked too."""
        start = body[:limit]
        for encoding in ("utf-16-le", "utf-16-be"):
            start = start.replace(self._text.encode(encoding), MASK.encode(encoding))
        text = self.redact(start.decode(errors="surrogateescape"))
        if len(body) >= limit:
            text = self._without_cut_key(text)
        return text.encode(errors="surrogateescape")

    def _without_cut_key(self, text: str) -> str:
        for spelling in _spellings(self._text):
            for length in range(min(len(spelling) - 1, len(text)), _TELLING - 1, -1):
                if text.endswith(spelling[:length]):
                    return text[:-length] + MASK
        return text

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
def _spellings(text: str) -> tuple[str, ...]:
    """The key as it is, and as servers escape it in JSON, URLs and HTML; longest first."""
    plain_json = json.dumps(text)[1:-1]
    spelled = {
        text,
        plain_json,
        plain_json.replace("/", r"\/"),
        _escaped(text, _DOTNET_JSON, r"\u{:04X}"),
        quote(text, safe=""),
        quote(text),
        quote_plus(text),
        html.escape(text),
        _escaped(html.escape(text), _DOTNET_HTML, "&#x{:X};"),
        str(text.encode())[2:-1],
    }
    return tuple(sorted(spelled, key=len, reverse=True))


@lru_cache(maxsize=64)
def _finder(text: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, _spellings(text))), re.IGNORECASE)


def _escaped(text: str, characters: str, form: str) -> str:
    return "".join(form.format(ord(c)) if c in characters or c > "\x7f" else c for c in text)


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
                self._key = await _ask(self._provider, account, refused)
            return self._key


async def _ask(provider: KeyProvider, account: str, before: ApiKey | None) -> ApiKey:
    try:
        answer = provider()
        key = ApiKey(await answer if inspect.isawaitable(answer) else answer, before=before)
    except Exception as error:
        message = f"the function for the API key raised {type(error).__name__}"
        raise ConfigurationError(message, account=account) from error
    del answer  # the plain key leaves this frame before anything else can raise
    key.validate(account=account)
    return key
