"""A real server on the loopback address that answers as the service does, and misbehaves on request."""

import asyncio
import json
import os
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import attrs
from aiohttp import web
from multidict import CIMultiDict

from audiences_async._base import checks
from audiences_async.errors import ConfigurationError, phrase
from audiences_async.models import Account
from audiences_async.sandbox.accounts import EXAMPLE_AUDIENCES, SandboxAccount
from audiences_async.sandbox.answers import Answer, SeenRequest
from audiences_async.sandbox.limits import Limit, TokenBucket
from audiences_async.sandbox.outages import Outage
from audiences_async.sandbox.thread import ServerThread
from audiences_async.sandbox.throttling import Refusal, Throttle, admission, quota_headers

# The descriptions of the service's own page: https://api.commbox.io/ (GET /audiences).
_DESCRIPTIONS: Final[Mapping[int, str]] = {
    200: "Audiences retrieved",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    429: "Too Many Requests – Rate limit exceeded",
    500: "Server Error",
}
_UNAVAILABLE: Final = Answer(503)
_RESET_ON_CLOSE: Final = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


class Sandbox:
    """The service on this machine: follows its documentation, and misbehaves on request.

    A sync context manager; the server has a thread and an event loop of its own, so it works in any test and any
    program::

        with Sandbox() as sandbox:
            account = sandbox.add_account("north")
            sandbox.script("north", Answer(500), Answer(failure="reset"))
            async with AudiencesClient(base_url=sandbox.base_url) as client:
                await client.get_audiences(account)

    Args:
        seed: Decides the random faults: with the same seed, the n-th answer to an account is the same.
        port: The port to listen on; 0 means any that is free.
        time: The clock that limits are measured by, in seconds; called in the server's thread. A test in stepped time
            passes ``audiences_time.clock.monotonic``.

    Attributes:
        requests: What reached the server, in order.
    """

    def __init__(self, *, seed: int = 0, port: int = 0, time: Callable[[], float] = time.monotonic) -> None:
        self.requests: list[SeenRequest] = []
        self._seed = seed
        self._time = time
        self._accounts: dict[str, SandboxAccount] = {}
        self._by_key: dict[str, SandboxAccount] = {}
        self._shared: Throttle | None = None
        self._outages: list[tuple[Answer, asyncio.Event]] = []  # the answer, and whether the outage has ended
        self._server = ServerThread(self._handle, port)
        self._seen = threading.Condition()

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for outage in list(self._outages):
            self._end_outage(outage)
        self._server.stop()

    @property
    def base_url(self) -> str:
        """Where it listens, for ``AudiencesClient(base_url=...)``; empty before it started."""
        return self._server.base_url

    def add_account(
        self,
        name: str = "default",
        *,
        api_key: str | None = None,
        audiences: Iterable[Mapping[str, Any]] = EXAMPLE_AUDIENCES,
        rate: float | None = None,
        burst: int = 1,
        limit: Limit | None = None,
        refusal: Refusal = 429,
        retry_after: bool = False,
        quota_headers: bool = False,
        fault_rate: float = 0.0,
    ) -> Account:
        """Open an account, and give it as a client wants it.

        Args:
            name: Its label.
            api_key: Its bearer token; ``None`` makes one up.
            audiences: The records it answers with.
            rate: Requests per second that it grants; ``None`` means any number. Short for
                ``limit=TokenBucket(rate, burst)``.
            burst: Requests that it grants at once after a pause.
            limit: Any other limit of this account, such as ``FixedWindow(100, per=60.0)``.
            refusal: The status of a request that the limit refuses.
            retry_after: Whether a refusal has ``Retry-After``, in whole seconds, if the wait is known. The service's
                documentation promises none.
            quota_headers: Whether each reply announces the remaining quota, in the headers ``RateLimit`` and
                ``RateLimit-Policy``.
            fault_rate: The share of answers that go wrong, from 0.0 to 1.0: refused, reset or cut short.

        Raises:
            ConfigurationError: A name, a key or a number that cannot be used.
        """
        limit = _one_limit(rate, burst, limit)
        if not 0.0 <= fault_rate <= 1.0:
            raise ConfigurationError(f"fault_rate must be from 0.0 to 1.0, got {fault_rate!r}")
        account = SandboxAccount(
            name=name,
            api_key=f"sandbox-key-{name}" if api_key is None else api_key,
            audiences=tuple(audiences),
            script=deque(),
            throttle=None if limit is None else Throttle("default", limit, refusal, retry_after, quota_headers),
            fault_rate=fault_rate,
            faults=random.Random(f"{self._seed}/{name}"),  # noqa: S311 - faults, not secrets
        )
        opened = Account(name, account.api_key)
        self._accounts[name] = self._by_key[account.api_key] = account
        return opened

    def set_shared_limit(
        self,
        limit: Limit | None,
        *,
        refusal: Refusal = 429,
        retry_after: bool = False,
        quota_headers: bool = False,
    ) -> None:
        """Limit all accounts together from now on, in addition to the limits of each.

        Args:
            limit: The limit, which replaces the shared limit set before; ``None`` removes it.
            refusal: The status of a request that it refuses.
            retry_after: As for `add_account`.
            quota_headers: As for `add_account`; the name of the quota is ``shared``.

        Raises:
            ConfigurationError: The limit or the status is invalid.
        """
        self._shared = None if limit is None else Throttle("shared", limit, refusal, retry_after, quota_headers)

    def outage(self, answer: Answer = _UNAVAILABLE) -> Outage:
        """Begin an outage: every request gets *answer*, until the outage ends or the sandbox closes.

        Outages begin and end at any time and in any thread. During an outage, requests count for no limit and use no
        scripted answer. If several outages overlap, the one that began last decides::

            with sandbox.outage(Answer(failure="hang")):
                ...

        Args:
            answer: The status, delay or failure that each request gets.

        Returns:
            The outage, which ends with its ``with`` block or by ``end()``.
        """
        outage = (answer, asyncio.Event())
        self._outages.append(outage)
        return Outage(partial(self._end_outage, outage))

    def script(self, name: str, *answers: Answer) -> None:
        """Answer the account's next requests so, one after the other, whatever their path; then as usual again."""
        self._accounts[name].script.extend(answers)

    def revoke(self, name: str, *, api_key: str) -> None:
        """Give the account another key; the old one is refused from now on."""
        account = self._accounts[name]
        del self._by_key[account.api_key]
        account.api_key = api_key
        self._by_key[api_key] = account

    def seen(self, name: str) -> list[SeenRequest]:
        """The requests of one account, in order."""
        return [request for request in self.requests if request.account == name]

    def wait_for_requests(self, count: int, *, timeout: float = 10.0) -> None:
        """Block until *count* requests have reached the server; in async code, by ``asyncio.to_thread``.

        Raises:
            TimeoutError: They have not within *timeout* seconds.
        """
        with self._seen:
            if not self._seen.wait_for(lambda: len(self.requests) >= count, timeout):
                raise TimeoutError(f"{len(self.requests)} of {count} requests came within {timeout:g} s")

    def _end_outage(self, outage: tuple[Answer, asyncio.Event]) -> None:
        with suppress(ValueError):  # it has ended before
            self._outages.remove(outage)
        self._server.call_soon(outage[1].set)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        now, account = self._time(), self._by_key.get(_key_of(request))
        outage = next(reversed(self._outages), None)
        if outage is not None:
            answer, ended = outage
            return await self._reply(request, account, answer, now, hang_until=ended)
        error = _routing_error(request, is_scripted=account is not None and bool(account.script))
        if error is not None or account is None:
            return await self._reply(request, account, error or Answer(401), now)
        throttles = [throttle for throttle in (self._shared, account.throttle) if throttle is not None]
        with admission(throttles, now) as refusal:
            answer = refusal or account.answer()
            headers = {**quota_headers(throttles, now), **answer.headers}
            return await self._reply(request, account, attrs.evolve(answer, headers=headers), now)

    async def _reply(
        self,
        request: web.Request,
        account: SandboxAccount | None,
        answer: Answer,
        now: float,
        *,
        hang_until: asyncio.Event | None = None,
    ) -> web.StreamResponse:
        """Record the request, then answer it or let its connection die."""
        transport = request.transport
        assert transport is not None
        self._remember(request, account, answer, now)
        if answer.delay:
            await asyncio.sleep(answer.delay)
        body = _body(answer, account)
        if answer.failure == "hang":
            await (self._server.stopped() if hang_until is None else hang_until.wait())
            transport.close()
        elif answer.failure == "reset":
            _reset(transport)
        elif answer.failure is not None:
            await _write_half(request, transport, answer, body)
        return web.Response(status=answer.status, body=body, headers=_headers(answer))

    def _remember(self, request: web.Request, account: SandboxAccount | None, answer: Answer, now: float) -> None:
        headers = CIMultiDict(request.headers)
        headers.popall("Authorization", None)
        seen = SeenRequest(
            account=None if account is None else account.name,
            method=request.method,
            path=request.path_qs,
            headers=headers,
            at=now,
            answer=None if answer.failure else answer.status,
        )
        with self._seen:
            self.requests.append(seen)
            self._seen.notify_all()


