"""Real servers from installed binaries, on loopback and free ports, for tests and benchmarks."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from attrs import frozen

NGINX = """
{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 2048; }}
http {{
  limit_req_zone {key} zone=keys:10m rate={rate}r/s;
  log_format seen '$http_authorization $status $msec';
  access_log {folder}/seen seen;
  keepalive_requests 1000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    root {folder};
    location = /audiences {{
      limit_req zone=keys burst={burst} nodelay; limit_req_status 429;
      if ($http_authorization = "Bearer blocked") {{ return 429; }}
      try_files /audiences.json =500;
    }}
  }}
}}
"""


@frozen
class Nginx:
    """A running nginx with a limit per key."""

    base_url: str
    log: Path

    def statuses(self, key: str) -> list[int]:
        """Return the statuses of all requests with this key, in order."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return [int(line[2]) for line in lines if line[1] == key]


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def missing(binary: str) -> bool:
    """Return whether a binary is not installed; never on CI (``CI`` is set), so that no test is skipped there."""
    return shutil.which(binary) is None and not os.environ.get("CI")


def missing_module(name: str) -> bool:
    """Return whether a module is not installed; never on CI (``CI`` is set), so that no test is skipped there."""
    return importlib.util.find_spec(name) is None and not os.environ.get("CI")


@contextlib.contextmanager
def nginx(folder: Path, body: bytes, *, rate: int, burst: int, key: str = "$http_authorization") -> Iterator[Nginx]:
    """Run nginx with `limit_req` for each value of *key*, and without ``Retry-After``, inside the block."""
    port = free_port()
    (folder / "audiences.json").write_bytes(body)
    config = folder / "nginx.conf"
    config.write_text(
        NGINX.format(
            user="user root;" if os.geteuid() == 0 else "", folder=folder, port=port, rate=rate, burst=burst, key=key
        )
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-e", str(folder / "errors")])
    try:
        _wait_for(port)
        yield Nginx(f"http://127.0.0.1:{port}/", folder / "seen")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def redis_server(folder: Path, port: int | None = None, *options: str) -> Iterator[str]:
    """Run a Redis inside the block; yield its URL. Everything that is written to it is in the folder."""
    port = port or free_port()
    place = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    options = (*place, "--save", "", "--appendonly", "yes", *options)
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Forwarder:
    """A loopback address behind which another server can take over, as the name of a managed Redis is.

    Attributes:
        port: The port that it listens on.
        target: The port that new connections go to.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            with contextlib.closing(writer), contextlib.suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", self.target)
                with contextlib.closing(back):
                    ways = [asyncio.create_task(_copy(reader, back)), asyncio.create_task(_copy(there, writer))]
                    try:
                        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for way in ways:
                            way.cancel()
                        await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._running.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 inside the block; yield its URL. Every bucket that is asked for must be created first."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def create_bucket(endpoint: str, name: str) -> None:
    """Create a bucket on moto's S3."""
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()


def _wait_for(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise TimeoutError(f"nobody listens on port {port}")
