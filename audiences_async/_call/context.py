"""What all calls of one client share."""

from attrs import field, frozen

from audiences_async._call.retrying import RetryTokens
from audiences_async._http.deprecation import Notices
from audiences_async._http.transport import Sender
from audiences_async._pace.pacer import Pacer
from audiences_async.clock import Clock
from audiences_async.events import EventHook
from audiences_async.policies import RetryPolicy


@frozen(eq=False)
class CallContext:
    """What all calls of one client share, but for the exceptions below.

    Attributes:
        policy: Which failures are retried, how often and when; a variant of the client may have another one.
        tokens: The client's retry budget.
        clock: The client's clock.
        on_event: Called with each event.
        pacer: Grants the turns.
        transport: Sends the requests; for a call that has its own header or URL, in its own way.
        request_id_header: Header that carries the identifier of a call; ``None`` means none.
        path: Path of `get_json`; ``None`` means GET /audiences.
        notices: Finds the first announcement of the end of the service.
    """

    policy: RetryPolicy
    tokens: RetryTokens
    clock: Clock
    on_event: EventHook | None
    pacer: Pacer
    transport: Sender
    request_id_header: str | None = None
    path: str | None = None
    notices: Notices = field(factory=Notices)
