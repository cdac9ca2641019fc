"""For web apps on ASGI: end a call as soon as the app's own client has gone.

ASGI servers only notify a handler of that (https://asgi.readthedocs.io/en/latest/specs/www.html#disconnect-receive-event);
the frameworks that cancel the handler themselves, such as Quart, Django and aiohttp.web, do not need this module.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias, TypeVar

from audiences_async.errors import AudiencesError

_T = TypeVar("_T")

Receive: TypeAlias = Callable[[], Awaitable[Mapping[str, object]]]
"""An ASGI app's ``receive``, which Starlette and FastAPI call ``request.receive``."""


class DisconnectedError(AudiencesError):
    """The web app's own client has gone, so the call was cancelled; the response is not read.

    It has no ``account`` and no ``call_id``: those are on the call's `CallFinished` event.
    """

    @property
    def gateway_status(self) -> int:
        """499, as nginx logs it: no client receives this status."""
        return 499


async def until_disconnect(receive: Receive, call: Awaitable[_T]) -> _T:
    """Return the result of *call*, which is cancelled if the web app's client disconnects before.

    Args:
        receive: The request's ASGI ``receive``. What it yields is discarded, so read the request's body before.
        call: The call, such as ``client.get_audiences(timeout=3.0)``. It runs in a task of its own.

    Raises:
        DisconnectedError: The client disconnected first.
    """
    calling, leaving = asyncio.ensure_future(call), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({calling, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            leaving.result()
            raise DisconnectedError("the web app's client disconnected before the answer came")
        return calling.result()
    finally:
        calling.cancel()
        leaving.cancel()
        await asyncio.gather(calling, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
