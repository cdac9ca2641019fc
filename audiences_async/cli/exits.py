"""Exit codes of the command line."""

from typing import Final

from audiences_async.errors import (
    AudiencesError,
    ConfigurationError,
    DeadlineExceededError,
    ForbiddenError,
    ServerError,
    StatusError,
    TooManyRequestsError,
    TransportError,
    UnauthorizedError,
)

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
AUTHENTICATION: Final = 4
UNAVAILABLE: Final = 5
PARTIAL: Final = 7
SIGNALLED: Final = 128
"""Added to the signal number, as a shell does: 130 for Ctrl-C, 143 for SIGTERM."""


def exit_code(error: AudiencesError) -> int:
    """Return the exit code of *error*: 2 usage, 4 authentication, 5 try again later, 1 anything else."""
    match error:
        case UnauthorizedError() | ForbiddenError():
            return AUTHENTICATION
        case (
            StatusError(status=408)
            | TooManyRequestsError()
            | ServerError()
            | TransportError()
            | DeadlineExceededError()
        ):
            return UNAVAILABLE
        case ConfigurationError():
            return USAGE
        case _:
            return FAILED
