"""``audiences doctor``: checks in order, with a suggested fix for each failure."""

import asyncio
import re
import ssl as tls
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

from attrs import frozen
from rich.console import Console
from rich.text import Text
from yarl import URL

from audiences_async._base.dates import http_date
from audiences_async._http.transport import Transport, TransportSettings
from audiences_async._http.wire import Reply, read
from audiences_async.accounts import AccountFile
from audiences_async.cli import summary
from audiences_async.cli.exits import AUTHENTICATION, DONE, FAILED, PARTIAL, UNAVAILABLE, exit_code
from audiences_async.client import AudiencesClient
from audiences_async.credentials import ApiKey
from audiences_async.errors import AudiencesError, ConfigurationError, printable
from audiences_async.models import AudiencesResponse
from audiences_async.structuring import run_to_completion

_SKEW = 5.0  # s; Date has whole seconds, and a response takes time
_MAX_BODY = 64 * 2**20
_AT_ONCE = 10  # accounts that are checked at the same time
_QUOTA_HEADERS: Final = re.compile(r"(?i)(x-)?rate-?limit.*|retry-after")


@frozen
class Finding:
    """The result of a check.

    Attributes:
        check: Name of the check.
        message: The finding.
        hint: Suggested fix, in one or several lines; empty if the check passed.
        code: Exit code for this finding.
    """

    check: str
    message: str
    hint: str = ""
    code: int = DONE


async def examine(key: str | None, source: str, endpoint: URL, timeout: float) -> list[Finding]:
    """Run the checks and return their findings; a failure skips the checks that depend on it.

    Args:
        key: The API key; ``None`` or empty if missing.
        source: Where the key comes from.
        endpoint: The URL to request.
        timeout: Seconds for each check.
    """
    findings = [_key(key, source), await _name(endpoint, timeout)]
    # CPython 3.11's tracing loses this frame if the check before has caught an exception.
    if not findings[-1].code:  # pragma: no branch
        findings.append(await _connection(endpoint, timeout))
    if not any(finding.code for finding in findings):
        findings += await _request(ApiKey(key or ""), endpoint, timeout)
    return findings


async def examine_accounts(file: AccountFile, endpoint: URL, base_url: str | None, timeout: float) -> list[Finding]:
    """Run the checks for the first account of a file; then make a request for each account.

    Args:
        file: The accounts.
        endpoint: The URL to request.
        base_url: What `AudiencesClient` needs to request it.
        timeout: Seconds for each check, and for each account.
    """
    first = next(iter(file))
    assert isinstance(first.api_key, str)
    findings = [Finding("accounts", f"{len(file):,} in {printable(str(file.path))}")]
    findings += await examine(first.api_key, f"account '{printable(first.name)}'", endpoint, timeout)
    # As above: the frame may be lost after an exception in `examine`.
    if all(finding.check == "request" or not finding.code for finding in findings):  # pragma: no branch
        findings.append(await _every(file, base_url, timeout))
    return findings


