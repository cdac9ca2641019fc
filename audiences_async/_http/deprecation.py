"""What a reply announces about the end of the service: ``Deprecation`` (RFC 9745) and ``Sunset`` (RFC 8594)."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from attrs import frozen

from audiences_async._base.dates import http_date
from audiences_async.credentials import ApiKey

_SECONDS: Final = r"@(-?[0-9]{1,12})"  # a date of RFC 9651, section 3.3.7
_LINK: Final = r"<([^<>]{1,500})>[^<>]*;\s*rel=\"?(?:deprecation|sunset)\b"


@frozen
class Notice:
    """An announcement; see `ServiceDeprecated` for each attribute."""

    deprecation: datetime | None
    sunset: datetime | None
    link: str | None


class Notices:
    """The announcements to one client, of which the first is reported."""

    def __init__(self) -> None:
        self._was_reported = False

    def first_in(self, headers: Mapping[str, str], key: ApiKey) -> Notice | None:
        """Return what a reply announces, without the key; ``None`` if it does not, or if one was returned before."""
        if self._was_reported or ("Deprecation" not in headers and "Sunset" not in headers):
            return None
        self._was_reported = True
        seconds = re.fullmatch(_SECONDS, headers.get("Deprecation", "").strip())
        link = re.search(_LINK, headers.get("Link", ""))
        return Notice(
            deprecation=None if seconds is None else _time(float(seconds[1])),
            sunset=_time(http_date(headers.get("Sunset", "").strip())),
            link=None if link is None else key.redact(link[1]),
        )


def _time(seconds: float | None) -> datetime | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError):
        return None
