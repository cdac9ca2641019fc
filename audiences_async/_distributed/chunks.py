"""Chunks of account names, which are fetched together and whose outcomes are one part."""

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from typing import Final

from attrs import evolve, field, frozen

from audiences_async._jobs import outcome_files
from audiences_async.accounts import no_key
from audiences_async.errors import ConfigurationError
from audiences_async.models import Account, Failed

CHUNK_SIZE: Final = 100
"""Accounts per chunk."""

_SUFFIX: Final = ".ndjson"


@frozen
class Chunk:
    """Accounts that are fetched together.

    Attributes:
        job: The job's id.
        digest: Derived from all names that the chunk had at first, so that a resumed job finds its parts.
        names: Names of the accounts that are still to be fetched.
        number: Number of parts that have come before, each with some of the accounts.
        failures: How often in a row its part was missing, or brought no account.
        look_at: When to look for it if no notice has come, on the event loop's clock.
    """

    job: str
    digest: str
    names: list[str]
    number: int = 0
    failures: int = 0
    look_at: float = field(default=0.0, eq=False)

    @property
    def part(self) -> str:
        """Name of the part with its outcomes, and the chunk's key in the queue."""
        return f"{self.job}/{self.digest}-{self.number}{_SUFFIX}"

    def rest(self, names: list[str], *, brought: bool) -> "Chunk":
        """Return the chunk of the accounts that a part lacks; *brought* if the part had others."""
        failures = 0 if brought else self.failures + 1
        return evolve(self, names=names, number=self.number + 1, failures=failures)


def chunks(job: str, names: Iterable[str], size: int) -> Iterator[Chunk]:
    """Yield the names in chunks, in order."""
    rest = iter(names)
    while chunk := list(islice(rest, size)):
        yield Chunk(job, blake2b(json.dumps(chunk).encode(), digest_size=16).hexdigest(), chunk)


def job_of(part: str) -> str:
    """Return the id of the job that a part belongs to."""
    return part.partition("/")[0]


def digest_of(part: str) -> str:
    """Return the digest of the chunk that a part belongs to."""
    return part.rpartition("/")[2].partition("-")[0]


def number_of(part: str) -> int:
    """Return the number of a part; 0 if its name has none."""
    number = part.removesuffix(_SUFFIX).rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def failed(name: str, reason: str) -> outcome_files.Line:
    """Return the line of an account that fails before anything was sent."""
    outcome = Failed(Account(name, no_key), 0.0, ConfigurationError(reason, account=name))
    return outcome_files.Line(name, ok=False, text=outcome_files.line(outcome))
