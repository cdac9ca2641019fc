"""The public values: accounts, audiences and responses.

Field names are the service's own: https://api.commbox.io/ (GET /audiences).
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import chain
from typing import Any, ClassVar, Final, Literal, TypeAlias, overload

import msgspec
from attrs import field, frozen

from audiences_async._base.dates import iso_with_z
from audiences_async._base.display import SHOWN, html_table, short, short_tuple
from audiences_async.credentials import ApiKey, KeyProvider
from audiences_async.errors import AudiencesError, ConfigurationError


@frozen(init=False, repr=False)
class Account:
    """An account of the service: a label and its API key.

    Args:
        name: A label for errors, events and outcomes; not empty. Two accounts may have the same one.
        api_key: The bearer token, or a function (sync or async) that returns it. The function is called once per call
            of the client; and again if the service answers 401, and the request is repeated with what it returns then.
            Concurrent calls with the same name and function share the result; if the call that asked is cancelled, the
            next one asks. The key never appears in a ``repr``.

    Raises:
        ConfigurationError: The name is empty, or the key is empty, has white space around it or has control characters.
    """

    name: str
    _credential: ApiKey | KeyProvider

    def __init__(self, name: str, api_key: str | KeyProvider) -> None:
        # The plain key leaves this frame's locals before anything can raise: tracebacks may print locals.
        credential = api_key if callable(api_key) else ApiKey(api_key)
        del api_key
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"an account needs a non-empty name, got {name!r}")
        if isinstance(credential, ApiKey):
            credential.validate(account=name)
        self.__attrs_init__(name, credential)

    def __hash__(self) -> int:
        return hash(self.name)  # computed for each call; hashing the key would take longer

    def __repr__(self) -> str:
        # The name is missing if __init__ raised: a traceback with locals must still be able to print it.
        return f"Account({getattr(self, 'name', '?')!r})"

    @property
    def api_key(self) -> str | KeyProvider:
        """The API key, or the function that returns it."""
        return self._credential.reveal() if isinstance(self._credential, ApiKey) else self._credential

    @property
    def credential(self) -> ApiKey | KeyProvider:
        """The masked API key, or the function that returns it."""
        return self._credential


class _EmptyDict(dict[str, Any]):
    """An immutable empty dict, shared by all audiences: 100,000 dicts would keep the garbage collector busy."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("this mapping cannot be changed")

    __setitem__ = __ior__ = setdefault = update = _refuse

    def __reduce__(self) -> str:
        return "NOTHING"  # copies and pickles are the same object


NOTHING: Final[Mapping[str, Any]] = _EmptyDict()

_COLUMNS: Final = ("id", "name", "created_time", "user_count", "type")
"""The documented fields of a record; `help/architecture.md` lists the places of a new one."""
_ROWS_IN_HTML: Final = 10


@frozen(weakref_slot=False)
class StaticAudience:
    """An audience with a fixed list of users.

    Attributes:
        id: The service's identifier; never empty.
        name: The audience's name, as entered by its owner.
        created_time: Time of creation; aware, in UTC, to the microsecond.
        user_count: Users in the audience now; 0 or more.
        extra: Undocumented fields, unchanged. Compared by ``==``, but not hashed.
    """

    type: ClassVar[Literal["Static"]] = "Static"

    id: str
    name: str
    created_time: datetime
    user_count: int
    extra: Mapping[str, Any] = field(default=NOTHING, hash=False, repr=short)

    def to_dict(self) -> dict[str, Any]:
        """Return the service's own record as plain data for JSON: all fields, ``created_time`` with ``Z``, ``type``."""
        known = {"id": self.id, "name": self.name, "created_time": iso_with_z(self.created_time)}
        return {**known, "user_count": self.user_count, "type": self.type, **self.extra}


@frozen(weakref_slot=False)
class DynamicAudience:
    """An audience computed from rules; the service reports no user count for it.

    Attributes:
        id: The service's identifier; never empty.
        name: The audience's name, as entered by its owner.
        created_time: Time of creation; aware, in UTC, to the microsecond.
        extra: Undocumented fields, unchanged. Compared by ``==``, but not hashed.
    """

    type: ClassVar[Literal["Dynamic"]] = "Dynamic"

    id: str
    name: str
    created_time: datetime
    extra: Mapping[str, Any] = field(default=NOTHING, hash=False, repr=short)

    def to_dict(self) -> dict[str, Any]:
        """Return the service's own record as plain data for JSON: all fields, ``created_time`` with ``Z``, ``type``."""
        known = {"id": self.id, "name": self.name, "created_time": iso_with_z(self.created_time)}
        return {**known, "type": self.type, **self.extra}


