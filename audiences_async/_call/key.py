"""The key of one call."""

from audiences_async.credentials import ApiKey, KeySource


class CallKey:
    """A key, or what a key function gives; after a 401 it is asked once for a fresh one.

    Args:
        credential: The key, or the source of keys.
    """

    __slots__ = ("_is_in_use", "_refused", "_source", "current", "fixed", "is_asked_for")

    def __init__(self, credential: ApiKey | KeySource) -> None:
        self.fixed: ApiKey | None = credential if isinstance(credential, ApiKey) else None
        """The key of an account that has no key function."""
        self.current: ApiKey | None = self.fixed
        """The key of the latest attempt; ``None`` before a key function has given one."""
        self.is_asked_for: bool = False
        """Whether the call waits for the key function."""
        self._source: KeySource | None = None if isinstance(credential, ApiKey) else credential
        self._refused: ApiKey | None = None
        self._is_in_use = False

    def begin(self) -> None:
        """Note that the key function is used; once for each call."""
        if self._source is not None and not self._is_in_use:
            self._is_in_use = True
            self._source.users += 1

    def end(self) -> None:
        """Let go of the key function: whatever still holds the call does not hold it for the calls that come later."""
        if self._source is not None and self._is_in_use:
            self._source.release()
        self._source = None

    @property
    def can_be_refreshed(self) -> bool:
        """Whether a key function can be asked for a fresh key."""
        return self._source is not None and self._refused is None

    def refuse(self) -> None:
        """Have the next attempt use a fresh key."""
        self._refused = self.current

    async def get(self, account: str) -> ApiKey:
        """Return the key for the next attempt.

        Raises:
            ConfigurationError: The key function is wrong, or gave an invalid key.
            TransportError: The key function failed for a reason that may pass.
        """
        if self.current is None or self.current is self._refused:
            assert self._source is not None
            self.is_asked_for = True
            self.current = await self._source.get(account=account, refused=self._refused)
            self.is_asked_for = False
        return self.current
