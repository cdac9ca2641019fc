"""Snapshots of a client: why calls wait right now."""

import math
from typing import Any, Literal, TypeAlias

from attrs import asdict, frozen

State: TypeAlias = Literal["open", "limited", "out"]
"""The service answers; it holds all accounts to a limit; or it answers no account."""


@frozen
class AccountPace:
    """How one account is paced right now.

    Attributes:
        account: The account's name.
        rate: Requests per second, known or learned; ``None`` if none is known yet.
        paused_for: Seconds until requests may go again; 0.0 means now.
        waiting: Calls that wait for their turn.
        in_flight: Requests on the wire.
    """

    account: str
    rate: float | None
    paused_for: float
    waiting: int
    in_flight: int


@frozen
class ServicePace:
    """How the service holds all accounts together.

    Attributes:
        rate: Requests per second, known or learned; ``None`` if there is no such limit.
        paused_for: Seconds until the next request may go, a probe if the state is ``"out"``; 0.0 means now.
        waiting: Calls that wait for the service.
        in_flight: Requests in flight.
        window: Requests that may be in flight at the same time, as far as is known.
        state: ``"open"``, ``"limited"`` (all accounts share a limit), or ``"out"`` (many accounts failed, and none was
            answered).
        silent_for: Seconds from the first of the latest failures, without an answer to any account since, until now, or
            until the latest failure if nothing is under way; 0.0 if the latest reply was an answer.
    """

    rate: float | None
    paused_for: float
    waiting: int
    in_flight: int
    window: int
    state: State
    silent_for: float


@frozen
class ClientSnapshot:
    """State of a client at one moment.

    Attributes:
        accounts: The accounts in use and their pace.
        budget_left: Tokens left of the `RetryBudget`; ``inf`` if the client has no budget.
        service: State of the limits that all accounts share; ``None`` before the client's first use.
    """

    accounts: tuple[AccountPace, ...]
    budget_left: float
    service: ServicePace | None

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain data for JSON, such as the response of a health endpoint.

        ``budget_left`` is ``None`` if the client has no budget.
        """
        left = self.budget_left if math.isfinite(self.budget_left) else None
        return {**asdict(self), "accounts": [asdict(account) for account in self.accounts], "budget_left": left}
