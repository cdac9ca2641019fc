"""An outage of the service: since when no account has been answered, and when the next probe is due."""

import math
from typing import TYPE_CHECKING, Final

from audiences_async.clock import Clock
from audiences_async.errors import TransportError

if TYPE_CHECKING:
    from audiences_async.credentials import ApiKey

_FIRST_PROBE: Final = 0.25  # s after the first failure; twice as long after each probe
_LONGEST_PROBE: Final = 1.5  # s, and up to a third more at random
_FIRST_STALL: Final = 2.0  # s without any reply, after which the service may hang
_AFTERMATH: Final = 5.0  # s after an outage, in which a 503 is the refusal of a limit
_INTERVALS: Final = 3  # intervals of a learned rate, after which no limit explains a 503


class Outage:
    """The time without an answer, and the probes in it."""

    __slots__ = (
        "_probed_at", "_resumed_at", "_stall", "closed_since", "failing_since", "hangs", "probes", "problem", "witness",
    )  # fmt: skip

    def __init__(self) -> None:
        self.probes: int = 0
        """Number of probes sent so far."""
        self.witness: ApiKey | None = None
        """The latest key that was answered, for probes; kept as long as the client."""
        self.hangs: bool = False
        """Whether requests are accepted and not answered."""
        self.problem: str = ""
        """The latest failure of a request."""
        self.closed_since: float | None = None
        """When the service was closed, without an answer since; ``None`` after an answer."""
        self.failing_since: float | None = None
        """When the first of the latest failures came, of a single account too; ``None`` after an answer."""
        self._resumed_at = self._probed_at = -math.inf
        self._stall = _FIRST_STALL

    def closed_for(self, now: float) -> float:
        """Return the seconds since it was closed, without an answer to any account; 0.0 if it is not."""
        return 0.0 if self.closed_since is None else now - self.closed_since

    def failing_for(self, until: float) -> float:
        """Return the seconds from the first of the latest failures *until* a moment; 0.0 after an answer."""
        return 0.0 if self.failing_since is None else until - self.failing_since

    def impatient(self, now: float, patience: float, left: float) -> TransportError:
        """Return the error of a call that would wait *left* seconds for a probe, and longer than *patience* allows."""
        silent = self.closed_for(now)
        bound = f"patience={patience:g} s"
        end = f"longer than {bound} allows" if silent >= patience else f"and {bound} ends before the next probe"
        latest = f"; the latest failure: {self.problem}" if self.problem else ""
        message = f"the service has answered no account for {silent:.3g} s, {end}{latest}"
        return TransportError(message, stop_reason="patience", retry_after=left or None)

    def began(self, now: float) -> None:
        """Note that it is closed: unless it was before, the time without an answer begins."""
        if self.closed_since is None:
            self.closed_since = now
        self.failed(now)

    def failed(self, now: float) -> None:
        """Note a failure, perhaps of a single account."""
        if self.failing_since is None:
            self.failing_since = now

    def dismiss(self, witness: "ApiKey") -> None:
        """Send no more probes with this key."""
        if self.witness is witness:
            self.witness = None

    def answered(self) -> None:
        """Note an answer."""
        self.closed_since = self.failing_since = None

    def resumed(self, now: float) -> None:
        """Note that the service is open again."""
        self._resumed_at = now

    def outlived(self, sent_at: float) -> bool:
        """Return whether a request was sent into an outage that is over."""
        return sent_at < self._resumed_at

    def probed(self, now: float) -> None:
        """Note that a probe goes now."""
        self.probes += 1
        self._probed_at = now

    def next_probe(self, now: float) -> float:
        """Return the seconds until another probe may follow one that has no reply."""
        return max(0.0, self._probed_at + _FIRST_STALL - now)

    def pause(self, failures: int, clock: Clock) -> float:
        """Draw the seconds until the next probe, after *failures* in a row."""
        seconds = min(_LONGEST_PROBE, _FIRST_PROBE * 2.0 ** min(failures - 1, 60))
        return seconds * (1 + clock.random() / 3)

    def note_silence(self, silence: float, slowest: float) -> bool:
        """Note seconds without any reply; return whether they are a hang, if the slowest answer took *slowest*."""
        if silence < max(self._stall, 2 * slowest):
            return False
        self._stall *= 2  # it may just be slow
        return True

    def may_be_limit(self, now: float, *, is_limited: bool, rate: float | None) -> bool:
        """Return whether a 503 may be the refusal of a limit."""
        if not is_limited:
            return now - self._resumed_at < _AFTERMATH
        return self.closed_for(now) <= max(_FIRST_STALL, _INTERVALS / (rate or math.inf))
