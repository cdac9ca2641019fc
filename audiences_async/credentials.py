"""API keys: masked when printed, and refreshed by a function if the account has one."""

import asyncio
import base64
import inspect
import json
import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Self, TypeAlias
from urllib.parse import quote, quote_plus

from audiences_async.deadlines import is_cancelled
from audiences_async.errors import ConfigurationError, callback_error

KeyProvider: TypeAlias = Callable[[], str | Awaitable[str]]
"""A function, sync or async, that returns the current API key. A sync one must not block."""

MASK: Final = "***"

_SHORTEST_CUT: Final = 4  # shortest beginning of a key that is masked at a cut; fewer characters reveal nothing
# Letters and digits are never escaped; any other character of a key may be, even twice.
_RUN: Final = re.compile("[A-Za-z0-9]+")
_PIECES: Final = re.compile(r"[A-Za-z0-9]+|\\+|.", re.DOTALL)
_BACKSLASHES: Final = r"\\*+"
_SPELLINGS: Final = 16  # spellings per character


class Secret:
    """A text that is masked when printed; only `reveal` returns it.

    Not a ``str``, because slices and joins of a ``str`` would be plain text again.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{MASK}')"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _not_pickled, ()

    def reveal(self) -> str:
        """Return the plain text."""
        return self._text


def _not_pickled() -> KeyProvider:
    """Return the key provider that a pickled secret is restored as."""
    return _without_key


def _without_key() -> str:
    raise LookupError("API keys are not pickled; create the account again with its key")


class ApiKey(Secret):
    """An API key."""

    __slots__ = ("before",)

    def __init__(self, text: str, *, before: "ApiKey | None" = None) -> None:
        super().__init__(text)
        self.before: ApiKey | None = before
        """The key that this one replaced; a late response may still echo it."""

    def digest(self, salt: bytes, *more: str) -> bytes:
        """Return a keyed digest that identifies the key, together with *more*, without revealing it."""
        return blake2b("\0".join((self._text, *more)).encode(), key=salt, digest_size=16).digest()

    def redact(self, text: str) -> str:
        """Return *text* with every occurrence of the key masked, even if the server has escaped it."""
        lowered = text.lower()
        if any(part in lowered for part in _parts(self._text)):
            text = _finder(self._text).sub(MASK, text)
        return text if self.before is None else self.before.redact(text)

    def redact_start(self, body: bytes, limit: int) -> bytes:
        """Return the first *limit* bytes of *body*, redacted; a key that is cut off at their end is masked too."""
        start = body[:limit]
        for encoding in ("utf-16-le", "utf-16-be"):
            start = start.replace(self._text.encode(encoding), MASK.encode(encoding))
        text = self._without_cut_key(self.redact(start.decode(errors="surrogateescape")))
        start = text.encode(errors="surrogateescape")
        return start if self.before is None else self.before.redact_start(start, len(start))

    def _without_cut_key(self, text: str) -> str:
        end = text[-2 * max(map(len, _forms(self._text))) :].lower()
        for form in _forms(self._text):
            for length in range(min(len(form) - 1, len(end)), _SHORTEST_CUT - 1, -1):
                if end.endswith(form[:length]):
                    return text[:-length] + MASK
        return text

    def validate(self, *, account: str | None) -> None:
        """Refuse a key that cannot be a bearer token.

        Raises:
            ConfigurationError: The key is not text, is empty, has white space around it, or has control characters.
        """
        problem = self._problem()
        if problem:
            raise ConfigurationError(f"the API key {problem}", account=account)

    def _problem(self) -> str | None:
        text: object = self._text
        if not isinstance(text, str):
            return f"must be text or a function that returns text, got {type(text).__name__}"
        if not text:
            return "is empty"
        if any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
            return "has a line break or another control character; strip the newline if it was read from a file"
        if text != text.strip():
            return "has leading or trailing white space"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "has a character that UTF-8 cannot encode"
        return None


@lru_cache(maxsize=64)
def _parts(text: str) -> tuple[str, ...]:
    """Return, in lower case, parts of which one occurs in every text that contains the key in any form."""
    longest = max(_RUN.findall(text), key=len, default="")
    return (longest.lower(), _base64(text).lower(), _base64(text, url=True).lower())


@lru_cache(maxsize=64)
def _finder(text: str) -> re.Pattern[str]:
    spelled = "".join(map(_pattern, _PIECES.findall(text)))
    # Matched once, at the start of a run of backslashes, so that matching takes linear time.
    start = r"(?<!\\)" if text.startswith("\\") else ""
    forms = (start + spelled.removeprefix(_BACKSLASHES), re.escape(_base64(text)), re.escape(_base64(text, url=True)))
    return re.compile("|".join(forms), re.IGNORECASE)


@lru_cache(maxsize=64)
def _forms(text: str) -> tuple[str, ...]:
    """Return, in lower case, the forms in which a key may be cut off: escaped once, all characters alike."""
    spelled = zip(*(_spellings(character) for character in text), strict=True)
    return tuple({"".join(characters).lower() for characters in spelled})


def _pattern(piece: str) -> str:
    """Return a pattern for a piece of the key, which may have been escaped more than once."""
    if _RUN.fullmatch(piece):
        return piece
    if piece.startswith("\\"):
        escaped = "|".join(re.escape(spelling) for spelling in _spellings("\\") if not spelling.startswith("\\"))
        return rf"(?:\\{{{len(piece)},}}+|(?:{_BACKSLASHES}(?:u005c|{escaped})){{{len(piece)}}})"
    spelled = {spelling.removeprefix("\\") for spelling in _spellings(piece)}
    alternatives = "|".join(re.escape(each).replace(r"\\", r"\\++") for each in sorted(spelled))
    return f"{_BACKSLASHES}(?:{alternatives})"


def _spellings(character: str) -> tuple[str, ...]:
    """Return the character's spellings: plain, and escaped for JSON, JavaScript, URLs, HTML and Python's ``repr``."""
    if _RUN.fullmatch(character):
        return (character,) * _SPELLINGS
    import html.entities  # noqa: PLC0415 - takes 1 ms, and only errors need it

    named = html.entities.codepoint2name.get(ord(character), "apos")
    utf16 = character.encode("utf-16-be").hex()
    utf8 = character.encode()
    return (
        character,
        json.dumps(character)[1:-1],
        json.dumps(character, ensure_ascii=False)[1:-1],
        "".join(rf"\u{utf16[at : at + 4]}" for at in range(0, len(utf16), 4)),
        "".join(f"%{byte:02x}" for byte in utf8),
        quote(character),
        quote_plus(character),
        html.escape(character),
        f"&#{ord(character)};",
        html.escape(character).replace("&#x27;", "&#039;"),  # PHP's
        f"&#x{ord(character):x};",
        f"&{named};",
        "".join(rf"\x{byte:02x}" if byte > 126 else chr(byte) for byte in utf8),
        repr(character)[1:-1],
        character.encode("latin-1", "replace").decode(errors="surrogateescape"),
        character.encode("ascii", "replace").decode(),
    )


def _base64(text: str, *, url: bool = False) -> str:
    """Return *text* in Base64 without the last characters, which depend on what follows."""
    encoded = base64.b64encode(text.encode(), altchars=b"-_" if url else None).decode()
    return encoded.rstrip("=")[: len(text.encode()) * 4 // 3]


class KeySource:
    """The key from a key function, shared by concurrent calls of one account."""

    def __init__(self, provider: KeyProvider) -> None:
        self._provider = provider
        self._lock = asyncio.Lock()
        self._key: ApiKey | None = None

    async def get(self, *, account: str, refused: ApiKey | None = None) -> ApiKey:
        """Return the current key; a fresh one if the current one is *refused*.

        A lock instead of a shared task: if the caller that holds it is cancelled, the next one takes over.

        Raises:
            ConfigurationError: The function has a programming error, or returned an invalid key.
            TransportError: The function failed for a reason that may be transient.
        """
        async with self._lock:
            if self._key is None or self._key is refused:
                self._key = await _ask(self._provider, account, refused)
            return self._key


async def _ask(provider: KeyProvider, account: str, before: ApiKey | None) -> ApiKey:
    try:
        answer = provider()
        key = ApiKey(await answer if inspect.isawaitable(answer) else answer, before=before)
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise
        raise callback_error("the API key function", error) from error
    del answer  # the plain key leaves this frame before anything else can raise
    key.validate(account=account)
    return key
