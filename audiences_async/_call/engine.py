"""The parts that a client and its variants share: event loop, pool, pace and cache, from first use to the end."""

import asyncio

from attrs import frozen

from audiences_async._base.deadlines import Deadlines
from audiences_async._call.calls import Calls
from audiences_async._call.context import CallContext
from audiences_async._call.retrying import RetryTokens
from audiences_async._http.transport import Transport, TransportSettings
from audiences_async._pace.pacer import Pacer
from audiences_async.clock import Clock
from audiences_async.errors import ClientClosedError, ConfigurationError
from audiences_async.events import EventHook
from audiences_async.policies import CachePolicy, Limiter, RateLimit, RetryPolicy
from audiences_async.snapshots import ClientSnapshot


@frozen(eq=False)
class EngineSettings:
    """The settings of a client that its variants have too; see `AudiencesClient` for each."""

    retry: RetryPolicy
    tokens: RetryTokens
    clock: Clock
    on_event: EventHook | None
    request_id_header: str | None
    transport: TransportSettings
    rate_limit: RateLimit | Limiter | None
    service_rate_limit: RateLimit | Limiter | None
    cache: CachePolicy | None
    timeout: float


class Engine:
    """The running parts of a client, created on first use, on the event loop.

    Args:
        settings: The client's.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings: EngineSettings = settings
        self.calls: Calls | None = None
        """The calls; ``None`` before the first use."""
        self.closed: bool = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> Calls:
        """Return the calls.

        Raises:
            ClientClosedError: It is closed, or belongs to another event loop.
            ConfigurationError: No asyncio event loop is running.
        """
        if self.closed:
            raise ClientClosedError("the client is closed; make a new one")
        self._check_loop()
        if self.calls is None:
            settings, deadlines = self.settings, Deadlines()
            self._transport = transport = Transport(settings.transport)
            pacer = self._new_pacer(transport, deadlines)
            context = CallContext(
                settings.retry,
                settings.tokens,
                settings.clock,
                settings.on_event,
                pacer,
                transport,
                settings.request_id_header,
            )
            self.calls = Calls(context, deadlines, cache=settings.cache, timeout=settings.timeout)
        return self.calls

    async def close(self) -> None:
        """End all calls, and close the session if it is the client's own. May be called more than once."""
        if self.calls is None:
            self.closed = True
            return
        self._check_loop()
        self.closed = True
        try:
            await self.calls.close()
        finally:
            await self._transport.close()

    def snapshot(self) -> ClientSnapshot:
        """Return why calls wait right now."""
        tokens = self.settings.tokens.left
        if self.calls is None:
            return ClientSnapshot((), tokens, None)
        pacer = self.calls.context.pacer
        service = pacer.service.snapshot(pacer.clock.monotonic())
        return ClientSnapshot(tuple(pacer.snapshot()), tokens, service)

    def _new_pacer(self, transport: Transport, deadlines: Deadlines) -> Pacer:
        settings = self.settings
        pacer = Pacer(
            settings.rate_limit,
            settings.service_rate_limit,
            connections=transport.connections,
            attempt_timeout=settings.transport.attempt_timeout,
            throttle_base_delay=settings.retry.throttle_base_delay,
            max_delay=settings.retry.max_delay,
            clock=settings.clock,
            deadlines=deadlines,
            on_event=settings.on_event,
        )
        pacer.service.abandon = transport.abandon
        return pacer

    def _check_loop(self) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            problem = "no running asyncio event loop; AudiencesClient works with asyncio only"
            raise ConfigurationError(f"{problem}, inside asyncio.run() or anyio's asyncio backend") from None
        if self._loop is None:
            self._loop = running
        if self._loop is not running:
            raise ClientClosedError("the client belongs to another event loop; make one client for each loop")
