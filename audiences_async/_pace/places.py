"""The place of a call in a job, as the call sees it."""

from typing import Protocol


class Place(Protocol):
    """The place of a call in a job, which the call leaves while it waits to retry."""

    held: bool
    """Whether the call is in its place."""
    patience: float
    """Seconds that the job waits while the service answers no account."""

    def leave(self) -> None:
        """Let another account take the place, if there is room for one more that waits."""

    async def enter(self, *, lets_pass: bool = False) -> None:
        """Return when there is a place again, with *lets_pass* after new accounts; at once if it is held."""

    async def borrow(self) -> None:
        """Return when a retry may go that the budget has no tokens for."""

    def give_back(self) -> None:
        """Let the next such retry go, if this one borrowed."""
