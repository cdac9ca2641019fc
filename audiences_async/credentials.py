"""API keys: masked when printed, and refreshed by a function if the account has one."""

import asyncio
import base64
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, Final, Self, TypeAlias
from urllib.parse import quote

from audiences_async._base.deadlines import is_cancelled
from audiences_async.errors import ConfigurationError, callback_error

KeyProvider: TypeAlias = Callable[[], str | Awaitable[str]]
"""A function, sync or async, that returns the current API key. A sync one must not block."""

MASK: Final = "***"

_BREAKS: Final = " \t\r\n\"'<>()[]{},:=.!|"
"""Characters that end a word, unless the key has them. No usual escape of another character has one."""
_SHORTEST: Final = 4  # letters and digits that can be a trace of the key; fewer are in too many words
_SHORTEST_PART: Final = 8  # the same for a part of the key

_Trace: TypeAlias = tuple[str, ...]
"""The runs of letters and digits of a text, in order. Escaping changes the characters between them, and only these."""


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

    __slots__ = ("_traces", "before")

    def __init__(self, text: str, *, before: "ApiKey | None" = None) -> None:
        super().__init__(text)
        self.before: ApiKey | None = before
        """The key that this one replaced; a late response may still echo it."""
        self._traces: list[_Trace] | None = None  # made when a text is first redacted

    def digest(self, salt: bytes) -> bytes:
        """Return a keyed digest that identifies the key without revealing it."""
        return blake2b(self._text.encode(), key=salt, digest_size=16).digest()

    def redact(self, text: str) -> str:
        """Return *text* with the key masked, and each word that has it in an escaped form, or most of it."""
        lowered = text.lower()
        if self._text.lower() in lowered:
            text = re.sub(re.escape(self._text), MASK, text, flags=re.IGNORECASE)
            lowered = text.lower()
        self._traces = self._traces or _traces(self._text)
        for trace in self._traces:
            if _may_be_in(lowered, trace):
                text = _words_with(trace, self._text).sub(MASK, text)
        return text if self.before is None else self.before.redact(text)

    def redact_start(self, body: bytes, limit: int) -> bytes:
        """Return the first *limit* bytes of *body*, redacted; a key that is cut off at their end is masked too."""
        start = body[:limit]
        for encoding in ("utf-16-le", "utf-16-be"):
            start = start.replace(self._text.encode(encoding), MASK.encode(encoding))
        text = start.decode(errors="surrogateescape")
        beginning = self._text[:_SHORTEST]
        trace = _trace(beginning) or (beginning,)
        is_ascii = text.isascii() and beginning.isascii()  # in which case lower case has no exceptions
        if not is_ascii or _may_be_in(text.lower(), trace):
            text = _words_with(trace, self._text, end=r"\Z").sub(rf"\1{MASK}", text)
        start = self.redact(text).encode(errors="surrogateescape")
        return start if self.before is None else self.before.redact_start(start, len(start))

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


def _traces(key: str) -> list[_Trace]:
    """Return the traces of the key and of most of it; a word that has one of them is masked."""
    # Spellings share the trace of the key, except Base64, and all of them if the key has no Latin letters or digits.
    spellings = {key, json.dumps(key), quote(key), key.encode("ascii", "xmlcharrefreplace").decode()}
    forms = spellings.union(_base64(key.encode(), after) for after in range(3))
    return [trace for form in forms for trace in _long_traces(form)]


def _long_traces(form: str) -> list[_Trace]:
    """Return the traces of *form*, and of three quarters of it, that are long enough for no other word to have them."""
    quarter = len(form) // 4  # half a key may be a word that errors need, such as the account's name
    parts = (form[: len(form) - quarter], _SHORTEST_PART), (form[quarter:], _SHORTEST_PART), (form, _SHORTEST)
    return [trace for part, shortest in parts if len("".join(trace := _trace(part))) >= shortest]


def _trace(text: str) -> _Trace:
    return tuple(re.findall("[A-Za-z0-9]+", text))


def _may_be_in(lowered: str, trace: _Trace) -> bool:
    """Return whether a text in lower case may have the trace; otherwise no pattern is made, which takes 0.3 ms."""
    return all(run.lower() in lowered for run in trace)


def _words_with(trace: _Trace, key: str, end: str = "") -> re.Pattern[str]:
    """Return a pattern for the words with the *trace* of the *key*, followed by *end*; group 1 is before the trace."""
    inside = f"[^{re.escape(''.join(c for c in _BREAKS if c not in key))}]"
    # Atomic: the first place of each run decides, so that a word is searched once, in linear time.
    runs = "".join(f"(?>({inside}*?){re.escape(run)})" for run in trace)
    return re.compile(f"(?<!{inside}){runs}{inside}*+{end}", re.IGNORECASE)


def _base64(data: bytes, after: int) -> str:
    """Return *data* in Base64 as it is *after* that many other bytes, without the characters that depend on others."""
    encoded = base64.b64encode(bytes(after) + data).decode()
    return encoded[-(-after * 4 // 3) : (after + len(data)) * 4 // 3]


class KeySource:
    """The key from a key function, shared by concurrent calls of one account, and kept no longer than they run."""

    def __init__(self, provider: KeyProvider) -> None:
        self._provider = provider
        self._lock = asyncio.Lock()
        self._key: ApiKey | None = None
        self.users: int = 0
        """Calls that use it."""

    def release(self) -> None:
        """Note that a call uses it no longer; the last one forgets the key."""
        self.users -= 1
        if not self.users:  # the traceback of a call that was cancelled may hold this for longer
            self._key = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the key inside the block."""
        self.users += 1
        try:
            yield
        finally:
            self.release()

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
        failure = callback_error("the API key function", error)
        failure.account = account
        raise failure from error
    del answer  # the plain key leaves this frame before anything else can raise
    key.validate(account=account)
    return key
