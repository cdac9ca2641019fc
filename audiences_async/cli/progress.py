"""Show a job's progress: a bar on a terminal, and elsewhere a line every 30 seconds."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from attrs import frozen
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from audiences_async.cli.log import Log, is_verbose
from audiences_async.cli.output import notices
from audiences_async.cli.summary import Tally

EVERY: Final = 30.0
"""Seconds between two lines, and between two versions of the metrics file."""


@frozen
class Watch:
    """Who is kept up to date about a job.

    Attributes:
        log: Where lines go.
        save_metrics: Writes the metrics file, if the job has one.
    """

    log: Log
    save_metrics: Callable[[], None]


@contextmanager
def progress(tally: Tally, watch: Watch) -> Iterator[Callable[[], None]]:
    """Show the progress inside the block, in an event loop; yield a function to call after *tally* has changed."""
    console = Console(file=notices())
    has_bar = console.is_terminal and watch.log.format == "text" and not is_verbose()

    def tick() -> None:
        watch.save_metrics()
        if not has_bar:
            report(tally, watch.log)

    with _every(EVERY, tick), _bar(tally, console, visible=has_bar) as show:
        yield show


@contextmanager
def _every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call *action* at intervals of *seconds* inside the block."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def start() -> None:
        timers[:] = [loop.call_later(seconds, act)]

    def act() -> None:
        start()
        action()

    start()
    try:
        yield
    finally:
        timers[0].cancel()


def report(tally: Tally, log: Log) -> None:
    """Write a line about the progress."""
    finished = tally.now + tally.failed
    rate = finished / tally.elapsed
    waiting = tally.total - tally.earlier - finished
    left = waiting / rate if rate else None
    service = tally.service.now()
    shown = [
        f"{tally.fetched:,} of {tally.total:,} accounts fetched, {tally.failed:,} failed",
        f"{rate:,.1f} accounts/s",
        *([] if left is None else [f"{left:,.0f} s left"]),
        *([service] if service else []),
    ]
    log.write(
        "progress",
        "; ".join(shown),
        accounts=tally.total,
        fetched=tally.fetched,
        failed=tally.failed,
        audiences=tally.audiences,
        elapsed=round(tally.elapsed, 3),
        rate=round(rate, 3),
        left=None if left is None else round(left, 3),
        service=service,
    )


@contextmanager
def _bar(tally: Tally, console: Console, *, visible: bool) -> Iterator[Callable[[], None]]:
    columns = (
        BarColumn(bar_width=16),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} accounts"),
        TextColumn("{task.fields[failed]:,} failed"),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        _ServiceColumn(tally),
    )
    with Progress(*columns, console=console, disable=not visible, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=tally.total, completed=tally.fetched, failed=0)
        yield lambda: bar.update(task, completed=tally.fetched + tally.failed, failed=tally.failed)


class _ServiceColumn(ProgressColumn):
    """The state of the service, as a column."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def render(self, task: Task) -> Text:
        return Text(self._tally.service.now())


class _RateColumn(ProgressColumn):
    """Accounts per second, as a column."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0.0:,.1f} accounts/s")