async def _every(file: AccountFile, base_url: str | None, timeout: float) -> Finding:
    tally = summary.Tally()
    async with (
        AudiencesClient(base_url=base_url, timeout=timeout) as client,
        client.stream(file, concurrency=_AT_ONCE, patience=timeout) as outcomes,
    ):
        async for outcome in outcomes:
            tally.count(outcome)
    found = f"{tally.fetched:,} of {len(file):,} accounts answered, {tally.audiences:,} audiences"
    return Finding("all", found, "\n".join(summary.failures(tally)), PARTIAL if tally.failed else DONE)


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print each finding, in colour on a terminal."""
    for finding in findings:
        state = Text("FAILED" if finding.code else "ok", style="bold red" if finding.code else "green")
        state.pad_right(8 - len(state))
        line = Text.assemble(state, f"{finding.check:9}{printable(finding.message, limit=500)}")
        console.print(line, soft_wrap=True, highlight=False)
        for hint in finding.hint.splitlines() if finding.code else ():
            console.print(Text(f"{'':17}{hint}"), soft_wrap=True, highlight=False)


def _key(key: str | None, source: str) -> Finding:
    if not key:
        return Finding("key", "no API key", "set AUDIENCES_API_KEY or use --api-key-file", AUTHENTICATION)
    try:
        ApiKey(key).validate(account=None)
    except ConfigurationError as error:
        return Finding(
            "key", f"from {source}: {error.message}", "copy the key again, alone on its line", AUTHENTICATION
        )
    return Finding("key", f"from {source}, {len(key)} characters")


async def _name(endpoint: URL, timeout: float) -> Finding:
    host, port = endpoint.host or "", endpoint.port or 0
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    except (OSError, UnicodeError) as error:  # a timeout is an OSError
        problem = f"cannot resolve {host}: {_reason(error)}"
        return Finding("name", problem, "check base_url for a typo, and this machine's DNS", UNAVAILABLE)
    return Finding("name", f"{host} resolves to {', '.join(sorted({str(one[4][0]) for one in found}))}")


async def _connection(endpoint: URL, timeout: float) -> Finding:
    context = tls.create_default_context() if endpoint.scheme == "https" else None
    where = f"{endpoint.host}:{endpoint.port}"
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
    except tls.SSLCertVerificationError as error:
        problem = f"the certificate of {where} is not trusted: {error.verify_message}"
        hint = "trust its CA (SSL_CERT_FILE, or ssl= in a program); if it has expired, check the clock"
        return Finding("tls", problem, hint, UNAVAILABLE)
    except tls.SSLError as error:
        problem = f"{where} does not speak TLS: {_reason(error)}"
        return Finding("tls", problem, "check scheme and port of base_url, and any proxy in between", UNAVAILABLE)
    except OSError as error:
        problem = f"cannot connect to {where}: {_reason(error)}"
        return Finding(
            "connect", problem, "check base_url, and the firewall's rules for outgoing connections", UNAVAILABLE
        )
    secured: tls.SSLObject | None = writer.get_extra_info("ssl_object")
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    if secured is None:
        return Finding("connect", f"to {where}, without TLS")
    expires = tls.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"]))
    days = (expires - time.time()) / 86_400
    return Finding("tls", f"{secured.version()} to {where}, certificate valid for {days:.0f} days")


async def _request(key: ApiKey, endpoint: URL, timeout: float) -> list[Finding]:
    settings = TransportSettings(
        endpoint=endpoint,
        attempt_timeout=timeout,
        max_body_bytes=_MAX_BODY,
        max_connections=1,
        ssl=None,
        proxy=None,
        session=None,
    )
    transport = Transport(settings)
    started = time.time()
    try:
        reply = await transport.attempt(key)
    finally:
        await transport.close()
    if not isinstance(reply, Reply):
        return [_refused(reply)]
    result = run_to_completion(read(reply, key, now=time.time()))
    return [_answer(result), _quota(reply, key), *_clock(reply, started, time.time())]


def _answer(result: AudiencesResponse | AudiencesError) -> Finding:
    if isinstance(result, AudiencesError):
        return _refused(result)
    return Finding("request", f"HTTP 200, {len(result):,} audiences")


def _quota(reply: Reply, key: ApiKey) -> Finding:
    found = [key.redact(f"{name}: {value}") for name, value in reply.headers.items() if _QUOTA_HEADERS.fullmatch(name)]
    return Finding("quota", ", ".join(found) or "no quota headers; a limit is learned from refusals")


def _refused(error: AudiencesError) -> Finding:
    return Finding("request", error.summary, error.hint or "see the service's description", exit_code(error))


def _clock(reply: Reply, before: float, after: float) -> Iterator[Finding]:
    sent = http_date(reply.headers.get("Date", ""))
    if sent is None:
        return
    skew = max(sent - after, before - sent - 1.0, 0.0)
    if skew > _SKEW:
        problem = f"this machine's clock is {skew:,.0f} s {'behind' if sent > after else 'ahead of'} the service's"
        yield Finding("clock", problem, "synchronise this machine's clock (NTP)", FAILED)
    else:
        yield Finding("clock", "agrees with the service's")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)
