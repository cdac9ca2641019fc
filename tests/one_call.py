"""A program that measures one call in a process with little else in it; see `faults.measure`."""

import asyncio
import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Literal

from attrs import frozen

from audiences_async import AudiencesClient, AudiencesError, RetryPolicy


@frozen
class Value:
    """An answer with that many audiences."""

    audiences: int

    def __str__(self) -> str:
        return f"{self.audiences} audience{'s' if self.audiences != 1 else ''}"


@frozen
class Refused:
    """An error: its exact class and known attributes."""

    error: type[AudiencesError]
    status: int | None = None
    path: str = ""
    """Path of the first problem."""

    def __str__(self) -> str:
        details = [str(self.status)] if self.status is not None else [self.path] if self.path else []
        return " ".join([self.error.__name__, *details])


async def _measured(ordinary: int, port: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    once = RetryPolicy(max_attempts=1)
    async with AudiencesClient("key", base_url=f"http://127.0.0.1:{ordinary}/", retry=once) as client:
        await client.get_audiences()
    idle = _memory("VmRSS")
    gc.collect()
    gc.freeze()  # keeps the collector's passes over the program's own objects out of the measurement
    async with AudiencesClient("key", base_url=f"http://127.0.0.1:{port}/", retry=once, **settings) as client:
        gaps: list[float] = []
        ticker = asyncio.create_task(_tick(gaps))
        await asyncio.sleep(0.05)  # lets the ticker reach its pace
        started = perf_counter()
        try:
            outcome = str(Value(len(await client.get_audiences())))
        except AudiencesError as error:
            outcome = str(Refused(type(error), getattr(error, "status", None)))
        seconds = perf_counter() - started
        await asyncio.sleep(0.05)  # memory freed after the call counts too
        ticker.cancel()
    return {"outcome": outcome, "idle": idle, "peak": _memory("VmHWM"), "gap": max(gaps), "seconds": seconds}


async def _tick(gaps: list[float]) -> None:
    """Measure CPU time between two ticks of the loop; that of other processes does not count."""
    last = thread_time()
    while True:
        await asyncio.sleep(0.01)
        now = thread_time()
        gaps.append(now - last)
        last = now


def _memory(name: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the memory of this process in bytes. `resource` has no current size, and its peak is inherited."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    _ordinary, _port, _settings = sys.argv[1:]
    print(json.dumps(asyncio.run(_measured(int(_ordinary), int(_port), json.loads(_settings)))))  # noqa: T201
