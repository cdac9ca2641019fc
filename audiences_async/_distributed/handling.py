"""The chunks that a worker has in hand: from the queue, through the client, into the store."""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from tempfile import SpooledTemporaryFile
from typing import IO, Any, Final

from docket import Execution, Worker
from docket.dependencies import AdmissionBlocked

from audiences_async._distributed.chunks import CHUNK_SIZE, failed, job_of
from audiences_async._distributed.connection import DocketError
from audiences_async._distributed.ledger import Ledger, Start
from audiences_async._distributed.parts import IN_MEMORY, PartsError, PartStore
from audiences_async._distributed.patient import PatientStore
from audiences_async._distributed.slots import Slots
from audiences_async._jobs import outcome_files
from audiences_async.errors import ConfigurationError, printable
from audiences_async.models import Account, Outcome

MARKER: Final = "job.json"
"""Name of the file by which a worker recognizes that it shares the store with the submitter of a job."""

_log: Final = logging.getLogger("audiences_async")
_AT_ONCE: Final = timedelta(0)
_NEXT_TRY: Final = timedelta(seconds=1)  # until a chunk that failed on Redis or the store is offered again
_ELSEWHERE: Final = timedelta(seconds=0.5)  # until a chunk of another fleet is offered again
_MOST_OFFERS: Final = 3600  # of a chunk that no worker is right for: half an hour
_DEATHS: Final = 2  # workers that died with a chunk, before its accounts are fetched one by one
_RENEW_EVERY: Final = 1.0  # s
_RATE_OVER: Final = 10.0  # s over which accounts per second are counted


