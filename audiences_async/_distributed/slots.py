"""The accounts that a worker has in hand, of all its chunks, in one job of its client."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence

from audiences_async._distributed.connection import DocketError
from audiences_async.client import AudiencesClient
from audiences_async.models import Account, Failed, Outcome


class Slots:
    """Fetch the accounts of many chunks at the same time.

    Args:
        client: The process's client.
        concurrency: Maximum number of accounts in flight.
        patience: Longest outage in seconds.
    """

    def __init__(self, client: AudiencesClient, concurrency: int, patience: float) -> None:
        self._client = client
        self._concurrency = concurrency
        self._patience = patience
        self._queue: deque[tuple[Account, _Batch]] = deque()
        self._batches: dict[int, list[_Batch]] = defaultdict(list)  # by the identity of each account in flight
        self._changed = asyncio.Event()
        self._stopping = False
        self.on_change: Callable[[], None] = lambda: None
        """Called when an account was started."""

    @property
    def waiting(self) -> int:
        """Number of accounts that have not been started."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Number of accounts that have been started and have no outcome."""
        return len(self._batches)

    async def run(self) -> None:
        """Fetch accounts until `stop`, and then those in flight."""
        async with self._client.stream(
            self._started(), concurrency=self._concurrency, patience=self._patience
        ) as outcomes:
            async for outcome in outcomes:
                self._deliver(outcome)

    def stop(self) -> None:
        """Start no further account; those that have not been started have no outcome."""
        self._stopping = True
        self._changed.set()
        while self._queue:
            self._queue.pop()[1].skip()

    def abandon(self) -> None:
        """Give up the accounts in flight."""
        for batch in [batch for batches in self._batches.values() for batch in batches]:
            batch.skip()
        self._batches.clear()

    async def fetch(self, accounts: Sequence[Account]) -> AsyncIterator[Outcome]:
        """Yield the outcomes of the accounts as they come; fewer after `stop`."""
        batch = _Batch(0 if self._stopping else len(accounts))
        if batch.missing:
            self._queue.extend((account, batch) for account in accounts)
            self._changed.set()
        while batch.missing:
            outcome = await batch.outcomes.get()
            if outcome is not None:
                yield outcome
            batch.missing -= 1

    async def _started(self) -> AsyncIterator[Account]:
        while True:
            while not self._queue:
                if self._stopping:
                    return
                self._changed.clear()
                await self._changed.wait()
            account, batch = self._queue.popleft()
            self._batches[id(account)].append(batch)
            self.on_change()
            yield account

    def _deliver(self, outcome: Outcome) -> None:
        batches = self._batches[id(outcome.account)]
        batch = batches.pop()
        if not batches:
            del self._batches[id(outcome.account)]
        if not isinstance(outcome, Failed) or not isinstance(outcome.error, DocketError):
            batch.outcomes.put_nowait(outcome)
        elif self._stopping:
            batch.skip()
        else:  # a shared limit is out of reach, which is not the account's fault
            self._queue.append((outcome.account, batch))
            self._changed.set()


class _Batch:
    """Accounts of one chunk."""

    def __init__(self, missing: int) -> None:
        self.missing = missing
        self.outcomes: asyncio.Queue[Outcome | None] = asyncio.Queue()

    def skip(self) -> None:
        """Note that one of the accounts gets no outcome."""
        self.outcomes.put_nowait(None)
