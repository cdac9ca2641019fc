"""What different accounts meet one after another: whether a refusal or a failure is the service's."""

from typing import Final

from audiences_async._pace.lanes import Lane
from audiences_async._pace.pacing import NEUTRAL, REFUSALS, Verdict

_FAILED_ACCOUNTS: Final = 3  # accounts that fail in a row while few requests are in flight
_REFUSED_ACCOUNTS: Final = 8
_IN_FLIGHT_PER_ACCOUNT: Final = 4  # requests in flight for each account that must fail
_LOST_CONNECTIONS: Final = 8  # pooled ones, one after another
_CLEARED_PER_ANSWER: Final = 2  # refused accounts that no longer count: a limit goes on granting some requests
_WEIGHT: Final = 1 / 16  # of the latest request, in the shares of the latest ones
_HALF: Final = 0.5
_CONTRASTS: Final = 5  # probes; by chance, if a limit answers half of them, one series in a thousand


class Evidence:
    """Accounts that fail, without an answer to any account in between, or that are refused while few are answered."""

    __slots__ = (
        "_contrasts", "_failing", "_lost", "_probe_failed", "_recovered", "_refusals", "_refused",
        "is_needed",
    )  # fmt: skip

    def __init__(self) -> None:
        self.is_needed: bool = False
        """Whether an answer matters: there was a refusal or a failure before."""
        self._failing: set[Lane] = set()  # without an answer to any account since the first of them
        self._refused: list[Lane] = []  # each once; fewer after each answer
        self._lost = 0  # pooled connections, without an answer to any account since the first of them
        self._refusals = 0.0  # share of the latest requests
        self._recovered = 0.0  # share of the latest answers, of accounts that had been refused or had failed
        self._contrasts = 0  # probes for an account that was answered before, and is again, after one that was not
        self._probe_failed = False  # whether the latest probe was an account's own, and had no answer

    @property
    def blames_accounts(self) -> bool:
        """Whether accounts that were answered before always are, if probes are sent for them, and others are not."""
        return self._contrasts >= _CONTRASTS

    @property
    def suspects_outage(self) -> bool:
        """Whether so many pooled connections are lost that the service may be out."""
        return self._lost >= _LOST_CONNECTIONS

    @property
    def shows_refusals(self) -> bool:
        """Whether most requests are refused, and most refused accounts are answered later."""
        return self._refusals >= _HALF and self._recovered >= _HALF

    def acquit(self) -> None:
        """Blame no accounts any longer: others come now."""
        self._contrasts = 0

    def returned(self, verdict: Verdict, lane: Lane | None, *, is_probe: bool = False) -> None:
        """Note the reply to a request, or to a probe, of an account; ``None`` is one that was answered before."""
        if verdict != "answered":
            self.is_needed = True
            self._lost += verdict == "stale"
            self._refusals += _WEIGHT * ((verdict in REFUSALS) - self._refusals)
        else:
            self._refusals -= _WEIGHT * self._refusals
            self._recovered += _WEIGHT * ((lane is not None and lane.recovers) - self._recovered)
            self._failing.clear()
            self._lost = 0
            del self._refused[-_CLEARED_PER_ANSWER:]
            if lane is not None and lane.recovers:  # it was not to blame
                self._contrasts = 0
        if is_probe and verdict not in NEUTRAL:
            self._probed(answered=verdict == "answered", is_own=lane is not None)

    def _probed(self, *, answered: bool, is_own: bool) -> None:
        if not is_own and answered:
            self._contrasts += self._probe_failed
        elif not is_own:  # by chance, under a limit, or because of an outage: the next probes will show
            self._contrasts = _CONTRASTS - 1 if self.blames_accounts else 0
        self._probe_failed = is_own and not answered

    def add(self, verdict: Verdict, lane: Lane, peak: int) -> bool:
        """Add an account that was refused or failed; return whether enough did, so that the service is the cause.

        More must do so if many requests, up to *peak*, were in flight at the same time.
        """
        self._failing.add(lane)
        if verdict in REFUSALS and lane not in self._refused:
            self._refused.append(lane)
        needed = _REFUSED_ACCOUNTS
        if verdict != "throttled":  # accounts have limits of their own, and few have outages of their own
            needed = min(max(_FAILED_ACCOUNTS, peak // _IN_FLIGHT_PER_ACCOUNT), _REFUSED_ACCOUNTS)
        if len(self._failing) < needed and len(self._refused) < _REFUSED_ACCOUNTS:
            return False
        self._failing.clear()
        self._refused.clear()
        return True
