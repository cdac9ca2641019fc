"""A server with a thread and an event loop of its own, which works in any test and any program."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.typedefs import Handler


class ServerThread:
    """A server on the loopback address.

    Args:
        handler: Answers the requests, on the server's event loop.
        port: The port to listen on; 0 means any that is free.

    Attributes:
        base_url: Where it listens; empty before it started.
    """

    def __init__(self, handler: Handler, port: int) -> None:
        self.base_url: str = ""
        self._handler = handler
        self._port = port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="audiences-sandbox", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Return when it listens.

        Raises:
            OSError: It cannot listen.
        """
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self) -> None:
        """Return when it has ended."""
        self.call_soon(self._stop.set)
        self._thread.join()

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Have the server's event loop call *callback*; no effect if it does not run. From any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has been closed
                self._loop.call_soon_threadsafe(callback)

    async def stopped(self) -> None:
        """Return when the server is about to end. On its event loop."""
        await self._stop.wait()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised where the caller waits
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handler)
        # A client that leaves ends its request: it no longer hangs, and no longer counts as a connection.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self._port).start()
            self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            self._started.set()
            await self._stop.wait()
            await all_accepted()
        finally:
            await runner.cleanup()


async def all_accepted() -> None:
    """Return when each connection that waited at a server of this event loop is known to its handler.

    For before a server is closed: asyncio then drops what it has taken and not yet made a transport of, unclosed.
    The loop needs five turns for it: the socket, its task, the transport, the protocol, the handler's task.
    """
    for _ in range(5):
        await asyncio.sleep(0)
