"""An account of the sandbox: its key, audiences, script, rate limit and random faults."""

import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from attrs import define, field

from audiences_async.sandbox.answers import Answer
from audiences_async.sandbox.throttling import Throttle

# The records of the service's own page: https://api.commbox.io/ (GET /audiences).
EXAMPLE_AUDIENCES: Final[Sequence[Mapping[str, Any]]] = (
    {
        "id": "31234",
        "name": "NE_USA-above50",
        "created_time": "2025-10-01T09:10:00Z",
        "user_count": 1542,
        "type": "Static",
    },
    {"id": "45412", "name": "VIP", "created_time": "2025-11-01T08:30:00Z", "type": "Dynamic"},
)

_HTML: Final = "<html><body><h1>Bad Gateway</h1></body></html>"
_FAULTS: Final = (
    Answer(429),
    Answer(500),
    Answer(502, _HTML, headers={"Content-Type": "text/html"}),
    Answer(503, b""),
    Answer(failure="reset"),
    Answer(failure="reset-in-body"),
    Answer(failure="cut-body"),
)


@define
class SandboxAccount:
    """The service's side of one account.

    Attributes:
        name: Its label.
        api_key: The bearer token that opens it.
        audiences: The records it answers with.
        script: Answers still to give, one for each request; then the ordinary ones.
        throttle: Its limit; ``None`` grants any number of requests.
        fault_rate: The share of ordinary answers that go wrong, from 0.0 to 1.0.
        faults: Decides which.
    """

    name: str
    api_key: str = field(repr=False)
    audiences: Sequence[Mapping[str, Any]]
    script: deque[Answer]
    throttle: Throttle | None
    fault_rate: float
    faults: random.Random = field(repr=False)

    def answer(self) -> Answer:
        """Return the answer to a request that no limit refuses."""
        if self.script:
            return self.script.popleft()
        if self.faults.random() < self.fault_rate:
            return self.faults.choice(_FAULTS)
        return Answer()


def many_audiences(account: str, count: int) -> Iterable[Mapping[str, Any]]:
    """So many audiences, every other one Static, with ids that carry the account's name."""
    for number in range(count):
        kind = {"type": "Dynamic"} if number % 2 else {"user_count": number, "type": "Static"}
        common = {"id": f"{account}-{number}", "name": f"Audience {number}", "created_time": "2025-10-01T09:10:00Z"}
        yield {**common, **kind}
