"""A job's metrics as a file in the Prometheus text format, for a textfile collector.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from audiences_async._jobs.outcome_files import write_whole
from audiences_async.cli.summary import Tally
from audiences_async.cli.timing import QUANTILES
from audiences_async.errors import ConfigurationError, printable

_PREFIX: Final = "audiences_job"
_START: Final = f"# HELP {_PREFIX}_".encode()


def check(path: Path) -> None:
    """Refuse to replace a file that `save` has not written.

    Raises:
        ConfigurationError: The file exists, and is something else.
        OSError: It cannot be read.
    """
    if path.exists():
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(len(_START))
            if start in {b"", _START}:
                return
        raise ConfigurationError(f"{printable(str(path))} is not a metrics file of this command; choose another file")


def save(path: Path, tally: Tally, *, running: bool) -> None:
    """Write the metrics, atomically.

    Raises:
        OSError: The file cannot be written.
    """
    write_whole(path, (f"{line}\n".encode() for line in _lines(tally, running=running)))


def _lines(tally: Tally, *, running: bool) -> Iterator[str]:
    states = {"fetched": tally.fetched, "failed": tally.failed, "pending": tally.total - tally.fetched - tally.failed}
    yield from _gauge("accounts", "Accounts of the job.", _labelled("state", states))
    by_error: Counter[str] = Counter()
    for reason, _, names in tally.most_frequent():
        by_error[reason.partition(" ")[0]] += len(names)
    yield from _gauge("failures", "Accounts that failed in this run.", _labelled("error", by_error))
    yield from _gauge("audiences", "Audiences fetched in this run.", {"": tally.audiences})
    yield from _gauge("elapsed_seconds", "Seconds since the job began.", {"": tally.elapsed})
    yield from _gauge("running", "1 until the job ends.", {"": int(running)})
    yield from _gauge("updated_timestamp_seconds", "When this file was written.", {"": time.time()})
    yield from _gauge("service_out", "1 while no account is answered.", {"": int(tally.service.is_out)})
    if tally.service.rate is not None:
        yield from _gauge("service_rate", "Learned requests per second of all accounts.", {"": tally.service.rate})
    yield from _times(tally)


def _labelled(label: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f'{{{label}="{name}"}}': value for name, value in values.items()}


def _gauge(name: str, description: str, values: Mapping[str, float]) -> Iterator[str]:
    yield from _family(name, "gauge", description, (f"{labels} {value}" for labels, value in values.items()))


def _family(name: str, kind: str, description: str, samples: Iterable[str]) -> Iterator[str]:
    yield f"# HELP {_PREFIX}_{name} {description}"
    yield f"# TYPE {_PREFIX}_{name} {kind}"
    for sample in samples:
        yield f"{_PREFIX}_{name}{sample}"


def _times(tally: Tally) -> Iterator[str]:
    samples = []
    for phase, times in tally.timing.phases.items():
        label = f'phase="{phase}"'
        samples += [f'{{{label},quantile="{share}"}} {times.quantile(share):.6g}' for share in QUANTILES]
        samples += [f"_sum{{{label}}} {times.total:.6f}", f"_count{{{label}}} {times.count}"]
    yield from _family("account_seconds", "summary", "Seconds of each account of this run, by phase.", samples)