def _one_limit(rate: float | None, burst: int, limit: Limit | None) -> Limit | None:
    """Return the limit that *rate* and *burst* stand for, or else *limit*."""
    checks.count("burst", burst)
    if rate is None:
        return limit
    if limit is not None:
        raise ConfigurationError("an account has either rate or limit, got both")
    return TokenBucket(checks.number("rate", rate), burst)


def _key_of(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _routing_error(request: web.Request, *, is_scripted: bool) -> Answer | None:
    if request.path.lower() != "/audiences" and not is_scripted:
        return Answer(404)
    return None if request.method == "GET" else Answer(405, headers={"Allow": "GET"})


def _headers(answer: Answer) -> dict[str, str]:
    challenge = {"WWW-Authenticate": "Bearer"} if answer.status == 401 else {}
    wait = {} if answer.retry_after is None else {"Retry-After": str(answer.retry_after)}
    return {"Content-Type": "application/json; charset=utf-8", **challenge, **wait, **answer.headers}


def _body(answer: Answer, account: SandboxAccount | None) -> bytes:
    if isinstance(answer.body, bytes):
        return answer.body
    if isinstance(answer.body, str):
        return answer.body.encode()
    documented = _envelope(answer.status, account) if answer.body is None else answer.body
    return json.dumps(documented, ensure_ascii=False).encode()


def _envelope(status: int, account: SandboxAccount | None) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    described = _DESCRIPTIONS.get(status) or phrase(status)
    # A string in a 200 and an integer in errors: so it is documented.
    said = {"status": "200" if status == 200 else status, "description": described, "response_time": now}
    return {**said, "data": list(account.audiences)} if status == 200 and account is not None else said


async def _write_half(request: web.Request, transport: asyncio.BaseTransport, answer: Answer, body: bytes) -> None:
    response = web.StreamResponse(status=answer.status, headers=_headers(answer))
    response.content_length = len(body)
    with suppress(ConnectionError):  # the peer may have gone first
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
    if answer.failure == "reset-in-body":
        # The peer reads the half first: a reset throws away what still waits to be read.
        await asyncio.sleep(0.01)
        _reset(transport)
    else:
        transport.close()


def _reset(transport: asyncio.BaseTransport) -> None:
    with suppress(OSError):  # the peer may have gone first
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.close()
