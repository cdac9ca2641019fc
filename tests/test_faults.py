"""Every fault of the catalogue: the right value or the right error, in bounded time, memory and requests."""

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import pytest
from fault_table import ROWS, Row
from faults import (
    CATALOGUE,
    HEALED_ID,
    HEAVY,
    LONG,
    MIB,
    Fault,
    FaultServer,
    Measured,
    ServerThread,
    measure,
)
from one_call import Refused, Value

from audiences_async import AudiencesClient, AudiencesError, InvalidResponseError, StatusError


@pytest.fixture(scope="module")
def thread() -> Iterator[ServerThread]:
    """Yield the servers' thread."""
    with ServerThread() as thread:
        yield thread


@pytest.mark.slow
@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.name)
async def test_fault(fault: Fault, thread: ServerThread, request: pytest.FixtureRequest) -> None:
    """Produce the promised result and costs of a fault, and leave a working client and nothing else."""
    sockets = open_sockets()
    async with thread.serving(fault) as server:
        async with fault.client(server) as client:
            for _ in range(fault.before):
                await client.get_audiences()
            outcome, error, seconds = await meet(client, fault)
            requests = server.requests - fault.before
            rows = request.config.stash.setdefault(ROWS, [])
            rows.append(Row(fault.name, str(outcome), requests, seconds, fault.family))
            sent = server.sent
            if fault.heals:
                await assert_healed(client, server)
        assert asyncio.all_tasks() == {asyncio.current_task()}
    assert outcome == fault.outcome
    assert seconds <= fault.seconds
    assert_frugal(fault, server, requests, sent)
    if error is not None:
        assert len(error.attempts) == (fault.requests if fault.tries is None else fault.tries)
    assert not any(b"\r\ncookie:" in head.lower() for head in server.heads)
    async with asyncio.timeout(1.0):  # the event loop closes sockets in its next turns
        while open_sockets() - sockets:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


async def meet(client: AudiencesClient, fault: Fault) -> tuple[Value | Refused, AudiencesError | None, float]:
    """Make one call; return its outcome, its error if any, and its seconds."""
    started = perf_counter()
    try:
        response = await client.get_audiences()
    except AudiencesError as error:
        return refused(error, fault), error, perf_counter() - started
    return Value(len(response)), None, perf_counter() - started


def refused(error: AudiencesError, fault: Fault) -> Refused:
    """Return an error as the catalogue lists it."""
    status = error.status if isinstance(error, StatusError) else None
    if isinstance(error, StatusError | InvalidResponseError):
        assert len(error.body) <= 64 * 1024
    wanted = fault.outcome.path if isinstance(fault.outcome, Refused) else ""
    if not wanted or not isinstance(error, InvalidResponseError):
        return Refused(type(error), status)
    return Refused(type(error), status, error.problems[0].split(": ")[0])


def assert_frugal(fault: Fault, server: FaultServer, requests: int, sent: int) -> None:
    """Check that no more requests, connections or bytes were sent than the fault allows."""
    assert requests <= fault.requests if fault.fewer else requests == fault.requests
    assert server.connections <= fault.before + fault.attempts + 1  # and one for the call after it
    if fault.most_sent is not None:
        assert sent <= fault.most_sent * max(requests, 1)


async def assert_healed(client: AudiencesClient, server: FaultServer) -> None:
    """Heal the server, and check that the next call is answered."""
    server.healed = True
    response = await client.get_audiences(timeout=5.0)  # far below what an attempt may take
    assert [audience.id for audience in response] == [HEALED_ID]


def open_sockets() -> set[int]:
    """Return the inodes of this process's sockets."""
    inodes = set()
    for name in Path("/dev/fd").iterdir():
        try:
            known = os.fstat(int(name.name))
        except OSError:
            continue  # the listing's own
        if stat.S_ISSOCK(known.st_mode):
            inodes.add(known.st_ino)
    return inodes


@pytest.mark.slow
@pytest.mark.parametrize("fault", HEAVY, ids=lambda fault: fault.name)
async def test_peak_memory(fault: Fault, thread: ServerThread, request: pytest.FixtureRequest) -> None:
    """Use at most twice the limit in memory for a body far above it."""
    measured = await measure(fault, thread)
    cap: int = fault.settings["max_body_bytes"]
    peak = measured.peak - measured.idle
    add_row(request, f"memory: {fault.name}", f"{peak / MIB:.1f} MiB over idle, cap {cap / MIB:.0f} MiB", measured)
    assert measured.outcome == str(fault.outcome)
    assert peak <= 2 * cap


@pytest.mark.slow
@pytest.mark.parametrize("fault", LONG, ids=lambda fault: fault.name)
@pytest.mark.timed
async def test_no_stall(fault: Fault, thread: ServerThread, request: pytest.FixtureRequest) -> None:
    """Block the event loop for 50 ms at most with a long body, by a 10 ms ticker in the same loop."""
    # On a shared machine the work may take twice as long, but not five times in a row.
    tries: list[Measured] = []
    while len(tries) < 5 and (not tries or tries[-1].gap > 0.05):
        tries.append(await measure(fault, thread))
    best = min(tries, key=lambda measured: measured.gap)
    add_row(request, f"stall: {fault.name}", f"{best.gap * 1000:.0f} ms at a stretch", best)
    assert best.outcome == str(fault.outcome)
    assert best.gap <= 0.05


def add_row(request: pytest.FixtureRequest, name: str, figure: str, measured: Measured) -> None:
    """Add a row to the table of faults that the run prints."""
    request.config.stash.setdefault(ROWS, []).append(Row(name, figure, 1, measured.seconds))
