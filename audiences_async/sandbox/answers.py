"""The answers of the sandbox, and its record of requests."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from attrs import field, frozen
from attrs.validators import in_, optional

Failure: TypeAlias = Literal["reset", "reset-in-body", "cut-body", "hang"]
"""How a connection dies: reset before a reply, reset in the middle of the body, closed in the middle of the body, or
kept open without a reply until the client leaves, the outage ends or the sandbox closes."""


@frozen
class Answer:
    """One scripted answer.

    Attributes:
        status: Any HTTP status.
        body: The body: bytes and text as they are, anything else as JSON; ``None`` means the documented body of this
            status, with the account's audiences for 200.
        headers: Headers beyond the usual ones; the names are sent as given.
        retry_after: The ``Retry-After`` header, as seconds or as any text; ``None`` sends none.
        delay: Seconds before the answer.
        failure: How the connection dies instead; ``None`` means that it does not.
    """

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(factory=dict[str, str])
    retry_after: float | str | None = None
    delay: float = 0.0
    failure: Failure | None = field(default=None, validator=optional(in_(get_args(Failure))))


@frozen
class SeenRequest:
    """One request that reached the sandbox.

    Attributes:
        account: The name that the key belongs to; ``None`` for no key, or an unknown one.
        method: The HTTP method.
        path: The path and query as sent.
        headers: The headers without ``Authorization``; names are case-insensitive.
        at: The time at which it came, in seconds of the sandbox's *time*.
        answer: The status that went out; ``None`` if the connection died instead.
    """

    account: str | None
    method: str
    path: str
    headers: Mapping[str, str]
    at: float
    answer: int | None
