"""The pytest fixtures ``audiences_sandbox`` and ``audiences_time``.

pytest imports this module in every run, so what a fixture needs is imported when the fixture is used.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from audiences_async.sandbox import Sandbox, SteppedTime


@pytest.fixture
def audiences_sandbox() -> "Iterator[Sandbox]":
    """Yield a running `Sandbox` without accounts. A sync fixture works with any async plugin and loop scope."""
    from audiences_async.sandbox import Sandbox  # noqa: PLC0415

    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def audiences_time() -> "SteppedTime":
    """Return a `SteppedTime`, whose clock makes a client wait for nothing."""
    from audiences_async.sandbox import SteppedTime  # noqa: PLC0415

    return SteppedTime()
