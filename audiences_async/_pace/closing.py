"""Close a queue after a refusal, until a probe is answered."""

import math


class Closing:
    """Whether refusals have closed a queue, and until when."""

    __slots__ = ("cut_at", "failures", "is_probing", "probe_is_out", "until")

    def __init__(self) -> None:
        self.until: float = -math.inf
        """When requests may go again; a time in the past if they may."""
        self.cut_at: float = -math.inf
        """When the latest refusal came; the reply to an earlier request shows nothing about the time after it."""
        self.failures: int = 0
        """Refusals in a row, without an answer between them."""
        self.is_probing: bool = False
        """Whether it is closed, or only one request may go, until that is answered."""
        self.probe_is_out: bool = False
        """Whether that request has gone."""

    def left(self, now: float) -> float:
        """Return the seconds until requests may go again; 0.0 means now."""
        return max(0.0, self.until - now)

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may go; ``inf`` if that waits for a reply to the probe."""
        if now < self.until:
            return self.until - now
        return math.inf if self.is_probing and self.probe_is_out else 0.0

    def refused(self, now: float) -> None:
        """Note a refusal of a request that was sent after the latest one."""
        self.failures += 1
        self.cut_at = now

    def answered(self, now: float) -> bool:
        """Note an answer to such a request; return whether it opens the queue."""
        self.failures = 0
        opens = self.is_probing and now >= self.until
        if opens:
            self.is_probing = self.probe_is_out = False
        return opens

    def close(self, until: float) -> bool:
        """Close until a moment; return ``False`` if it is closed for longer already."""
        self.is_probing = True
        if until <= self.until:
            return False
        self.until = until
        return True
