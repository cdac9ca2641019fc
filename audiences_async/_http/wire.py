"""HTTP of one exchange without I/O: request headers, and the response's status, headers and body as an answer or error.

HTTP follows RFC 9110: https://www.rfc-editor.org/rfc/rfc9110.
"""

import ipaddress
import os
import re
from collections.abc import Generator, Mapping
from typing import Any, Final, TypeAlias

from attrs import evolve, field, frozen
from multidict import CIMultiDictProxy
from yarl import URL

from audiences_async._base.dates import delay_seconds, http_date, sent_at
from audiences_async._base.display import short
from audiences_async._fast_path import decode_plain
from audiences_async._http.headers import ReplyHeaders, redacted, request_id
from audiences_async._http.quota import announced
from audiences_async._version import __version__
from audiences_async.credentials import ApiKey, Secret
from audiences_async.errors import (
    AudiencesError,
    ConfigurationError,
    InvalidResponseError,
    ResponseTooLargeError,
    StatusError,
    status_error,
)
from audiences_async.models import AudiencesResponse
from audiences_async.structuring import data_of, decode_in_steps, parse, response_time_of

PRODUCTION: Final = "https://api.commbox.io/"
"""The vendor's published base URL: https://api.commbox.io/."""

BASE_URL_VARIABLE: Final = "AUDIENCES_BASE_URL"
"""Environment variable for another one."""

# The service's own, RFC 9457's (https://www.rfc-editor.org/rfc/rfc9457#section-3.1), and what gateways send.
_DESCRIPTIONS: Final = ("description", "detail", "title", "message", "error")

_USED: Final = frozenset({
    "accept", "accept-encoding", "authorization", "connection", "content-length", "cookie", "expect", "host",
    "proxy-authorization", "trailer", "transfer-encoding", "upgrade", "user-agent",
})  # fmt: skip

MAX_ERROR_BODY: Final = 64 * 1024
"""Decompressed bytes read of the body of any response other than a 200."""


@frozen
class JsonAnswer:
    """The answer to another call of the API.

    Attributes:
        status: The HTTP status.
        data: The envelope's ``data``, as plain data.
    """

    status: int
    data: Any


Answer: TypeAlias = AudiencesResponse | JsonAnswer
Result: TypeAlias = Answer | AudiencesError
"""Result of an attempt. Errors are values here: an exception that is never raised keeps no frames alive."""


@frozen(eq=False)
class Reply:
    """A complete HTTP response.

    Attributes:
        status: The HTTP status.
        headers: Names are case-insensitive.
        body: Decompressed; at most the first 64 KiB unless the status is 200.
        exceeded: The limit in bytes that the body of a 200 exceeded; ``None`` if the body is complete.
        is_json: Whether it answers another call of the API, whose data is returned as it is.
    """

    status: int
    headers: CIMultiDictProxy[str] = field(repr=False)  # headers and body may echo the key
    body: bytes = field(repr=False)
    exceeded: int | None = None
    is_json: bool = False


def base_url_or_default(base_url: str | None) -> str:
    """Return *base_url*; without one, ``AUDIENCES_BASE_URL``, else production."""
    return base_url if base_url is not None else os.environ.get(BASE_URL_VARIABLE) or PRODUCTION


def endpoint(base_url: Secret, *, allow_http: bool) -> URL:
    """Return the URL of ``/audiences`` below *base_url*, which is kept secret because it may contain a password.

    Raises:
        ConfigurationError: *base_url* is not an absolute http(s) URL; has credentials, a query or a fragment; or is
            plain ``http://`` to a host other than loopback, unless *allow_http*.
    """
    url = _url("base_url", base_url)
    if url.raw_user is not None or url.raw_password is not None:
        del url
        raise ConfigurationError("base_url must not contain credentials; pass the API key as api_key")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigurationError(f"base_url must be an absolute https:// URL, got '{url}'")
    if url.raw_query_string or url.raw_fragment:
        raise ConfigurationError(f"base_url must have no query and no fragment, got '{url}'")
    if url.scheme == "http" and not allow_http and not _is_loopback(url.host):
        raise ConfigurationError(
            f"base_url '{url}' would send the API key unencrypted; use https://, or set allow_http=True to accept this"
        )
    return url / "audiences"


def proxy_url(proxy: Secret) -> URL:
    """Return the URL of an HTTP proxy. It may contain a password, so no message repeats it.

    Raises:
        ConfigurationError: *proxy* is not an absolute http(s) URL.
    """
    url = _url("proxy", proxy)
    if url.scheme not in {"http", "https"} or not url.host:
        del url
        raise ConfigurationError("proxy must be an absolute http:// or https:// URL")
    return url


def _url(name: str, secret: Secret) -> URL:
    url = _parsed(secret)
    if url is None:
        raise ConfigurationError(f"{name} is not a URL")
    return url


def _parsed(secret: Secret) -> URL | None:
    try:
        url = URL(secret.reveal())
        # Reading the host decodes it.
        unsound = url.host is not None and any(c.isspace() or not c.isprintable() for c in secret.reveal())
    except (TypeError, ValueError):
        return None
    return None if unsound else url


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # Python before 3.13 does not recognise an IPv4-mapped loopback address.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def fixed_headers(app_info: str | None = None) -> dict[str, str]:
    """Return the headers of every request, besides `authorization`.

    Args:
        app_info: What follows in the ``User-Agent``, such as ``my-app/1.2``; ``None`` means nothing.

    Raises:
        ConfigurationError: *app_info* is not one line of visible ASCII text.
    """
    if app_info is not None and not (isinstance(app_info, str) and re.fullmatch(r"[!-~]+( [!-~]+)*", app_info)):
        raise ConfigurationError(f"app_info must be visible ASCII text such as 'my-app/1.2', got {short(app_info)}")
    agent = f"audiences_async/{__version__}"
    return {
        "Accept": "application/json",
        "Accept-Encoding": "gzip, deflate",
        "User-Agent": agent if app_info is None else f"{agent} {app_info}",
    }


