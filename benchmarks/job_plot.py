"""One SVG of two real jobs under a limit that all accounts share and through an outage: ours beside tenacity.

Run ``python benchmarks/job_plot.py [OUT.svg]``, after ``pip install --group bench``; takes 1.5 minutes.

3,000 accounts, 100 requests/s for all of them together, and 10 s in which every request gets 503. Both jobs are those
of `service.py`: our defaults, and tenacity's random exponential waits behind a semaphore, with as many attempts. All
figures are from the runs: requests and outage from the log of the server, which has a process of its own.
"""

import argparse
import asyncio
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path

from attrs import frozen
from common import interpreter
from faulty import Faults
from limiters import TokenBucket
from service import ATTEMPTS, AUDIENCES, CONCURRENCY, DELAY, OURS, PEERS, TENACITY, Run, bounded, faulty, keys

ACCOUNTS, RATE, BURST = 3000, 100, 5
OUTAGE_AT, OUTAGE = 8.0, 10.0  # s
LONGEST = 120.0  # s; a job that takes longer fails the script
TITLES = {
    OURS: f"{OURS}: default settings, concurrency {CONCURRENCY}",
    TENACITY: f"{TENACITY}: wait_random_exponential, {ATTEMPTS} attempts, semaphore of {CONCURRENCY}",
}
KINDS = {200: ("g", "200"), 429: ("r", "429: above the limit"), 503: ("o", "503: outage")}  # stacked in this order

