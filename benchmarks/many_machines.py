"""A job on many machines: Redis, the submitter and the workers are real, and the service answers at once.

Run ``python benchmarks/many_machines.py [--accounts N ...] [--audiences N] [--workers N] [--processes N]
[--json FILE]``. All workers share this machine's cores, so accounts per second are a lower bound for real machines;
commands, memory and the submitter's CPU time are not. The default takes a minute; ``--accounts 10000000 --audiences 0``
takes 7 minutes and 1 GB of disk. The last line is a projection: the costs grow linearly, as the rows show.
"""

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from common import parser, save, table
from redis.asyncio import Redis
from services import redis_server

from audiences_async import Account, Fetched, distributed
from audiences_async._jobs.outcome_files import OutcomeFile
from audiences_async.sandbox import many_audiences
from audiences_async.structuring import decode

PROJECTED = 10_000_000


class Everyone(Mapping[str, Account]):
    """Any account by name, made when it is asked for."""

    def __getitem__(self, name: str) -> Account:
        return Account(name, "key")

    def __len__(self) -> int:
        return PROJECTED

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError


class Instant:
    """A client whose service answers at once."""

    def __init__(self, audiences: int) -> None:
        body = json.dumps({"status": "200", "data": list(many_audiences("a", audiences))})
        self.response = decode(body.encode())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    @asynccontextmanager
    async def stream(self, accounts: AsyncIterator[Account], **_: object) -> AsyncIterator[AsyncIterator[Fetched]]:
        yield (Fetched(account, 0.0, self.response) async for account in accounts)


async def work(url: str, parts: str, workers: int, audiences: int) -> None:
    await asyncio.gather(*(distributed.work(url, Everyone(), parts, Instant(audiences)) for _ in range(workers)))


class Watch:
    """The greatest memory of Redis and of this process, second by second."""

    def __init__(self, url: str) -> None:
        self.redis = Redis.from_url(url)
        self.memory = 0.0
        self.resident = 0.0

    async def run(self) -> None:
        while True:
            self.memory = max(self.memory, (await self.redis.info("memory"))["used_memory"] / 1e6)
            self.resident = max(self.resident, resident())
            await asyncio.sleep(0.2)

    async def commands(self) -> int:
        return (await self.redis.info("stats"))["total_commands_processed"]


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


async def submit(url: str, parts: str, out: Path, accounts: int) -> dict[str, float]:
    names = (f"account-{number:08d}" for number in range(accounts))
    watch = Watch(url)
    watching = asyncio.create_task(watch.run())
    before, started, cpu, commands = resident(), time.perf_counter(), time.process_time(), await watch.commands()
    with OutcomeFile(out) as file:
        await distributed.submit(url, names, parts, file, on_merged=lambda line: None, on_notice=print)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    commands = await watch.commands() - commands
    watching.cancel()
    await asyncio.wait({watching})
    await watch.redis.aclose()
    return {
        "accounts": accounts,
        "seconds": seconds,
        "accounts/s": accounts / seconds,
        "commands/account": commands / accounts,
        "submitter ms/1000": 1e6 * cpu / accounts,
        "submitter +MB": watch.resident - before,
        "Redis MB": watch.memory,
    }


def measure(accounts: int, audiences: int, workers: int, processes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url:
        parts = str(Path(folder) / "parts")
        command = [sys.executable, __file__, "--work", url, parts, "--workers", str(workers // processes)]
        command += ["--audiences", str(audiences)]
        running = [subprocess.Popen(command) for _ in range(processes)]
        try:
            return asyncio.run(submit(url, parts, Path(folder) / "out", accounts))
        finally:
            for process in running:
                process.kill()
                process.wait()


def figures(rows: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield each column, beside the job of the fewest accounts, for `save`."""
    names = [f"{row['accounts']:,} accounts" for row in rows]
    for column in rows[0]:
        if column != "accounts":
            values = {name: [row[column]] for name, row in zip(names, rows, strict=True)}
            yield from table(column, names[0], values, column, better="more" if column == "accounts/s" else "less")


def main() -> None:
    command = parser(__doc__.partition("\n")[0])
    command.add_argument("--accounts", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    command.add_argument("--audiences", type=int, default=20, help="per account; 20 are about 3 KB")
    command.add_argument("--workers", type=int, default=50)
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--work", nargs=2, metavar=("URL", "PARTS"))
    given = command.parse_args()
    if given.work:
        asyncio.run(work(*given.work, given.workers, given.audiences))
        return
    rows: list[dict[str, float]] = []
    for accounts in given.accounts:
        rows.append(row := measure(accounts, given.audiences, given.workers, given.processes))
        print(*row, sep="\t") if accounts == given.accounts[0] else None
        print(*(f"{value:.4g}" for value in row.values()), sep="\t", flush=True)
    save(given.json, figures(rows), "redis")
    commands = row["commands/account"] * PROJECTED
    minutes = row["submitter ms/1000"] * PROJECTED / 1e6 / 60
    print(f"\n{PROJECTED:,} accounts: {commands:,.0f} commands, {minutes:.1f} min of the submitter's CPU time")


if __name__ == "__main__":
    main()
