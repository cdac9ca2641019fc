"""HTTP of one exchange without I/O: request headers, and the response's status, headers and body as an answer or error.

HTTP follows RFC 9110: https://www.rfc-editor.org/rfc/rfc9110.
"""

import email.utils
import ipaddress
import re
from collections.abc import Generator, Mapping
from datetime import UTC
from typing import Final, TypeAlias

from attrs import field, frozen
from multidict import CIMultiDict, CIMultiDictProxy, istr
from yarl import URL

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
from audiences_async.structuring import decode_plain, decoding, description_of, parse, response_time_of

PRODUCTION: Final = "https://api.commbox.io/"
"""The vendor's published base URL: https://api.commbox.io/."""

MAX_ERROR_BODY: Final = 64 * 1024
"""Decompressed bytes read of the body of any response other than a 200."""

Result: TypeAlias = AudiencesResponse | AudiencesError
"""Result of an attempt. Errors are values here: an exception that is never raised keeps no frames alive."""

# RFC 9110, section 10.2.3: Retry-After = HTTP-date / delay-seconds. Fractions are not in it, but occur.
_DELAY_SECONDS: Final = re.compile(r"[0-9]{1,20}(?:\.[0-9]{0,20})?")
_RATE_LIMIT: Final = r";\s*r=0\s*;\s*t=([0-9]{1,5})\s*(?:[,;]|$)"
# Looked up in every response; `istr` makes that faster.
_COMBINED: Final = istr("RateLimit")
_REMAINING_AND_RESET: Final = tuple(
    (istr(f"{prefix}-Remaining"), istr(f"{prefix}-Reset")) for prefix in ("RateLimit", "X-RateLimit")
)
_LONGEST_RESET: Final = 86_400.0  # seconds: one day
# RFC 9110, section 5.6.7: IMF-fixdate, and two obsolete forms that must be accepted. Compiled on first use, to keep
# start-up fast.
_HTTP_DATE: Final = (
    r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
    r"|[A-Z][a-z]{5,8}, [0-9]{2}-[A-Z][a-z]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
    r"|[A-Z][a-z]{2} [A-Z][a-z]{2} [ 0-9][0-9] [0-9]{2}:[0-9]{2}:[0-9]{2} [0-9]{4}"
)


@frozen(eq=False)
class Reply:
    """A complete HTTP response.

    Attributes:
        status: The HTTP status.
        headers: Names are case-insensitive.
        body: Decompressed; at most the first 64 KiB unless the status is 200.
        exceeded: The limit in bytes that the body of a 200 exceeded; ``None`` if the body is complete.
    """

    status: int
    headers: CIMultiDictProxy[str] = field(repr=False)  # headers and body may echo the key
    body: bytes = field(repr=False)
    exceeded: int | None = None


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


FIXED_HEADERS: Final[Mapping[str, str]] = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "User-Agent": f"audiences_async/{__version__}",
}
"""Headers of every request, besides `authorization`."""


def authorization(key: ApiKey) -> str:
    """Return the value of the ``Authorization`` header; only here is the key written out."""
    return f"Bearer {key.reveal()}"


def read_plain(reply: Reply) -> AudiencesResponse | None:
    """Return the audiences of a plain 200; ``None`` if `read` must decide."""
    return decode_plain(reply.body) if reply.status == 200 and reply.exceeded is None else None


def read(reply: Reply, key: ApiKey, *, now: float) -> Generator[None, None, Result]:
    """Return the audiences of a response, or the error it stands for, without the key. Stepwise, like `decoding`.

    Args:
        reply: The response.
        key: The key that was sent; masked if the service echoes it.
        now: Seconds since 1970, for a ``Retry-After`` date in a response without a ``Date``.
    """
    if reply.status >= 300:
        return _refusal(reply, key, now)
    if reply.status != 200:
        message = f"HTTP {reply.status} where 200 is documented"
        return InvalidResponseError(message, body=key.redact_start(reply.body, MAX_ERROR_BODY))
    if reply.exceeded is not None:
        body = key.redact_start(reply.body, MAX_ERROR_BODY)
        return ResponseTooLargeError(f"the body exceeds max_body_bytes={reply.exceeded}", body=body)
    try:
        return (yield from decoding(reply.body))
    except StatusError as error:
        return _refusal(reply, key, now, status=error.status)
    except InvalidResponseError as error:
        problems = tuple(key.redact(problem) for problem in error.problems)
        return InvalidResponseError(error.message, problems=problems, body=key.redact_start(reply.body, MAX_ERROR_BODY))


def _refusal(reply: Reply, key: ApiKey, now: float, *, status: int | None = None) -> StatusError:
    envelope = _envelope(reply.body)
    return status_error(
        reply.status if status is None else status,
        key.redact(description_of(envelope)),
        response_time=response_time_of(envelope),
        headers=CIMultiDict((key.redact(name), key.redact(value)) for name, value in reply.headers.items()),
        body=key.redact_start(reply.body, MAX_ERROR_BODY),
        retry_after=_wait_asked(reply, now),
    )


def _wait_asked(reply: Reply, now: float) -> float | None:
    wait = retry_after(reply.headers, now=now)
    return used_up(reply.headers, now=now) if wait is None and reply.status == 429 else wait


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
    if _DELAY_SECONDS.fullmatch(value):
        return float(value)
    until = http_date(value)
    if until is None:
        return None
    sent = http_date(headers.get("Date", "").strip(" \t"))
    return max(0.0, until - (now if sent is None else sent))


def used_up(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds until the next request is granted; ``None`` if the quota is not exhausted, or unknown.

    Recognised are ``RateLimit: "name";r=0;t=30``, and ``RateLimit-Remaining`` with ``RateLimit-Reset``, with and
    without ``X-``. A reset is in seconds from now or, if it is too large for that, in seconds since 1970
    (https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/).
    """
    combined = headers.get(_COMBINED)
    if combined is not None:
        found = re.search(_RATE_LIMIT, combined)
        return None if found is None else float(found[1])
    for remaining, reset in _REMAINING_AND_RESET:
        if headers.get(remaining, "").strip() == "0":
            return _reset(headers, reset, now)
    return None


def _reset(headers: Mapping[str, str], name: str, now: float) -> float | None:
    value = headers.get(name, "").strip()
    if not _DELAY_SECONDS.fullmatch(value):
        return None
    reset = float(value)
    if reset <= _LONGEST_RESET:
        return reset
    sent = http_date(headers.get("Date", "").strip(" \t"))
    from_now = reset - (now if sent is None else sent)
    return from_now if 0 <= from_now <= _LONGEST_RESET else None


def http_date(value: str) -> float | None:
    """Return the seconds since 1970 of an HTTP date; ``None`` if *value* is not one."""
    if not re.fullmatch(_HTTP_DATE, value):
        return None
    try:
        # asctime, one of the three forms, names no zone; all are in UTC.
        return email.utils.parsedate_to_datetime(value).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
