"""Report a job on stderr, as text for people or as JSON for programs, and show the client's log."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec
from attrs import frozen

from audiences_async import events
from audiences_async._http.wire import BASE_URL_VARIABLE, PRODUCTION
from audiences_async.cli.output import notices, notify
from audiences_async.errors import ConfigurationError

LogFormat: TypeAlias = Literal["text", "json"]

_VARIABLE: Final = "AUDIENCES_LOG"
_LEVELS: Final = ("info", "debug")
# Events that explain why a job is slow; the others come with every request.
_NOTABLE: Final = (
    events.AccountPaused,
    events.RateLearned,
    events.ServicePaused,
    events.ServiceResumed,
    events.ServiceRateLearned,
    events.ServiceConcurrencyLearned,
)


@frozen
class Log:
    """Writes one line for each report.

    Attributes:
        format: ``"text"``, or ``"json"`` for one JSON object per line.
    """

    format: LogFormat = "text"

    def write(self, event: str, text: str, **fields: Any) -> None:
        """Write a report.

        Args:
            event: Its kind, for programs.
            text: The report for people.
            fields: The report for programs.
        """
        if self.format == "text":
            notify(text)
        else:
            notify(msgspec.json.encode({"time": datetime.now(UTC), "event": event, **fields}).decode())


def notify_production(base_url: str | None, log: Log = Log()) -> None:
    """Report that requests go to production, if neither *base_url* nor the environment names another URL."""
    if base_url is None and not os.environ.get(BASE_URL_VARIABLE):
        notice = f"requests go to production, {PRODUCTION}: neither --base-url nor {BASE_URL_VARIABLE} is set"
        log.write("notice", notice, message=notice)


def is_verbose() -> bool:
    """Return whether the environment asks for the client's log."""
    return bool(os.environ.get(_VARIABLE))


@contextmanager
def client_log() -> Iterator[None]:
    """Write the client's log to stderr inside the block, if ``AUDIENCES_LOG`` is ``info`` or ``debug``.

    Raises:
        ConfigurationError: The variable has another value.
    """
    level = os.environ.get(_VARIABLE, "").lower()
    if not level:
        yield
        return
    if level not in _LEVELS:
        raise ConfigurationError(f"{_VARIABLE} must be one of {', '.join(_LEVELS)}")
    logger = logging.getLogger("audiences_async")
    handler = logging.StreamHandler(notices())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: level == "debug" or _is_notable(record))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)  # events are logged at this level
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _is_notable(record: logging.LogRecord) -> bool:
    """Return whether ``info`` includes the record: anything but an event at DEBUG, and the notable ones of these."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    failed = any(isinstance(each, events.CallFinished) and each.error is not None for each in arguments)
    return record.levelno >= logging.INFO or failed or any(isinstance(each, _NOTABLE) for each in arguments)
