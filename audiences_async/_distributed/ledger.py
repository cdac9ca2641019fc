"""Records that workers and submitters of a queue share through Redis, beside the chunks themselves."""

import json
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, Final

from attrs import frozen
from docket import Docket, ExecutionState

from audiences_async._distributed.chunks import job_of
from audiences_async._distributed.connection import exchange

_KEPT: Final = 7 * 86_400  # s after the last change, for the keys of a job that is not resumed
_AT_ONCE: Final = 1000  # notices that are taken in one round trip


@frozen
class News:
    """Changes since a submitter last looked.

    Attributes:
        parts: Parts that were written since the last look.
        running: Chunks of the job that workers have in hand.
        workers: Workers of the queue.
        misplaced: How often a worker has refused a chunk because its parts go elsewhere.
    """

    parts: list[str]
    running: int
    workers: int
    misplaced: int


@frozen
class State:
    """The state of a chunk in Redis.

    Attributes:
        under_way: Whether it waits or is being fetched.
        is_lost: Whether Redis knows nothing of it, because it was emptied.
        error: Why no worker will fetch it again; ``None`` if that is not so.
    """

    under_way: bool
    is_lost: bool
    error: str | None


@frozen
class Start:
    """The history of a chunk when a worker takes it.

    Attributes:
        count: How many workers have taken it without an end, this one included.
        alone: The account that was fetched alone when the last of them died; ``None`` if no account was.
        fatal: Accounts that workers had died with before.
    """

    count: int
    alone: str | None
    fatal: list[str]


class Ledger:
    """The records of one queue. Every method is one round trip, and raises `DocketError` if Redis fails."""

    def __init__(self, docket: Docket) -> None:
        self._docket = docket

    async def started(self, part: str) -> Start:
        """Note that a worker takes a chunk in hand."""
        running, alone, fatal = (self._key(part, kind) for kind in ("running", "alone", "fatal"))

        def commands(pipeline: Any) -> None:
            pipeline.hincrby(running, part, 1)
            pipeline.expire(running, _KEPT)
            pipeline.hget(alone, part)
            pipeline.hget(fatal, part)

        count, _, name, names = await exchange(self._docket, commands)
        return Start(int(count), None if name is None else name.decode(), json.loads(names or b"[]"))

    async def renewed(self, worker: str, messages: Collection[bytes]) -> None:
        """Renew a worker's leases on chunks, so that no other worker takes them over."""
        stream, group = self._docket.stream_key, self._docket.worker_group_name
        ids = list(messages)
        await exchange(
            self._docket, lambda pipeline: pipeline.xclaim(stream, group, worker, 0, ids, idle=0, justid=True)
        )

    async def fetches_alone(self, part: str, name: str, fatal: list[str]) -> None:
        """Note the only account of a suspicious chunk that is being fetched, and those that no worker has survived."""

        def commands(pipeline: Any) -> None:
            for kind, value in (("alone", name), ("fatal", json.dumps(fatal))):
                pipeline.hset(self._key(part, kind), part, value)
                pipeline.expire(self._key(part, kind), _KEPT)

        await exchange(self._docket, commands)

    async def returned(self, part: str) -> None:
        """Note that a worker gives a chunk back."""
        await exchange(self._docket, lambda pipeline: pipeline.hdel(self._key(part, "running"), part))

    async def misplaced(self, part: str) -> int:
        """Count a chunk that came to a worker whose parts go elsewhere; return how often this one has."""
        counts, total = self._key(part, "misplaced"), self._key(part, "misplaced-total")

        def commands(pipeline: Any) -> None:
            pipeline.hincrby(counts, part, 1)
            pipeline.incr(total)
            pipeline.expire(counts, _KEPT)
            pipeline.expire(total, _KEPT)

        count, *_ = await exchange(self._docket, commands)
        return int(count)

    async def finished(self, part: str) -> None:
        """Note that a part was written."""
        done = self._key(part, "done")

        def commands(pipeline: Any) -> None:
            for kind in ("running", "alone", "fatal"):
                pipeline.hdel(self._key(part, kind), part)
            pipeline.rpush(done, part)
            pipeline.expire(done, _KEPT)

        await exchange(self._docket, commands)

    async def has_ended(self, part: str) -> bool:
        """Return whether the part's job is complete, so that the part is not needed."""
        (found,) = await exchange(self._docket, lambda pipeline: pipeline.exists(self._key(part, "ended")))
        return bool(found)

    async def news(self, job: str, progress: dict[str, Any]) -> News:
        """Publish the job's progress for `audiences status`, and return what is new."""
        oldest = datetime.now(UTC) - self._docket.heartbeat_interval * self._docket.missed_heartbeats

        def commands(pipeline: Any) -> None:
            pipeline.lpop(self._key(job, "done"), _AT_ONCE)
            pipeline.hlen(self._key(job, "running"))
            pipeline.zcount(self._docket.workers_set, oldest.timestamp(), "+inf")
            pipeline.get(self._key(job, "misplaced-total"))
            pipeline.hset(self._docket.key("jobs"), job, json.dumps(progress))

        parts, running, workers, misplaced, _ = await exchange(self._docket, commands)
        return News([part.decode() for part in parts or ()], int(running), int(workers), int(misplaced or 0))

    async def sends_rests(self, job: str, parts: Collection[str]) -> None:
        """Note the parts of chunks of which other parts have come before."""
        rests = self._key(job, "rests")

        def commands(pipeline: Any) -> None:
            pipeline.sadd(rests, *parts)
            pipeline.expire(rests, _KEPT)

        await exchange(self._docket, commands)

    async def rests(self, job: str) -> list[str]:
        """Return those parts."""
        (parts,) = await exchange(self._docket, lambda pipeline: pipeline.smembers(self._key(job, "rests")))
        return [part.decode() for part in parts]

    async def states(self, parts: Collection[str]) -> list[State]:
        """Return the state of each chunk."""

        def commands(pipeline: Any) -> None:
            for part in parts:
                pipeline.hmget(self._docket.runs_key(part), "state", "error")

        return [_state(*found) for found in await exchange(self._docket, commands)]

    async def end(self, job: str) -> None:
        """Forget a complete job, except that it has ended."""
        kinds = ("done", "running", "alone", "fatal", "misplaced", "misplaced-total", "rests")

        def commands(pipeline: Any) -> None:
            pipeline.delete(*(self._key(job, kind) for kind in kinds))
            pipeline.hdel(self._docket.key("jobs"), job)
            pipeline.set(self._key(job, "ended"), 1, ex=_KEPT)

        await exchange(self._docket, commands)

    def _key(self, part: str, kind: str) -> str:
        return self._docket.key(f"job:{job_of(part)}:{kind}")


_UNDER_WAY: Final = frozenset(
    state.value.encode() for state in (ExecutionState.SCHEDULED, ExecutionState.QUEUED, ExecutionState.RUNNING)
)


def _state(state: bytes | None, error: bytes | None) -> State:
    failed = state == ExecutionState.FAILED.value.encode()
    return State(state in _UNDER_WAY, state is None, (error or b"no reason given").decode() if failed else None)
