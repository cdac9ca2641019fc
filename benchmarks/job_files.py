"""``audiences fetch`` of 100,000 accounts into each kind of file: time and memory, beside NDJSON.

Run ``python benchmarks/job_files.py [rounds] [--json FILE]``, after ``pip install -e '.[cli,parquet,zstd]'``; on Linux.
Takes about three minutes for each round.

Memory has two figures. "anonymous" is what a process has for itself, and what a limit on memory counts. "resident" also
has the pages of libraries that are mapped from their files, 55 MB for pyarrow; the system can drop and share these. Run
it where pandas is not installed: pyarrow imports it if it is, which takes 35 MB more.
"""

import contextlib
import csv
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from common import arguments, report, save
from jobs import FEW, LARGE_JOB, MAX_DIFFERENCE, service

CASES = {
    "ndjson": ("out.ndjson",),
    "ndjson.gz": ("out.ndjson.gz",),
    "ndjson.zst": ("out.ndjson.zst",),
    "csv": ("out.csv", "--output", "csv"),
    "rows, csv": ("rows.csv", "--output", "csv", "--rows"),
    "parquet": ("out.parquet", "--output", "parquet"),
}
MAX_RATIO = 1.3  # of the time, Parquet's to NDJSON's
LOOK_EVERY = 0.02  # s
MEASURES = {"anonymous": "RssAnon", "resident": "VmRSS"}


def accounts(folder: Path) -> Path:
    """A file of accounts whose keys are their names, as the server expects it."""
    path = folder / "accounts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "api_key"])
        writer.writerows([name, name] for name in map("account-{:06}".format, range(LARGE_JOB)))
    return path


@contextlib.contextmanager
def watched(pid: int) -> Iterator[dict[str, float]]:
    """The largest sizes of a process while the block runs, in MB."""
    peaks = dict.fromkeys(MEASURES, 0.0)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY):
            with contextlib.suppress(OSError, KeyError):
                text = Path(f"/proc/{pid}/status").read_text()
                sizes = dict(line.split(":", 1) for line in text.splitlines())
                for name, field in MEASURES.items():
                    peaks[name] = max(peaks[name], int(sizes[field].split()[0]) / 1024)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def job(file: Path, base_url: str, folder: Path, case: tuple[str, ...]) -> tuple[float, float, dict[str, float]]:
    """Run a job; its seconds, those of its CPU, and its largest sizes."""
    out, *more = case
    command = [sys.executable, "-m", "audiences_async.cli", "fetch", "--accounts", str(file), "--base-url", base_url]
    started, used = time.perf_counter(), cpu()
    with subprocess.Popen([*command, "--out", str(folder / out), *more], stderr=subprocess.PIPE, text=True) as process:
        with watched(process.pid) as peaks:
            _, told = process.communicate(timeout=600)
        took, used = time.perf_counter() - started, cpu() - used
    expected = f"{LARGE_JOB:,} of {LARGE_JOB:,} accounts fetched, 0 failed; {FEW * LARGE_JOB:,} audiences"
    assert told.splitlines()[-1].startswith(expected), told
    if "parquet" in more:
        check(folder / out)
    return took, used, peaks


def cpu() -> float:
    """Seconds of CPU of the jobs that have ended; the server has not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def check(path: Path) -> None:
    """Each account's own audiences are in the file, once."""
    table = pyarrow.parquet.read_table(path, columns=["account", "id"])
    ids = sorted(table.column("id").to_pylist())
    assert ids == sorted(f"account-{number:06}-{n}" for number in range(LARGE_JOB) for n in range(FEW))
    assert all(row["id"].startswith(row["account"]) for row in table.slice(0, 1000).to_pylist())


def main() -> None:
    options = arguments(1)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    work: dict[str, list[float]] = {name: [] for name in CASES}
    sizes: dict[str, dict[str, list[float]]] = {measure: {name: [] for name in CASES} for measure in MEASURES}
    with service(FEW) as base_url:
        for number in range(options.rounds):
            cases = list(CASES.items())
            for name, case in cases if number % 2 else reversed(cases):
                with tempfile.TemporaryDirectory() as folder:
                    took, used, peaks = job(accounts(Path(folder)), base_url, Path(folder), case)
                times[name].append(took)
                work[name].append(used)
                for measure, peak in peaks.items():
                    sizes[measure][name].append(peak)
                print(
                    f"{name}: {took:.1f} s, {peaks['anonymous']:.1f} MB anonymous, {peaks['resident']:.1f} MB resident"
                )
    what = f"audiences fetch of {LARGE_JOB:,} accounts of {FEW} audiences"
    records = report(f"time, {what}", "ndjson", times, "s", 1.0)
    records += report(f"CPU, {what}", "ndjson", work, "s", 1.0)
    for measure, figures in sizes.items():
        records += report(f"largest {measure} memory, {what}", "ndjson", figures, "MB", 1.0)
    verdict(times, sizes)
    save(options.json, records)


def verdict(times: dict[str, list[float]], sizes: dict[str, dict[str, list[float]]]) -> None:
    ratio = min(times["parquet"]) / min(times["ndjson"])
    print(f"\ntime of Parquet to NDJSON: {ratio:.2f}, the goal is {MAX_RATIO} or less")
    for measure, figures in sizes.items():
        difference: Any = max(figures["parquet"]) - max(figures["ndjson"])
        print(
            f"{measure} memory of Parquet beyond NDJSON: {difference:+.1f} MB, the goal is {MAX_DIFFERENCE:g} or less"
        )


if __name__ == "__main__":
    main()
