"""Programming errors inside an exchange, such as a mock's or a middleware's: they are raised, and not retried."""

from types import TracebackType
from typing import Final

from audiences_async.credentials import ApiKey

_KINDS: Final = (AssertionError, AttributeError, ImportError, NameError, NotImplementedError, TypeError)
_NETWORK: Final = frozenset({"aiohappyeyeballs", "aiohttp", "asyncio", "multidict", "socket", "ssl", "yarl"})


def is_mistake(error: Exception) -> bool:
    """Return whether *error* is a programming error, but none that aiohttp meets when a connection is lost."""
    if not isinstance(error, _KINDS) or error.__traceback__ is None:
        return False
    module = str(_innermost(error.__traceback__).tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] not in _NETWORK


def without_frames(error: Exception, key: ApiKey) -> Exception:
    """Return *error* with a note of where it was raised instead of its frames, whose locals hold the key."""
    assert error.__traceback__ is not None
    at = _innermost(error.__traceback__)
    error.args = tuple(key.redact(each) if isinstance(each, str) else each for each in error.args)
    error.__context__ = None
    error.add_note(f"raised in {at.tb_frame.f_code.co_filename}:{at.tb_lineno}; not retried")
    return error.with_traceback(None)


def _innermost(traceback: TracebackType) -> TracebackType:
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback
