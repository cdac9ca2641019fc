"""The identity of a job, kept beside its output: a resumed job continues its own chunks and parts, and no others."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Final

from audiences_async._jobs import outcome_files

_JOB: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{16}")


def new_job() -> str:
    """Return the id of a new job: the time of its first submission, and chance."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{token_hex(8)}"


@contextmanager
def recorded(output: Path, *, resume: bool) -> Iterator[str]:
    """Yield the id of the job that writes *output*; an interrupted job keeps it in ``.NAME.job`` beside the output.

    Args:
        output: The checkpoint of the job.
        resume: Whether to continue the job that was interrupted, if there is one.

    Raises:
        OSError: The id cannot be written.
    """
    path = output.with_name(f".{output.name}.job")
    job = _read(path) if resume else None
    if job is None:
        job = new_job()
        outcome_files.write_whole(path, [json.dumps({"job": job}).encode()])
    yield job
    path.unlink(missing_ok=True)  # unless the block raises: then the job can be resumed


def _read(path: Path) -> str | None:
    """Return the recorded id; ``None`` if it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        job = json.loads(path.read_bytes())["job"]
        if isinstance(job, str) and _JOB.fullmatch(job):
            return job
    return None