def header_name(name: str | None) -> str | None:
    """Return the *name* of a header for an identifier; ``None`` if there is none.

    Raises:
        ConfigurationError: *name* is not the name of a header (RFC 9110, section 5.6.2), or one that is already used.
    """
    if name is None:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ConfigurationError(f"request_id_header must be the name of a header, got {short(name)}")
    if name.lower() in _USED:
        raise ConfigurationError(f"request_id_header must not be {name}, which has a meaning in HTTP")
    return name


def authorization(key: ApiKey) -> str:
    """Return the value of the ``Authorization`` header; only here is the key written out."""
    return f"Bearer {key.reveal()}"


def read_plain(reply: Reply, key: ApiKey) -> AudiencesResponse | None:
    """Return the audiences of a plain 200; ``None`` if `read_any` must decide."""
    if reply.status != 200 or reply.exceeded is not None or reply.is_json:
        return None
    return decode_plain(reply.body, ReplyHeaders(reply.headers, key))


def read_any(reply: Reply, key: ApiKey, *, now: float) -> Generator[None, None, Result]:
    """Return the audiences, or the data of another call; or an error. See `read`."""
    if not reply.is_json:
        return (yield from read(reply, key, now=now))
    try:
        return _unreadable(reply, key, now) or JsonAnswer(reply.status, data_of(reply.body))
    except (StatusError, InvalidResponseError) as error:
        return _without_key(error, reply, key, now)


def read(reply: Reply, key: ApiKey, *, now: float) -> Generator[None, None, AudiencesResponse | AudiencesError]:
    """Return the audiences of a response, or its error, without the key; yield as `decode_in_steps` does.

    Args:
        reply: The response.
        key: The key that was sent; masked if the service echoes it.
        now: Seconds since 1970, for a ``Retry-After`` date in a response without a ``Date``.
    """
    if (unreadable := _unreadable(reply, key, now)) is not None:
        return unreadable
    try:
        response = yield from decode_in_steps(reply.body)
    except (StatusError, InvalidResponseError) as error:
        return _without_key(error, reply, key, now)
    return evolve(response, headers=ReplyHeaders(reply.headers, key))


def _unreadable(reply: Reply, key: ApiKey, now: float) -> AudiencesError | None:
    """Return the error of a response whose body need not be read as JSON; ``None`` for any other one."""
    if reply.status >= 300:
        return _refusal(reply, key, now)
    if reply.status != 200:
        return _invalid(f"HTTP {reply.status} where 200 is documented", reply, key)
    if reply.exceeded is not None:
        return _invalid(f"the body exceeds max_body_bytes={reply.exceeded}", reply, key, kind=ResponseTooLargeError)
    return None


def _without_key(error: StatusError | InvalidResponseError, reply: Reply, key: ApiKey, now: float) -> AudiencesError:
    """Return the error that stands for what a body could not be read as."""
    if isinstance(error, StatusError):
        return _refusal(reply, key, now, status=error.status)
    return _invalid(error.message, reply, key, problems=tuple(key.redact(problem) for problem in error.problems))


def _invalid(
    message: str,
    reply: Reply,
    key: ApiKey,
    *,
    problems: tuple[str, ...] = (),
    kind: type[InvalidResponseError] = InvalidResponseError,
) -> InvalidResponseError:
    # A long body would have to be parsed in one step to find its trace id.
    envelope = _envelope(reply.body) if len(reply.body) <= MAX_ERROR_BODY else {}
    body = key.redact_start(reply.body, MAX_ERROR_BODY)
    return kind(message, problems=problems, body=body, request_id=request_id(reply.headers, envelope, key))


def _refusal(reply: Reply, key: ApiKey, now: float, *, status: int | None = None) -> StatusError:
    envelope = _envelope(reply.body)
    return status_error(
        reply.status if status is None else status,
        key.redact(_described(envelope)),
        response_time=response_time_of(envelope),
        headers=redacted(reply.headers, key),
        body=key.redact_start(reply.body, MAX_ERROR_BODY),
        retry_after=_wait_asked(reply, now),
        request_id=request_id(reply.headers, envelope, key),
    )


def _described(envelope: Mapping[str, object]) -> str:
    """Return the description of an error: the service's own, or that of a proxy or a framework in front of it."""
    texts = (envelope.get(name) for name in _DESCRIPTIONS)
    return next((text for text in texts if isinstance(text, str) and text), "")


def _wait_asked(reply: Reply, now: float) -> float | None:
    wait = retry_after(reply.headers, now=now)
    if wait is not None or reply.status != 429:
        return wait
    quota = announced(reply.headers, now=now)
    return quota.reset if quota is not None and quota.remaining == 0 else None


def _envelope(body: bytes) -> Mapping[str, object]:
    """Return the readable part of an error's envelope; proxies send HTML or an empty body."""
    try:
        envelope = parse(body)
    except InvalidResponseError:
        return {}
    return envelope if isinstance(envelope, dict) else {}


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds to wait from now, by ``Retry-After``; ``None`` if it is absent or malformed.

    Args:
        headers: The response headers. A date is relative to the response's own ``Date``, so that an error of the local
            clock does not matter.
        now: Seconds since 1970, for a response without a readable ``Date``.
    """
    value = headers.get("Retry-After", "").strip(" \t")
    delay = delay_seconds(value)
    if delay is not None:
        return delay
    until = http_date(value)
    return None if until is None else max(0.0, until - sent_at(headers, now=now))
