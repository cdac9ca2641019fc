"""The values a caller gets: accounts, audiences and replies.

Field names are the service's own: https://api.commbox.io/ (GET /audiences).
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, ClassVar, Final, Literal, TypeAlias

from attrs import field, frozen

from audiences_async.credentials import ApiKey, KeyProvider
from audiences_async.errors import AudiencesError, ConfigurationError


@frozen(init=False, repr=False)
class Account:
    """One account of the service: a label of yours and its API key.

    Args:
        name: A label for errors, events and outcomes; not empty. Two accounts may share one.
        api_key: The bearer token, or a function (sync or async) that gives it. A function is asked once for each
            call (calls of the same account that run at the same time share the answer), and once more when the
            service answers 401. The key is in no ``repr``.

    Raises:
        ConfigurationError: An empty name, or a key that is empty, is padded with white space or has control
            characters.
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
        return hash(self.name)  # of which there is one for each call; that of a key takes longer

    def __repr__(self) -> str:
        # Half made where its arguments are refused: a traceback with locals must still be able to print it.
        return f"Account({getattr(self, 'name', '?')!r})"

    @property
    def api_key(self) -> str | KeyProvider:
        """The key itself, or the function that gives it."""
        return self._credential.reveal() if isinstance(self._credential, ApiKey) else self._credential

    @property
    def credential(self) -> ApiKey | KeyProvider:
        """The key behind a mask, or the function that gives it."""
        return self._credential


class _Nothing(dict[str, Any]):
    """A dict that is empty and stays so, for all audiences to share: 100,000 dicts keep the garbage collector busy."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("this mapping cannot be changed")

    __setitem__ = __ior__ = setdefault = update = _refuse

    def __reduce__(self) -> str:
        return "NOTHING"  # copied and pickled, it is the same one


NOTHING: Final[Mapping[str, Any]] = _Nothing()


@frozen(weakref_slot=False)
class StaticAudience:
    """An audience with a fixed list of users.

    Attributes:
        id: The service's identifier; never empty.
        name: The audience's name, as typed in by its owner.
        created_time: When it was created; aware, in UTC, to the microsecond.
        user_count: Users in the audience now; 0 or more.
        extra: Fields the service sent beyond the documented ones, unchanged. Counts for ``==``, not for the hash.
    """

    type: ClassVar[Literal["Static"]] = "Static"

    id: str
    name: str
    created_time: datetime
    user_count: int
    extra: Mapping[str, Any] = field(default=NOTHING, hash=False)


@frozen(weakref_slot=False)
class DynamicAudience:
    """An audience computed from rules, of which the service tells no user count.

    Attributes:
        id: The service's identifier; never empty.
        name: The audience's name, as typed in by its owner.
        created_time: When it was created; aware, in UTC, to the microsecond.
        extra: Fields the service sent beyond the documented ones, unchanged. Counts for ``==``, not for the hash.
    """

    type: ClassVar[Literal["Dynamic"]] = "Dynamic"

    id: str
    name: str
    created_time: datetime
    extra: Mapping[str, Any] = field(default=NOTHING, hash=False)


@frozen(weakref_slot=False)
class UnknownAudience:
    """An audience of a type that this version does not know: kept whole, never dropped.

    Attributes:
        type: The type as sent; never empty.
        id: The identifier, or ``None`` where it could not be read.
        name: The name, or ``None`` where it could not be read.
        created_time: Aware, in UTC, or ``None`` where it could not be read.
        raw: The whole record as sent. Counts for ``==``, not for the hash.
    """

    type: str
    id: str | None = None
    name: str | None = None
    created_time: datetime | None = None
    raw: Mapping[str, Any] = field(default=NOTHING, hash=False)


Audience: TypeAlias = StaticAudience | DynamicAudience | UnknownAudience
"""Any audience; tell them apart by class, or by ``type``."""


@frozen
class AudiencesResponse:
    """Every audience of one account. Iterable, and its length is the number of audiences.

    Attributes:
        status: The status in the reply's own envelope, as an integer.
        description: The envelope's text; empty where the service sent none.
        response_time: The service's clock when it answered, aware and in UTC; ``None`` where it could not be read.
        data: The audiences in the order sent.
    """

    status: int
    description: str
    response_time: datetime | None
    data: tuple[Audience, ...]

    def __iter__(self) -> Iterator[Audience]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


@frozen
class Fetched:
    """An account that was answered.

    Attributes:
        account: The account as it was given.
        elapsed: Seconds for its whole call, every wait included.
        response: Every audience of the account.
        ok: Always ``True``.
    """

    ok: ClassVar[Literal[True]] = True

    account: Account
    elapsed: float
    response: AudiencesResponse


@frozen
class Failed:
    """An account that was not answered.

    Attributes:
        account: The account as it was given.
        elapsed: Seconds for its whole call, every wait included.
        error: Why; what `AudiencesClient.get_audiences` would have raised.
        ok: Always ``False``.
    """

    ok: ClassVar[Literal[False]] = False

    account: Account
    elapsed: float
    error: AudiencesError


Outcome: TypeAlias = Fetched | Failed
"""What became of one account of many; tell them apart by class, or by ``ok``."""
