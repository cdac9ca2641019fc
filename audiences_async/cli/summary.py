"""Count what a job has done, and sum it up at the end."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from attrs import define, field

from audiences_async import errors
from audiences_async._jobs.outcome_files import Line
from audiences_async.cli.timing import Timing
from audiences_async.errors import AudiencesError, StatusError, printable
from audiences_async.events import (
    AttemptFinished,
    Event,
    ServiceConcurrencyLearned,
    ServicePaused,
    ServiceRateLearned,
    ServiceResumed,
)
from audiences_async.models import Failed, Outcome

_NAMED: Final = 3  # accounts shown per reason
_MIN_OUTAGE: Final = 2.0  # s; a shorter gap without answers is not reported


class ServiceLog:
    """The service's limits and outages, from the client's events."""

    def __init__(self) -> None:
        self._out_since: float | None = None
        self._next_probe = 0.0
        self._out_for = 0.0
        self._problem = ""  # of the latest attempt that failed
        self._rate: ServiceRateLearned | None = None
        self._concurrency: int | None = None

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        now = time.monotonic()
        match event:
            case ServicePaused(state="out"):
                self._out_since = now if self._out_since is None else self._out_since
                self._next_probe = now + event.seconds
            case ServiceResumed():
                self._out_for, self._out_since = self._silence, None
            case AttemptFinished() if event.attempt.error is not None and event.attempt.reason != "patience":
                self._problem = f" ({printable(event.attempt.error)})"
            case ServiceRateLearned():
                self._rate = event
            case ServiceConcurrencyLearned():
                self._rate, self._concurrency = None, event.limit

    @property
    def is_out(self) -> bool:
        """Whether no account is answered at the moment."""
        return self._out_since is not None

    @property
    def rate(self) -> float | None:
        """Learned requests per second of all accounts together; ``None`` if no limit is known."""
        return None if self._rate is None else self._rate.rate

    @property
    def _silence(self) -> float:
        """Seconds of all outages, with the current one."""
        return self._out_for + (0.0 if self._out_since is None else time.monotonic() - self._out_since)

    def now(self) -> str:
        """Return the state of the service for the progress; empty if it answers without a limit."""
        if self._out_since is None:
            return "" if self._rate is None else f"limited to {self._rate.rate:.3g}/s"
        now = time.monotonic()
        probe = f"next probe in {max(0.0, self._next_probe - now):.0f} s"
        return f"no answer for {now - self._out_since:.0f} s{self._problem}, {probe}"

    def learned(self) -> dict[str, float]:
        """Return what was learned: seconds of outages, requests per second, requests in flight; empty if nothing."""
        found = {
            "outage_seconds": self._silence if self._silence >= _MIN_OUTAGE else None,
            "rate": self.rate,
            "window_seconds": None if self._rate is None else self._rate.per,
            "concurrency": self._concurrency,
        }
        return {name: value for name, value in found.items() if value is not None}

    def advice(self) -> Iterator[str]:
        """Yield lines about outages and learned limits, with hints; none if there were none."""
        if self._silence >= _MIN_OUTAGE:
            total = f"for {self._silence:.0f} s in total{self._problem if self.is_out else ''}"
            yield f"  no answer from the service {total}; --patience bounds each outage"
        if self._rate is not None:
            window = "" if self._rate.per is None else f", in windows of {self._rate.per:.2g} s"
            yield f"  the service limits all accounts together to about {self._rate.rate:.3g} requests/s{window}"
            yield f"    hint: use --rate {self._rate.rate:.2g} to stay within it"
        if self._concurrency is not None:
            yield f"  the service takes about {self._concurrency} requests at the same time"
            yield f"    hint: use --concurrency {self._concurrency} to stay within it"


class _Result(msgspec.Struct):
    """The fields of a worker's line that are counted."""

    audiences: list[msgspec.Raw]
    error: dict[str, Any] | None


_decode: Final = msgspec.json.Decoder(_Result).decode


