"""The values that a call gets from its caller and from its client."""

from typing import NamedTuple

from attrs import field, frozen
from yarl import URL

from audiences_async._call.retrying import RetryTokens
from audiences_async._http.deprecation import Notices
from audiences_async._http.transport import Transport
from audiences_async._jobs.places import Place
from audiences_async._pace.pacer import Pacer
from audiences_async.clock import Clock
from audiences_async.events import EventHook
from audiences_async.models import Account
from audiences_async.policies import RetryPolicy


class Caller(NamedTuple):
    """What one caller asks for.

    Attributes:
        account: The account.
        timeout: Seconds for the call.
        policy: Which failures are retried; ``None`` means as the client says.
        place: The account's place in a job; ``None`` outside a job.
    """

    account: Account
    timeout: float
    policy: RetryPolicy | None
    place: Place | None = None


@frozen(eq=False)
class CallContext:
    """What all calls of one client share, and what one of them has of its own.

    Attributes:
        policy: Which failures are retried, how often and when; a variant of the client may have another one.
        tokens: The client's retry budget.
        clock: The client's clock.
        on_event: Called with each event.
        pacer: Grants the turns.
        transport: Sends the requests.
        request_id_header: Header that carries the identifier of a call; ``None`` means none.
        notices: Finds the first announcement of the end of the service.
        path: The call's own path, of `get_json`; ``None`` means GET /audiences.
        url: The call's own URL, of that path; ``None`` means the endpoint.
        header: Name and value of a header of the call's own; ``None`` means none.
    """

    policy: RetryPolicy
    tokens: RetryTokens
    clock: Clock
    on_event: EventHook | None
    pacer: Pacer
    transport: Transport
    request_id_header: str | None = None
    notices: Notices = field(factory=Notices)
    path: str | None = None
    url: URL | None = None
    header: tuple[str, str] | None = None
