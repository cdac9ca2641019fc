"""The URL of another call of the API, which is below the client's own base URL."""

import re
from collections.abc import Mapping
from typing import Final, TypeAlias

from yarl import URL

from audiences_async._base.display import short
from audiences_async.errors import ConfigurationError

Params: TypeAlias = Mapping[str, str | int | float]
"""Parameters of a request, for its query."""

# Of RFC 3986's `pchar`, without the percent sign: what is escaped once may be unescaped twice on the way.
_SEGMENT: Final = re.compile(r"(?a)[\w.~!$&'()*+,;=:@-]+")


def url_below(endpoint: URL, path: str, params: Params | None) -> URL:
    """Return the URL of *path* beside the *endpoint* ``/audiences``; the key goes to no other origin.

    Raises:
        ConfigurationError: *path* is not a relative path of plain segments; or *params* are not texts and numbers.
    """
    segments = path.removeprefix("/").split("/") if isinstance(path, str) else []
    if not segments or not all(_SEGMENT.fullmatch(each) and each.partition(";")[0].strip(".") for each in segments):
        expected = "a relative path such as 'campaigns/7', without a query, escapes, empty or dot segments"
        raise ConfigurationError(f"path must be {expected}, got {short(path)}")
    url = endpoint.parent.joinpath(*segments)
    assert url.origin() == endpoint.origin()
    return url if params is None else _with_query(url, params)


def _with_query(url: URL, params: object) -> URL:
    if not isinstance(params, Mapping):
        raise ConfigurationError(f"params must be a mapping, got {type(params).__name__}")
    for name, value in params.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float) or isinstance(value, bool):
            given = f"{type(name).__name__}: {type(value).__name__}"
            raise ConfigurationError(f"params must map names to texts or numbers, got {given}")
    try:
        "".join(map(str, (*params, *params.values()))).encode()  # yarl leaves out what it cannot encode
        return url.with_query(params)
    except ValueError as error:  # infinite, or no valid Unicode
        raise ConfigurationError(f"params cannot be sent: {type(error).__name__}") from None
