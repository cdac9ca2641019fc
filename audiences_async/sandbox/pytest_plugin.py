"""The fixtures ``audiences_sandbox`` and ``audiences_time``, for the tests of those who use this package."""

from collections.abc import Iterator

import pytest

from audiences_async.sandbox.server import Sandbox
from audiences_async.sandbox.stepping import SteppedTime


@pytest.fixture
def audiences_sandbox() -> Iterator[Sandbox]:
    """A running `Sandbox` without accounts; a sync fixture, so it works with any async plugin and any loop scope."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def audiences_time() -> SteppedTime:
    """A `SteppedTime`: a client with its clock waits for nothing."""
    return SteppedTime()