@frozen(weakref_slot=False)
class UnknownAudience:
    """An audience of a type that this version does not know; kept whole, never dropped.

    Attributes:
        type: The type as sent; never empty.
        id: The identifier; ``None`` if it is missing or unreadable.
        name: The name; ``None`` if it is missing or unreadable.
        created_time: Aware, in UTC; ``None`` if it is missing or unreadable.
        raw: The whole record as sent. Compared by ``==``, but not hashed.
    """

    type: str
    id: str | None = None
    name: str | None = None
    created_time: datetime | None = None
    raw: Mapping[str, Any] = field(default=NOTHING, hash=False, repr=short)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as sent, as plain data for JSON."""
        return dict(self.raw)


Audience: TypeAlias = StaticAudience | DynamicAudience | UnknownAudience
"""Any audience; distinguish them by class or by ``type``."""


@frozen
class AudiencesResponse:
    """Every audience of one account. Iterable and indexable; its length is the number of audiences.

    In a notebook it is shown as a table. Its ``repr`` has the first audiences only.

    Attributes:
        status: The status in the envelope, as an integer.
        description: The envelope's description; empty if the service sent none.
        response_time: The service's clock when it answered, aware and in UTC; ``None`` if it is missing or unreadable.
        data: The audiences in the order sent.
        headers: The reply's headers, without the key; names are case-insensitive. They do not count for ``==``.
        age: Seconds since the answer arrived, if it comes from the client's cache; else 0.0. It does not count for
            ``==``.
    """

    status: int
    description: str = field(repr=short)
    response_time: datetime | None
    data: tuple[Audience, ...] = field(repr=short_tuple)
    headers: Mapping[str, str] = field(default=NOTHING, eq=False, repr=False)
    age: float = field(default=0.0, eq=False, repr=False)

    def __iter__(self) -> Iterator[Audience]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Audience: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Audience, ...]: ...
    def __getitem__(self, index: int | slice) -> Audience | tuple[Audience, ...]:
        return self.data[index]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the audiences as rows of plain data, in the order sent: their own records, all with the same keys.

        First ``id``, ``name``, ``created_time`` (ISO 8601 in UTC, with ``Z``), ``user_count`` and ``type``, then each
        undocumented field that an audience has. What an audience lacks is ``None``: data frames take their columns from
        the first rows, and lose the others without a word.
        """
        records = [audience.to_dict() for audience in self.data]
        row = dict.fromkeys(chain(_COLUMNS, *records))
        return [{**row, **record} for record in records]

    def to_json(self) -> str:
        """Return the rows of `to_dicts` as a JSON array."""
        return msgspec.json.encode(self.to_dicts()).decode()

    def __rich_repr__(self) -> Iterator[tuple[str, object] | object]:
        yield "status", self.status
        yield "description", self.description, ""
        yield "response_time", self.response_time
        yield from self.data[:SHOWN]
        yield "more", max(0, len(self.data) - SHOWN), 0

    def _repr_html_(self) -> str:
        shown = self.data[:_ROWS_IN_HTML]
        caption = f"{len(self.data)} audiences" + (f", the first {len(shown)}" if len(shown) < len(self.data) else "")
        records = [audience.to_dict() for audience in shown]
        return html_table(caption, _COLUMNS, ([record.get(name) for name in _COLUMNS] for record in records))


@frozen
class Fetched:
    """The outcome of an account that was fetched.

    Attributes:
        account: The account as given.
        elapsed: Seconds for the whole call, every wait included.
        response: Every audience of the account.
        ok: Always ``True``.
    """

    ok: ClassVar[Literal[True]] = True

    account: Account
    elapsed: float
    response: AudiencesResponse


@frozen
class Failed:
    """The outcome of an account that failed.

    Attributes:
        account: The account as given.
        elapsed: Seconds for the whole call, every wait included.
        error: The error that `AudiencesClient.get_audiences` would have raised.
        ok: Always ``False``.
    """

    ok: ClassVar[Literal[False]] = False

    account: Account
    elapsed: float
    error: AudiencesError


Outcome: TypeAlias = Fetched | Failed
"""The outcome of one account of a job; distinguish them by class or by ``ok``."""
