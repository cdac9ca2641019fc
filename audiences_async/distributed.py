"""Fetch many accounts on several machines, with Docket and Redis (extra ``docket``).

A task is a chunk of account *names*. A worker looks up their keys in its own accounts file, so that no key is ever
stored in Redis. It writes the outcomes as one NDJSON part, atomically, into a store that all machines share: a
directory, or object storage (extra ``objectstore``). A job has an id, which is in the keys of its chunks and in the
names of its parts. A chunk that is repeated, because a worker died or was slow, overwrites its own part: delivery at
least once gives each account one outcome.

Anyone who can write to the Redis can run code in the workers, as with any task queue that pickles.
"""

from audiences_async._distributed.chunks import CHUNK_SIZE
from audiences_async._distributed.connection import QUEUE, DocketError, connect
from audiences_async._distributed.identity import new_job, recorded
from audiences_async._distributed.index import AccountIndex, by_name
from audiences_async._distributed.limiter import RedisLimiter
from audiences_async._distributed.parts import PartsError, PartStore, open_store
from audiences_async._distributed.peers import Peers
from audiences_async._distributed.status import JobStatus, QueueStatus, WorkerStatus, watched
from audiences_async._distributed.submission import submit
from audiences_async._distributed.worker import work

__all__ = [
    "CHUNK_SIZE",
    "QUEUE",
    "AccountIndex",
    "DocketError",
    "JobStatus",
    "PartStore",
    "PartsError",
    "Peers",
    "QueueStatus",
    "RedisLimiter",
    "WorkerStatus",
    "by_name",
    "connect",
    "new_job",
    "open_store",
    "recorded",
    "submit",
    "watched",
    "work",
]
