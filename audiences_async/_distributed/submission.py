"""Submit the chunks of a job, and merge their parts into its output as they come."""

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from typing import Any, Final

from attrs import evolve
from docket import Disposition, Docket

from audiences_async._base import checks
from audiences_async._distributed import parts as stores
from audiences_async._distributed.chunks import CHUNK_SIZE, Chunk, chunks, digest_of, failed, number_of
from audiences_async._distributed.connection import QUEUE, DocketError, opened, reached, unavailable
from audiences_async._distributed.handling import MARKER
from audiences_async._distributed.identity import new_job
from audiences_async._distributed.ledger import Ledger, News, State
from audiences_async._distributed.parts import PartsError, PartStore
from audiences_async._distributed.worker import ATTEMPTS, TASK
from audiences_async._jobs import outcome_files
from audiences_async._jobs.outcome_files import Line, OutcomeFile

_PER_WORKER: Final = 10  # chunks that wait in Redis
_LOOK_EVERY: Final = 0.2  # s between two looks for parts
_LATE: Final = 10.0  # s after which a chunk is looked for that no notice has come of
_PATIENT: Final = 2.0  # s after which a missing worker is reported
_READ_AT_ONCE: Final = 100  # chunks of accounts that are all fetched; then parts are merged again


async def submit(
    url: str,
    names: Iterable[str],
    parts: str | os.PathLike[str] | PartStore,
    file: OutcomeFile,
    *,
    job: str | None = None,
    queue: str = QUEUE,
    chunk_size: int = CHUNK_SIZE,
    total: int | None = None,
    on_merged: Callable[[Line], None],
    on_notice: Callable[[str], None],
) -> None:
    """Have workers fetch the accounts missing from *file*, and merge their parts into it until it is complete.

    May be ended at any time and called again with the same *job*: chunks in flight are not submitted twice, and parts
    written meanwhile are merged. Parts of other jobs are left alone. At the end, all parts of this one are removed.

    Args:
        url: URL of the Redis.
        names: Names of all accounts of the job, in the same order each time; read as workers take chunks.
        parts: Store that the workers write to: a directory or a URL, see `open_store`.
        file: File for the outcomes.
        job: Id of the job; ``None`` means a new one.
        queue: Name of the queue.
        chunk_size: Accounts per chunk, from 1 up.
        total: Number of the accounts, for `audiences status`; ``None`` means unknown.
        on_merged: Called with each merged line.
        on_notice: Called with what the user should know, such as that there is no worker; once for each reason.

    Raises:
        ConfigurationError: A number, a name or a URL is invalid, or a part is not an outcome file.
        DocketError: Redis is unreachable at the start. Later, this waits for it.
        PartsError: The parts cannot be read.
        OSError: The file cannot be written.
    """
    checks.count("chunk_size", chunk_size)
    job = job or new_job()
    store = stores.open_store(parts)
    async with opened(url, queue) as docket:
        docket.register(_submit_only, names=[TASK])
        submission = Submission(docket, store, job, Output(file, on_merged, total), on_notice)
        await submission.run(chunks(job, names, chunk_size))


