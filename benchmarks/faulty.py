"""A service with faults and limits, for the benchmarks, in a process of its own; the standard library only.

Run as ``python benchmarks/faulty.py SETTINGS`` (JSON, see `Faults`). It prints its port, and after a line on the
standard input (or its end) a report: all requests, and when the outage was.
"""

import asyncio
import json
import random
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from limiters import LIMITS, Meter

PLACE = b"account-xxxxxx"  # where a body has the account's key; every key is as long
NOW = b"2026-02-11T12:00:00.000Z"
REASONS = {200: b"OK", 429: b"Too Many Requests", 500: b"Internal Server Error", 503: b"Service Unavailable"}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


@dataclass(frozen=True)
class Faults:
    """What is wrong with the service.

    Attributes:
        audiences: Audiences of each account.
        delay: Seconds before each reply.
        share: Share of the requests that are answered with 503, at random.
        seed: Of that randomness.
        bad_status: What accounts whose key starts with ``bad`` get.
        outage: ``"503"``, ``"refused"``, ``"reset"`` or ``"hang"``; empty for none.
        outage_after: Answers before the outage.
        outage_at: Seconds from the first request to the outage; 0 if *outage_after* decides.
        outage_seconds: How long it lasts.
        workers: Requests that are worked on at the same time, in order; 0 for all.
        work: Seconds of work on each request; those whose client has gone are worked on too.
        limit: Name of the limit, one of `LIMITS`; empty for none. It refuses with 429, and ignores requests that arrive
            during an outage.
        limit_settings: Its arguments.
        limit_is_shared: Whether all accounts share one meter.
    """

    audiences: int = 2
    delay: float = 0.0
    share: float = 0.0
    seed: int = 0
    bad_status: int = 200
    outage: str = ""
    outage_after: int = 0
    outage_at: float = 0.0
    outage_seconds: float = 0.0
    workers: int = 0
    work: float = 0.0
    limit: str = ""
    limit_settings: dict[str, Any] = field(default_factory=dict)
    limit_is_shared: bool = False


@dataclass
class Request:
    """A request: when it came and was answered, its key, its status (0: no answer), and if the limit refuses it."""

    arrived: float
    key: bytes
    done: float = 0.0
    status: int = 0
    refused: bool = False


def template(status: int, audiences: int) -> bytes:
    """Return a whole reply, in which `PLACE` stands for the account's key."""
    envelope: dict[str, Any] = {"status": str(status) if status == 200 else status, "response_time": NOW.decode()}
    envelope["description"] = REASONS[status].decode()
    if status == 200:
        envelope["data"] = [record(number) for number in range(audiences)]
    body = json.dumps(envelope).encode()
    head = b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, REASONS[status], len(body)) + body


def record(number: int) -> dict[str, Any]:
    """Return an audience; every other one is Static."""
    kind = {"type": "Dynamic"} if number % 2 else {"type": "Static", "user_count": number}
    common = {"id": f"{PLACE.decode()}-{number}", "name": f"Audience {number}", "created_time": "2025-10-01T09:10:00Z"}
    return common | kind


@dataclass
class Service:
    """Decides what each request gets, and keeps the log."""

    faults: Faults
    log: list[Request] = field(default_factory=list)
    connections: set["Connection"] = field(default_factory=set)
    answers: int = 0
    outage_from: float = 0.0
    outage_until: float = 0.0
    port: int = 0

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self.port, backlog=2048)
        self.port = self.server.sockets[0].getsockname()[1]

    def prepare(self) -> None:
        """Make the replies and start the workers."""
        self.replies = {status: template(status, self.faults.audiences) for status in REASONS}
        self.random = random.Random(self.faults.seed)
        self.meters: dict[bytes, Meter] = {}
        self.queue: asyncio.Queue[tuple[Connection, Request]] = asyncio.Queue()
        self.tasks = {asyncio.create_task(self.worker()) for _ in range(self.faults.workers)}

    @property
    def is_out(self) -> bool:
        """Whether the outage lasts."""
        return self.outage_from > 0 and not self.outage_until

    def take(self, connection: "Connection", key: bytes) -> None:
        """Note a request, and answer it in time."""
        request = Request(time.monotonic(), key)
        self.log.append(request)
        if self.faults.outage_at and len(self.log) == 1:
            asyncio.get_running_loop().call_later(self.faults.outage_at, self.begin_outage)
        if self.faults.limit and not self.is_out and not self.grants(request):
            request.refused = True
        if self.faults.workers:
            self.queue.put_nowait((connection, request))
        elif self.faults.delay:
            asyncio.get_running_loop().call_later(self.faults.delay, self.answer, connection, request)
        else:
            self.answer(connection, request)

    async def worker(self) -> None:
        """Work on one request after the other."""
        while True:
            connection, request = await self.queue.get()
            await asyncio.sleep(self.faults.work)
            self.answer(connection, request)

    def answer(self, connection: "Connection", request: Request) -> None:
        """Answer a request if its client is still there and the service is not silent."""
        if self.is_out and self.faults.outage != "503":
            if self.faults.outage == "reset":
                connection.reset()
            return
        if connection.is_gone:
            return
        status = 503 if self.is_out else 429 if request.refused else self.status(request.key)
        connection.transport.write(self.replies[status].replace(PLACE, request.key))
        request.done, request.status = time.monotonic(), status
        self.answers += status == 200
        by_answers = self.faults.outage and not self.faults.outage_at
        if by_answers and not self.outage_from and self.answers >= self.faults.outage_after:
            self.begin_outage()

    def grants(self, request: Request) -> bool:
        """Return whether the limit grants a request."""
        key = b"" if self.faults.limit_is_shared else request.key
        if key not in self.meters:
            self.meters[key] = LIMITS[self.faults.limit](**self.faults.limit_settings).meter()
        return self.meters[key](request.arrived)

    def status(self, key: bytes) -> int:
        """Return what a request with this key gets, outages aside."""
        if key.startswith(b"bad"):
            return self.faults.bad_status
        return 503 if self.random.random() < self.faults.share else 200

    def begin_outage(self) -> None:
        """Begin the outage, and have it end."""
        self.outage_from = time.monotonic()
        if self.faults.outage == "refused":
            self.server.close()
            for connection in tuple(self.connections):
                connection.reset()
        self.tasks.add(asyncio.create_task(self.end_outage()))

    async def end_outage(self) -> None:
        """End the outage after its time."""
        await asyncio.sleep(self.faults.outage_seconds)
        if self.faults.outage == "refused":
            await self.start()
        self.outage_until = time.monotonic()

    def report(self) -> str:
        """Return everything as JSON."""
        log = [(each.arrived, each.done, each.key.decode(), each.status) for each in self.log]
        return json.dumps({"log": log, "outage": [self.outage_from, self.outage_until]})


class Connection(asyncio.Protocol):
    """Takes requests without a body, one at a time."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.received = b""
        self.is_gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the open connections."""
        self.transport: Any = transport
        self.service.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the open connections."""
        self.is_gone = True
        self.service.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Take a request once its head is whole."""
        self.received += data
        if b"\r\n\r\n" in self.received:
            start = self.received.index(b"Bearer ") + len(b"Bearer ")
            key, self.received = self.received[start : start + len(PLACE)], b""
            self.service.take(self, key)

    def reset(self) -> None:
        """End the connection with a reset."""
        if not self.is_gone:
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.transport.abort()


async def main() -> None:
    service = Service(Faults(**json.loads(sys.argv[1])))
    service.prepare()
    await service.start()
    print(service.port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(service.report(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