@define
class Tally:
    """Counts and failures of a job so far.

    Attributes:
        total: Accounts of the job.
        earlier: Accounts fetched by an earlier run.
        now: Accounts fetched by this run.
        audiences: Audiences fetched by this run.
        failures: Names of the accounts that failed in this run, by reason and hint.
        service: The service's rate limit and outages.
        timing: Where the time went.
        started: When the job began, in seconds of `time.monotonic`.
    """

    total: int = 0
    earlier: int = 0
    now: int = 0
    audiences: int = 0
    failures: dict[tuple[str, str], list[str]] = field(factory=lambda: defaultdict(list))
    service: ServiceLog = field(factory=ServiceLog)
    timing: Timing = field(factory=Timing)
    started: float = field(factory=time.monotonic)

    @property
    def fetched(self) -> int:
        """Accounts fetched, by this run or an earlier one."""
        return self.earlier + self.now

    @property
    def failed(self) -> int:
        """Accounts that failed in this run."""
        return sum(map(len, self.failures.values()))

    @property
    def elapsed(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self.started

    def hear(self, event: Event) -> None:
        """Handle an event of the client."""
        self.service(event)
        self.timing(event)

    def count(self, outcome: Outcome) -> None:
        """Count one account's outcome."""
        if isinstance(outcome, Failed):
            error = outcome.error
            self._fail(outcome.account.name, type(error), error.status if isinstance(error, StatusError) else None)
        else:
            self.now += 1
            self.audiences += len(outcome.response)

    def count_line(self, line: Line) -> None:
        """Count one account's outcome that a worker has written."""
        result = _decode(line.text)
        if result.error is None:
            self.now += 1
            self.audiences += len(result.audiences)
        else:
            kind = getattr(errors, result.error["type"], AudiencesError)
            self._fail(line.account, kind, result.error["status"])

    def _fail(self, name: str, kind: type[AudiencesError], status: int | None) -> None:
        reason = kind.__name__ if status is None else f"{kind.__name__} (HTTP {status})"
        self.failures[reason, kind.hint].append(name)

    def most_frequent(self) -> list[tuple[str, str, list[str]]]:
        """Return each reason for failure with its hint and accounts, the most frequent first."""
        found = [(reason, hint, names) for (reason, hint), names in self.failures.items()]
        return sorted(found, key=lambda each: -len(each[2]))


def text(tally: Tally, out: Path) -> Iterator[str]:
    """Yield each reason for failure and what was learned, then one line with everything that was counted."""
    yield from failures(tally)
    yield from tally.service.advice()
    of_this_run = f" of {tally.now:,} accounts in this run," if tally.earlier else ""
    parts = [
        f"{tally.fetched:,} of {tally.total:,} accounts fetched, {tally.failed:,} failed",
        f"{tally.audiences:,} audiences{of_this_run} in {tally.elapsed:,.1f} s",
        *([_times(tally.timing.quantiles())] if tally.timing.quantiles() else []),
        *_learned(tally.service),
        f"written to {printable(str(out))}",
    ]
    yield "; ".join(parts)


def failures(tally: Tally) -> Iterator[str]:
    """Yield each reason for failure with its accounts and its hint, the most frequent first."""
    for reason, hint, names in tally.most_frequent():
        shown = ", ".join(printable(name) for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        yield f"  {len(names):,} × {reason}: {shown}{more}"
        if hint:
            yield f"    hint: {hint}"


def fields(tally: Tally, out: Path) -> dict[str, Any]:
    """Return the same as `text` for programs. Times are in seconds, as p50, p95 and p99 of the accounts of this run."""
    return {
        "accounts": tally.total,
        "fetched": tally.fetched,
        "failed": tally.failed,
        "audiences": tally.audiences,
        "elapsed": round(tally.elapsed, 3),
        "times": tally.timing.quantiles(),
        "learned": tally.service.learned(),
        "service": tally.service.now(),
        "failures": [
            {"reason": reason, "hint": hint, "accounts": len(names), "names": names[:_NAMED]}
            for reason, hint, names in tally.most_frequent()
        ],
        "out": str(out),
    }


def _times(quantiles: Mapping[Any, tuple[float, ...]]) -> str:
    shown = (f"{phase} {'/'.join(f'{value:.2g}' for value in values)} s" for phase, values in quantiles.items())
    return f"for each account (p50/p95/p99): {', '.join(shown)}"


def _learned(service: ServiceLog) -> Iterator[str]:
    """Yield the limits that were learned."""
    found = service.learned()
    if "rate" in found:
        window = f" in windows of {found['window_seconds']:.2g} s" if "window_seconds" in found else ""
        yield f"limit {found['rate']:.3g} requests/s{window}"
    if "concurrency" in found:
        yield f"limit {found['concurrency']} requests at the same time"