class Output:
    """The outcomes of a job.

    Args:
        file: File for the outcomes.
        on_merged: Called with each line that is written to it.
        total: Number of the accounts; ``None`` means unknown.
    """

    def __init__(self, file: OutcomeFile, on_merged: Callable[[Line], None], total: int | None) -> None:
        self._file = file
        self._on_merged = on_merged
        self.progress: dict[str, Any] = {"fetched": 0, "failed": 0, "since": time.time(), "total": total}
        """For `audiences status`."""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those of *names* that have not been fetched."""
        return [name for name in names if name not in self._file.fetched]

    def append(self, line: Line) -> None:
        """Write the outcome of an account."""
        self._file.append(line.text)
        self.progress["fetched" if line.ok else "failed"] += 1
        self._on_merged(line)

    def append_fetched(self, lines: Iterable[Line]) -> None:
        """Write those that an earlier run of the job has fetched; the others are asked for again."""
        for line in lines:
            if line.ok:
                self.append(line)
                self._file.fetched.add(line.account)

    def fail(self, chunk: Chunk, reason: str) -> None:
        """Write the accounts of a chunk as failed."""
        for name in chunk.names:
            self.append(failed(name, reason))


class Submission:
    """One run of a job's submitter.

    Args:
        docket: The queue.
        store: Store that the workers write to.
        job: Id of the job.
        output: Where the outcomes go.
        on_notice: Called with what the user should know.
    """

    def __init__(
        self, docket: Docket, store: PartStore, job: str, output: Output, on_notice: Callable[[str], None]
    ) -> None:
        self._docket = docket
        self._ledger = Ledger(docket)
        self._store = store
        self._job = job
        self._output = output
        self._notices = _Notices(on_notice)
        self._unsent: list[Chunk] = []
        self._waiting: dict[str, Chunk] = {}  # by the name of their part
        self._leftovers: dict[str, list[str]] = defaultdict(list)  # parts of an earlier run, by the chunk's digest
        self._numbers: dict[str, int] = {}  # of the latest part that an earlier run has asked for, by the same
        self._room = _PER_WORKER
        self._next_look = 0.0

    async def run(self, source: Iterator[Chunk]) -> None:
        """Submit all chunks of *source*, and merge their parts."""
        await self._store.put(f"{self._job}/{MARKER}", BytesIO(b"{}"))
        for part in await self._store.names(self._job):
            self._leftovers[digest_of(part)].append(part)
        for part in await self._ledger.rests(self._job):
            self._numbers[digest_of(part)] = max(number_of(part), self._numbers.get(digest_of(part), 0))
        started = _now()
        more = True
        while more or self._unsent or self._waiting:
            more = more and await self._read(source)
            await self._send()
            for part in await self._written(started):
                await self._merge(part)
            await self._look_for_late()
            if self._unsent or self._waiting:
                await asyncio.sleep(_LOOK_EVERY)
        await self._store.remove_all(self._job)
        with suppress(DocketError):
            await self._ledger.end(self._job)

    async def _read(self, source: Iterator[Chunk]) -> bool:
        """Read chunks while there is room for them in Redis; return whether there may be more."""
        for _ in range(_READ_AT_ONCE):
            if len(self._unsent) >= self._room:
                break
            chunk = next(source, None)
            if chunk is None:
                return False
            await self._prepare(chunk)
        return True

    async def _prepare(self, chunk: Chunk) -> None:
        """Queue a chunk for sending, without the accounts that were fetched by an earlier run."""
        leftovers = self._leftovers.pop(chunk.digest, [])
        for part in leftovers:
            self._output.append_fetched(await self._lines(part, set(self._output.missing(chunk.names))) or ())
            await self._store.remove(part)
        missing = self._output.missing(chunk.names)
        if missing:
            number = max(self._numbers.get(chunk.digest, 0), *(number_of(part) + 1 for part in leftovers), 0)
            self._unsent.append(evolve(chunk, names=missing, number=number))

    async def _send(self) -> None:
        """Put chunks into the queue. Those that Redis may not have taken are looked for before they are sent again."""
        if not self._unsent:
            return
        sent, self._unsent = self._unsent, []
        calls = [self._docket.call(TASK, key=chunk.part)(chunk.part, chunk.names) for chunk in sent]
        rests = [chunk.part for chunk in sent if chunk.number]
        problems: list[DocketError] = []
        try:
            if rests:
                await self._ledger.sends_rests(self._job, rests)
            async with reached():
                executions = await self._docket.add_many(calls)
            refused = [execution for execution in executions if execution.disposition is Disposition.FAILED]
            problems += [unavailable(execution.schedule_exception) for execution in refused]
        except DocketError as error:
            problems.append(error)
        for problem in problems:
            self._notices.redis(problem)
        look_at = _now() + (0 if problems else _LATE)
        self._waiting.update((chunk.part, evolve(chunk, look_at=look_at)) for chunk in sent)

    async def _written(self, started: float) -> list[str]:
        """Return the parts that were written since the last look."""
        try:
            news = await self._ledger.news(self._job, self._output.progress)
        except DocketError as error:
            self._notices.redis(error)
            self._room = 0
            return await self._listed()  # parts are merged even while Redis is unreachable
        self._room = _PER_WORKER * max(1, news.workers) - (len(self._waiting) - news.running)
        self._notices.news(news, self._store.place, is_idle=_now() - started > _PATIENT and not news.workers)
        return news.parts

    async def _listed(self) -> list[str]:
        try:
            return await self._store.names(self._job)
        except PartsError as error:
            self._notices.store(error)
            return []

    async def _merge(self, part: str) -> bool:
        """Merge a part, and submit the accounts that it lacks again; return whether there is one."""
        chunk = self._waiting.get(part)
        if chunk is None:
            return False
        missing = dict.fromkeys(chunk.names)
        try:
            found = await self._lines(part, set(missing))
        except PartsError as error:
            self._notices.store(error)
            return True  # it is looked for again
        if found is None:
            return False
        for line in found:
            del missing[line.account]
            self._output.append(line)
        await self._discard(part)
        del self._waiting[part]
        if missing:
            self._submit_rest(chunk.rest(list(missing), brought=len(missing) < len(chunk.names)))
        return True

    def _submit_rest(self, rest: Chunk) -> None:
        if rest.failures < ATTEMPTS:
            self._unsent.append(rest)
        else:
            self._output.fail(rest, "missing from its chunk's part")

    async def _lines(self, part: str, names: set[str]) -> list[Line] | None:
        """Return the first line of each of *names* in a part; ``None`` if there is no part."""
        file = await self._store.get(part)
        if file is None:
            return None
        found: dict[str, Line] = {}
        with file:
            for line in outcome_files.read_lines(file, f"{self._store.place}/{part}"):
                if line.account in names:
                    found.setdefault(line.account, line)
        return list(found.values())

    async def _discard(self, part: str) -> None:
        try:
            await self._store.remove(part)
        except PartsError as error:  # it is removed with all others at the end
            self._notices.store(error)

    async def _look_for_late(self) -> None:
        """Look for the chunks that no notice has come of for a while, in one round trip."""
        now = _now()
        if now < self._next_look:
            return
        self._next_look = now + _LATE / 5
        late = [chunk for chunk in self._waiting.values() if chunk.look_at <= now]
        try:
            states = await self._ledger.states([chunk.part for chunk in late]) if late else []
        except DocketError as error:
            self._notices.redis(error)
            return
        for chunk, state in zip(late, states, strict=True):
            self._waiting[chunk.part] = evolve(chunk, look_at=now + _LATE)
            if not state.under_way and not await self._merge(chunk.part):
                self._again(chunk, state)

    def _again(self, chunk: Chunk, state: State) -> None:
        """Submit a chunk again that has no part, unless that was tried too often."""
        del self._waiting[chunk.part]
        failures = chunk.failures + (0 if state.is_lost else 1)
        if state.error is None and failures < ATTEMPTS:
            self._unsent.append(evolve(chunk, failures=failures))
        else:
            self._output.fail(chunk, f"no worker could write its chunk: {state.error or 'the part is missing'}")


class _Notices:
    """Report each problem once, and again if it recurs."""

    def __init__(self, on_notice: Callable[[str], None]) -> None:
        self._on_notice = on_notice
        self._told: set[str] = set()

    def redis(self, error: DocketError) -> None:
        """Report that the job waits for Redis."""
        self._tell("redis", f"{error.summary}; waiting for it")

    def store(self, error: PartsError) -> None:
        """Report that the job waits for the store."""
        self._tell("store", f"{error.summary}; trying again")

    def news(self, news: News, place: str, *, is_idle: bool) -> None:
        """Report the news from a Redis that answers."""
        self._told.discard("redis")
        if is_idle:
            self._tell("idle", f"no worker yet; start one: audiences worker --docket URL --accounts FILE --out {place}")
        if news.misplaced:
            problem = "a worker of this queue writes its parts elsewhere, and skips this job"
            self._tell("misplaced", f"{problem}; start workers with --out {place}, or give each fleet its own --queue")

    def _tell(self, matter: str, text: str) -> None:
        if matter not in self._told:
            self._told.add(matter)
            self._on_notice(text)


async def _submit_only(part: str, names: list[str]) -> None:
    """Stand in for the task on the submitting side, which never runs it."""


def _now() -> float:
    return asyncio.get_running_loop().time()
