"""Points in time and delays as HTTP and ISO 8601 write them, without I/O."""

import email.utils
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

# RFC 9110, section 10.2.3: delay-seconds is a whole number. Servers send fractions too.
_DELAY_SECONDS: Final = re.compile(r"[0-9]{1,20}(?:\.[0-9]{0,20})?")
# RFC 9110, section 5.6.7: IMF-fixdate, and the two obsolete forms that must still be read.
# Compiled when there is one to read: no program's start pays for it.
_HTTP_DATE: Final = (
    r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
    r"|[A-Z][a-z]{5,8}, [0-9]{2}-[A-Z][a-z]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
    r"|[A-Z][a-z]{2} [A-Z][a-z]{2} [ 0-9][0-9] [0-9]{2}:[0-9]{2}:[0-9]{2} [0-9]{4}"
)
# Date and time, in ISO 8601's extended format. `fromisoformat` alone also reads dates without a time, weeks, hour 24
# and offsets of 60 minutes, and what it reads changes from one Python to the next.
_HOUR_AND_MINUTE: Final = r"(?:[01]\d|2[0-3]){}[0-5]\d"
_DATE_AND_TIME: Final = (
    rf"(?a)\d{{4}}-\d\d-\d\d[T ]{_HOUR_AND_MINUTE.format(':')}(?::[0-5]\d(?:\.\d+)?)?"
    rf"(?:Z|[+-]{_HOUR_AND_MINUTE.format(':?')})?"
)


def delay_seconds(text: str) -> float | None:
    """Return a number of seconds from 0 up; ``None`` if *text* is not one."""
    return float(text) if _DELAY_SECONDS.fullmatch(text) else None


def http_date(text: str) -> float | None:
    """Return an HTTP date in seconds since 1970; ``None`` if *text* is not one."""
    if not re.fullmatch(_HTTP_DATE, text):
        return None
    try:
        # Of the three forms only asctime's names no zone; all of them are in UTC.
        return email.utils.parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def sent_at(headers: Mapping[str, str], *, now: float) -> float:
    """Return when a reply was sent, in seconds since 1970: by its own ``Date``, so that our clock may be wrong.

    Args:
        headers: The reply's headers.
        now: Seconds since 1970, for a reply without a readable ``Date``.
    """
    sent = http_date(headers.get("Date", "").strip(" \t"))
    return now if sent is None else sent


def date_and_time(text: str) -> datetime:
    """Return an ISO 8601 date and time in UTC; one without a zone is in UTC, digits beyond microseconds are cut off.

    Raises:
        ValueError: *text* is not one.
        OverflowError: It is beyond the years 1 to 9999 in UTC.
    """
    if not re.fullmatch(_DATE_AND_TIME, text):
        raise ValueError
    return in_utc(datetime.fromisoformat(text))


def in_utc(time: datetime) -> datetime:
    """Return *time* in UTC, which it is in if it has no zone."""
    if time.tzinfo is UTC:
        return time
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def iso_with_z(time: datetime) -> str:
    """Return a time in UTC and in ISO 8601, with ``Z``."""
    return in_utc(time).isoformat().replace("+00:00", "Z")