class Desk:
    """The chunks that a worker has in hand.

    Args:
        accounts: Accounts by name.
        store: Store of the parts.
        slots: Where accounts are fetched.
        concurrency: Maximum number of accounts in flight.
    """

    def __init__(self, accounts: Mapping[str, Account], store: PartStore, slots: Slots, concurrency: int) -> None:
        self.store: PatientStore = PatientStore(store, self._adjust)
        """The store; its `fault` ends the worker."""
        self._accounts = accounts
        self._slots = slots
        self._concurrency = concurrency
        self._worker: Worker | None = None
        self._ledger: Ledger
        self._chunks: set[bytes] = set()  # by their messages in the queue
        self._empty: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._alone = asyncio.Lock()
        self._ours: set[str] = set()  # jobs whose submitter shares the store
        self._others: set[str] = set()  # jobs of which a chunk was refused
        self._count = _Count()
        slots.on_change = self._adjust

    def serve(self, worker: Worker) -> None:
        """Take chunks for a worker of the queue."""
        self._worker, self._ledger = worker, Ledger(worker.docket)
        self._adjust()

    def report(self) -> dict[str, Any]:
        """Return the fields of the report that the other workers and `audiences status` read."""
        return {
            "waiting": self._slots.waiting,
            "in_flight": self._slots.in_flight,
            "chunks": len(self._chunks),
            **self._count.report(),
        }

    async def keep(self) -> None:
        """Renew the leases on the chunks in hand until cancelled; Docket does not while it waits for Redis."""
        assert self._worker is not None
        while True:
            if self._chunks:
                with suppress(DocketError):
                    await self._ledger.renewed(self._worker.name, self._chunks)
            await asyncio.sleep(_RENEW_EVERY)

    def close(self) -> None:
        """Take no chunk, and start no account."""
        self.store.close()
        self._slots.stop()
        self._adjust()

    async def emptied(self, seconds: float) -> None:
        """Wait until no chunk is in hand, for at most *seconds*."""
        if self._chunks:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._empty}, timeout=seconds)

    async def fetch_chunk(self, part: str, names: list[str], execution: Execution) -> None:
        """Fetch the accounts, and write their outcomes.

        Raises:
            AdmissionBlocked: The chunk goes back to the queue; that is no attempt.
        """
        message = execution.message_id or b""
        if message in self._chunks:  # after Redis hung, a worker may take a chunk over from itself
            raise AdmissionBlocked(execution, "this worker", handled=True)
        self._chunks.add(message)
        self._adjust()
        try:
            delay = await self._fetch(part, names, is_again=execution.redelivered)
        except (DocketError, PartsError) as error:
            _log.warning("a chunk goes back to the queue: %s", error.summary)
            delay = _NEXT_TRY
        finally:
            self._chunks.remove(message)
            self._adjust()
            if not self._chunks and not self._empty.done():
                self._empty.set_result(None)
        if delay is not None:
            raise AdmissionBlocked(execution, "this worker", retry_delay=delay)

    async def _fetch(self, part: str, names: list[str], *, is_again: bool) -> timedelta | None:
        """Return when the chunk goes back to the queue; ``None`` if it is done with."""
        if not await self._is_ours(part):
            return await self._refuse(part)
        start = await self._ledger.started(part)
        if is_again and await self.store.has(part):
            await self._ledger.finished(part)
            return None
        try:
            is_done = await self._put(part, names, start)
        except BaseException:
            await self._ledger.returned(part)
            raise
        if not is_done:  # the worker is closing
            await self._ledger.returned(part)
            return _AT_ONCE
        with suppress(DocketError):  # without a notice, the submitter finds the part when it looks for late chunks
            await self._ledger.finished(part)
        return None

    async def _put(self, part: str, names: list[str], start: Start) -> bool:
        """Put the outcomes into the store; return whether there are any."""
        with SpooledTemporaryFile(IN_MEMORY) as file:
            written = await self._write(file, part, names, start)
            if written and not await _has_ended(self._ledger, part):
                await self.store.put(part, file)
        return written > 0

    async def _write(self, file: IO[bytes], part: str, names: list[str], start: Start) -> int:
        """Write the outcomes of the accounts; return how many there are."""
        known: list[Account] = []
        written = 0
        for name in names:
            account = _known(self._accounts, name)
            if isinstance(account, Account):
                known.append(account)
            else:
                file.write(account.text)
                written += 1
        if start.count > _DEATHS:
            return written + await self._write_one_by_one(file, part, known, start)
        return written + await self._write_outcomes(file, known)

    async def _write_outcomes(self, file: IO[bytes], accounts: list[Account]) -> int:
        written = 0
        async for outcome in self._slots.fetch(accounts):
            try:
                file.write(outcome_files.line(outcome))
            except OSError as error:
                fault = PartsError(f"cannot write to the temporary directory: {error.strerror}")
                raise self.store.give_up(fault) from error
            self._count.add(outcome)
            written += 1
        return written

    async def _write_one_by_one(self, file: IO[bytes], part: str, accounts: list[Account], start: Start) -> int:
        """Fetch the accounts of a chunk with which workers have died, so that it shows which account is the cause."""
        fatal = start.fatal if start.alone is None else [*start.fatal, start.alone]
        _log.warning("%d workers died with one chunk; its accounts are fetched one by one", start.count - 1)
        written = 0
        async with self._alone:
            for account in accounts:
                if account.name in fatal:
                    file.write(failed(account.name, "the worker died each time that it fetched this account").text)
                    written += 1
                else:
                    await self._ledger.fetches_alone(part, account.name, fatal)
                    written += await self._write_outcomes(file, [account])
        return written

    async def _is_ours(self, part: str) -> bool:
        """Return whether this worker writes to the store from which the job's submitter reads."""
        job = job_of(part)
        if job not in self._ours:
            if not await self.store.has(f"{job}/{MARKER}"):
                return False
            self._ours.add(job)
        return True

    async def _refuse(self, part: str) -> timedelta | None:
        """Return a chunk to the workers of another fleet, unless its job is over."""
        if await self._ledger.has_ended(part) or await self._ledger.misplaced(part) > _MOST_OFFERS:
            return None
        job = job_of(part)
        if job not in self._others:
            self._others.add(job)
            _log.warning("job %s is left to other workers: its parts do not go to %s", job, self.store.place)
        return _ELSEWHERE

    def _adjust(self) -> None:
        """Set the number of chunks that the worker has in hand: as many as keep all slots busy, and no more."""
        if self._worker is None:
            return
        if not self.store.is_ready:
            self._worker.concurrency = 0
            return
        missing = 2 * self._concurrency - self._slots.waiting
        more = max(0, -(-missing // CHUNK_SIZE))
        self._worker.concurrency = min(len(self._chunks) + more, self._concurrency + 1)


def _known(accounts: Mapping[str, Account], name: str) -> Account | outcome_files.Line:
    """Return an account by its name, or the outcome of one that cannot be fetched."""
    try:
        return accounts[name]
    except KeyError:
        return failed(name, "missing from the worker's accounts file")
    except ConfigurationError as error:
        return failed(name, error.message)


async def _has_ended(ledger: Ledger, part: str) -> bool:
    """Return whether the part's job is complete; not if Redis is away, so that what was fetched is written."""
    with suppress(DocketError):
        return await ledger.has_ended(part)
    return False


class _Count:
    """Accounts that a worker has done."""

    def __init__(self) -> None:
        self._fetched = self._failed = 0
        self._error = ""
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        if outcome.ok:
            self._fetched += 1
        else:
            self._failed += 1
            self._error = printable(outcome.error.summary)

    def report(self) -> dict[str, Any]:
        """Return the counts, and the accounts per second since the reports of the last seconds."""
        now, done = asyncio.get_running_loop().time(), self._fetched + self._failed
        self._recent.append((now, done))
        while now - self._recent[0][0] > _RATE_OVER:
            self._recent.popleft()
        since, before = self._recent[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        return {"fetched": self._fetched, "failed": self._failed, "per_second": rate, "error": self._error}