WIDTH, LEFT, RIGHT, TOP, HEIGHT, GAP = 760, 56, 16, 118, 132, 84
BIN = 0.5  # s; the requests of this time are one column
STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.t{font-weight:600}.f{font-weight:600;fill:#cf222e}.n{font-size:12px;fill:#59636e}.e{text-anchor:end}.m{text-anchor:middle}
.p{fill:#fff}.x{stroke:#818b98}.y{stroke:#d1d9e0;stroke-opacity:.6}.l{stroke:#1f2328;stroke-dasharray:5 4}
.a{fill:#818b98;fill-opacity:.16}.g{fill:#0969da}.o{fill:#d4a72c}.r{fill:#cf222e}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.n{fill:#9198a1}.p{fill:#0d1117}.x{stroke:#656c76}
.y{stroke:#3d444d}.l{stroke:#f0f6fc}.g{fill:#4493f8}.o{fill:#d29922}.r,.f{fill:#f85149}}
"""


@frozen
class Seen:
    """One job, with times in seconds from its first request.

    Attributes:
        requests: When each request arrived, and its status.
        outage: When the outage began and ended.
        seconds: How long the job took.
        answered: Accounts that were answered.
        failed: Accounts that were not.
    """

    requests: list[tuple[float, int]]
    outage: tuple[float, float]
    seconds: float
    answered: int
    failed: int

    @property
    def figures(self) -> str:
        """The figures of the job."""
        in_vain = sum(self.outage[0] <= at < self.outage[1] for at, _ in self.requests)
        parts = (
            f"{self.answered:,} accounts answered, {self.failed:,} failed",
            f"{len(self.requests) / max(1, self.answered):.2f} requests per answer",
            f"{in_vain:,} requests during the outage",
            f"{self.seconds:.1f} s",
        )
        return "; ".join(parts)

    def columns(self) -> dict[int, Counter[int]]:
        """Return the number of requests by status in each `BIN`."""
        found: dict[int, Counter[int]] = {}
        for at, status in self.requests:
            found.setdefault(int(at / BIN), Counter())[status] += 1
        return found


def seen(peer: str, accounts: int, outage: float) -> Seen:
    """Run a job, and check that the log of the server agrees with it."""
    limit = TokenBucket(RATE, BURST + 1)
    faults = Faults(
        audiences=AUDIENCES,
        delay=DELAY,
        outage="503",
        outage_at=OUTAGE_AT * outage / OUTAGE,
        outage_seconds=outage,
        limit=TokenBucket.__name__,
        limit_settings=asdict(limit),
        limit_is_shared=True,
    )
    run = Run(keys(accounts), AUDIENCES)
    with faulty(run, 0, faults=faults) as base_url:
        asyncio.run(bounded(run, PEERS[peer](run, base_url), LONGEST))
    run.check()
    assert not run.is_cut, f"{peer}: the job took longer than {LONGEST:g} s"
    statuses = Counter(status for *_, status in run.requests)
    assert set(statuses) <= set(KINDS), f"{peer}: {statuses}"
    assert len({key for _, _, key, status in run.requests if status == 200}) == len(run.answered)
    begun, ended = run.outage
    assert 0 < begun < ended < run.started + run.seconds, f"{peer}: the outage did not end within the job"
    assert all(begun <= done <= ended for _, done, _, status in run.requests if status == 503)
    first = min(arrived for arrived, *_ in run.requests)
    return Seen(
        [(arrived - first, status) for arrived, *_, status in run.requests],
        (begun - first, ended - first),
        run.seconds,
        len(run.answered),
        run.failures.total(),
    )


def least(accounts: int, outage: float) -> float:
    """Return the shortest time, in seconds, that limit and outage allow; the bucket is full again at the end."""
    limit = TokenBucket(RATE, BURST + 1)
    before = int(OUTAGE_AT * outage / OUTAGE * RATE) + limit.capacity
    return OUTAGE_AT * outage / OUTAGE + outage + limit.ideal(accounts - before)


@frozen
class Scale:
    """The scale of all panels: the longest time in s, and the highest rate in requests/s."""

    seconds: float
    rate: float

    @property
    def across(self) -> float:
        """Pixels per second."""
        return (WIDTH - LEFT - RIGHT) / self.seconds

    @property
    def up(self) -> float:
        """Pixels per request/s."""
        return HEIGHT / self.rate


def panel(title: str, job: Seen, top: int, scale: Scale) -> Iterator[str]:
    """Draw one job."""
    bottom, across, up = top + HEIGHT, scale.across, scale.up
    begun, ended = (LEFT + across * when for when in job.outage)
    failed = f"{job.failed:,} failed"
    mark = f'<tspan class="f">{failed}</tspan>' if job.failed else failed
    yield f'<text class="t" x="{LEFT}" y="{top - 28}">{escape(title)}</text>'
    yield f'<text x="{LEFT}" y="{top - 10}">{job.figures.replace(failed, mark)}</text>'
    yield f'<rect class="a" x="{begun:.1f}" y="{top}" width="{ended - begun:.1f}" height="{HEIGHT}"/>'
    y = bottom - (scale.rate // 100 - 0.5) * 100 * up + 4  # between two lines
    yield f'<text class="n m" x="{(begun + ended) / 2:.1f}" y="{y:.1f}">outage</text>'
    for rate in range(0, int(scale.rate) + 1, 100):
        y = bottom - rate * up
        yield f'<text class="n e" x="{LEFT - 8}" y="{y + 4:.1f}">{rate}</text>'
        if rate:
            yield f'<path class="y" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    y = (top + bottom) / 2
    yield f'<text class="n m" transform="rotate(-90 14 {y:g})" x="14" y="{y + 4:g}">requests/s</text>'
    shapes: dict[int, list[str]] = {status: [] for status in KINDS}
    for number, counts in sorted(job.columns().items()):
        x, y = LEFT + number * BIN * across, float(bottom)
        for status in KINDS:
            if height := counts[status] / BIN * up:
                y -= height
                shapes[status].append(f"M{x + 0.5:.1f} {y:.1f}h{BIN * across - 1:.1f}v{height:.1f}H{x + 0.5:.1f}z")
    for status, (name, _) in KINDS.items():
        yield f'<path class="{name}" d="{"".join(shapes[status])}"/>'
    yield f'<path class="l" d="M{LEFT} {bottom - RATE * up:.1f}H{WIDTH - RIGHT}"/>'
    yield f'<path class="x" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
    for second in range(0, int(scale.seconds) + 1, 5):
        yield f'<text class="n m" x="{LEFT + second * across:.1f}" y="{bottom + 16}">{second}</text>'


def legend(y: int) -> Iterator[str]:
    x = LEFT
    for name, label in KINDS.values():
        yield f'<rect class="{name}" x="{x}" y="{y - 10}" width="11" height="11" rx="2"/>'
        yield f'<text class="n" x="{x + 17}" y="{y}">{label}</text>'
        x += 44 + 6 * len(label)
    yield f'<path class="l" d="M{x} {y - 4}h24"/><text class="n" x="{x + 30}" y="{y}">the limit: {RATE}/s</text>'


def drawn(jobs: dict[str, Seen], accounts: int, outage: float) -> str:
    longest = max(job.seconds for job in jobs.values())
    peak = max(counts.total() / BIN for job in jobs.values() for counts in job.columns().values())
    scale = Scale(math.ceil(longest / BIN) * BIN, math.ceil(peak / 50) * 50)
    height = TOP + len(jobs) * (HEIGHT + GAP) - 8
    head = f"{accounts:,} accounts, {RATE} requests/s for all of them together, an outage of {outage:g} s"
    body = [f'<text class="t" x="{LEFT}" y="28">{head}</text>', *legend(52)]
    for number, (peer, job) in enumerate(jobs.items()):
        body += panel(TITLES[peer], job, TOP + number * (HEIGHT + GAP), scale)
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(f'<text class="n m" x="{middle:g}" y="{height - 40}">seconds since the first request</text>')
    foot = f"The limit and the outage allow no less than {least(accounts, outage):.1f} s. {interpreter()}, loopback."
    body.append(f'<text class="n" x="{LEFT}" y="{height - 12}">{foot}</text>')
    told = "; ".join(f"{peer}: {job.figures}" for peer, job in jobs.items())
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(f"{head}. {told}")}</title>'
    frame = f'<style>{STYLE}</style><rect class="p" width="{WIDTH}" height="{height}" rx="6"/>'
    return "\n".join([svg, frame, *body, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).with_name("job.svg"), metavar="OUT.svg")
    parser.add_argument("--quick", action="store_true", help="600 accounts and an outage of 2 s, to try it out")
    given = parser.parse_args()
    accounts, outage = (ACCOUNTS // 5, OUTAGE / 5) if given.quick else (ACCOUNTS, OUTAGE)
    jobs = {}
    for peer in TITLES:
        jobs[peer] = seen(peer, accounts, outage)
        statuses = Counter(status for _, status in jobs[peer].requests)
        print(f"{peer}: {jobs[peer].figures}; {dict(statuses)}", file=sys.stderr)
    svg = drawn(jobs, accounts, outage)
    assert len(svg.encode()) < 20_000
    given.out.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
