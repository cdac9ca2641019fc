"""The service's own page as an OpenAPI document: https://api.commbox.io/ (GET /audiences).

The sandbox's tests hold the sandbox to it.
"""

import json
from importlib.resources import files
from typing import Any


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.0 document of ``GET /audiences``, a fresh copy with every call.

    Beyond the page's words, its fields are required, ids are not empty, and counts are not negative.

    Returns:
        The document as plain dicts and lists, ready for a validator or a generator.
    """
    document: dict[str, Any] = json.loads(
        files("audiences_async.sandbox").joinpath("openapi.json").read_text(encoding="utf-8")
    )
    return document
