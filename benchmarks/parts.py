"""The parts of a call with 20 audiences, of a record, and of the import: where the rest of the time is.

Run ``python benchmarks/parts.py [rounds] [--json FILE]``; it needs valgrind, and takes a minute. Calls and records are
counted in instructions outside the kernel, which a busy machine hardly changes. Rounds are those of the import, in ms.
"""

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import aiohttp
from common import arguments, body, report, save, server
from imports import beyond
from yarl import URL

from audiences_async import Account, AudiencesClient
from audiences_async._base.deadlines import CallTime, Deadlines
from audiences_async._http.wire import Reply
from audiences_async._pace.pacing import ANSWERED
from audiences_async.structuring import decode

MARK = "getpgrp"  # a function that only this script calls: callgrind writes what it has counted, and begins anew
TURNS, WARM_UP, AUDIENCES, RECORDS = 300, 100, 20, 1_000
WHOLE = "the whole"
PACKAGES = ("audiences_async", "aiohttp", "attr", "cattrs", "msgspec", "tenacity", "yarl")  # of the import; not all
CASES = ("whole", "bare", "attempt", "pacing", "loop", "decode", "records")


class _Exchange(asyncio.Protocol):
    """Sends a request and waits for the reply, which comes in one read: the least that a call needs."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert data.endswith(b"}")
        self._done.set_result(None)

    def send(self) -> asyncio.Future[None]:
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(b"GET /audiences HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer key\r\n\r\n")
        return self._done


async def child(base_url: str) -> None:
    """Do all cases, one after the other; callgrind counts."""
    url, loop, account = URL(f"{base_url}audiences"), asyncio.get_running_loop(), Account("north", "key")
    async with aiohttp.ClientSession() as session, AudiencesClient(base_url=base_url) as client:
        await client.get_audiences(account)
        context = client._engine.open().context  # noqa: SLF001 - the parts are private
        lane, scopes, now = context.pacer.lane(account), Deadlines(), context.clock.monotonic
        _, exchange = await loop.create_connection(_Exchange, url.host, url.port)

        async def bare() -> None:
            async with session.get(str(url), headers={"Authorization": "Bearer key"}) as response:
                await response.read()

        async def attempt() -> None:
            assert isinstance(await context.transport.attempt(account.credential), Reply)

        async def paced() -> None:
            with scopes.within(60.0) as scope:
                turn = await context.pacer.acquire(lane, CallTime(now, scope, 60.0), None)
                context.pacer.release(lane, turn, ANSWERED)

        async def decoded(reply: bytes) -> None:
            decode(reply)

        whole = partial(client.get_audiences, account)
        decoding = partial(decoded, body(AUDIENCES)), partial(decoded, body(RECORDS))
        for case in (whole, bare, attempt, paced, exchange.send, *decoding):  # as CASES
            for turns in (WARM_UP, TURNS):
                gc.collect()
                os.getpgrp()
                for _ in range(turns):
                    await case()
            os.getpgrp()  # the third mark of each case: what was counted since the second are its turns


def instructions(path: Path) -> Counter[str]:
    """Return what callgrind counted, by the file that holds the code, for one turn."""
    names: dict[str, str] = {}
    found: Counter[str] = Counter()
    current, is_callee = "", False  # the next cost line of a callee is counted where it belongs
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(("ob=", "cob=")):
            number, _, name = line.partition("=")[2].partition(" ")
            names.setdefault(number, Path(name).name.partition(".")[0])
            current = names[number] if line[0] == "o" else current
        elif line[:1].isdigit() or line[:1] in {"+", "-", "*"}:
            found[current] += 0 if is_callee else int(line.split()[1])
        is_callee = line.startswith("calls=")
    return Counter({name: round(count / TURNS) for name, count in found.items()})


def measured() -> dict[str, Counter[str]]:
    with tempfile.TemporaryDirectory() as folder, server(body(AUDIENCES)) as base_url:
        options = ("-q", "--tool=callgrind", f"--dump-before={MARK}", f"--callgrind-out-file={folder}/out")
        command = ["valgrind", *options, sys.executable, __file__, "--child", base_url]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "0"})
        return {case: instructions(Path(f"{folder}/out.{3 * number}")) for number, case in enumerate(CASES, 1)}


def of_a_call(count: dict[str, int]) -> dict[str, list[float]]:
    parts = {
        "event loop and socket": count["loop"],
        "aiohttp, and our exchange around it": count["attempt"] - count["loop"],
        "pacing, and a deadline": count["pacing"],
        "decoding": count["decode"],
    }
    rest = {"our call and retry objects": count["whole"] - sum(parts.values())}
    also = {WHOLE: count["whole"], "aiohttp get + read, for comparison": count["bare"]}
    return {name: [float(value)] for name, value in (parts | rest | also).items()}


def of_the_import(rounds: int) -> dict[str, list[float]]:
    taken = []
    for _ in range(rounds):
        parts: Counter[str] = Counter()
        for own, name in beyond("pass"):
            root = name.partition(".")[0]
            parts["standard library" if root in sys.stdlib_module_names else root] += own
        taken.append(parts | {WHOLE: parts.total()})
    return {name: [parts[name] for parts in taken] for name in (WHOLE, "standard library", *PACKAGES)}


def main() -> None:
    options = arguments(5)
    found = measured()
    of_records = Counter({WHOLE: found["records"].total()}) + found["records"]
    counts = {case: files.total() for case, files in found.items()}
    records = report(f"parts of a call with {AUDIENCES} audiences", WHOLE, of_a_call(counts), "instructions", 1.0)
    files = {name: [count / RECORDS] for name, count in of_records.most_common(5)}
    records += report(f"parts of a record of {RECORDS:,}, by file of the code", WHOLE, files, "instructions", 1.0)
    records += report("parts of the import", WHOLE, of_the_import(options.rounds), "ms", 1e-3)
    save(options.json, records)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        asyncio.run(child(sys.argv[2]))
    else:
        main()
