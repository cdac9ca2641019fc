"""The public interface: names, signature, types, version, and the modules that an import loads."""

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import audiences_async
from audiences_async import AudiencesClient

ROOT = Path(audiences_async.__file__).parent
NAMES = """
    AudiencesClient Account RetryPolicy RateLimit RetryBudget CachePolicy
    AudiencesResponse Audience StaticAudience DynamicAudience UnknownAudience
    Outcome Fetched Failed Attempt Event Limiter Clock ClientSnapshot AccountPace
    AudiencesError ConfigurationError ClientClosedError DeadlineExceededError
    TransportError ConnectionFailedError AttemptTimeoutError
    InvalidResponseError ResponseTooLargeError
    StatusError BadRequestError UnauthorizedError ForbiddenError NotFoundError
    TooManyRequestsError ServerError
"""


def test_the_public_names() -> None:
    """Export the promised names from the root, and no others."""
    assert set(audiences_async.__all__) == {*NAMES.split(), "__version__"}
    assert all(hasattr(audiences_async, name) for name in audiences_async.__all__)


def test_the_clients_signature() -> None:
    """Settings are keyword-only, with the promised defaults."""
    parameters = list(inspect.signature(AudiencesClient).parameters.values())
    assert (parameters[0].name, parameters[0].default) == ("api_key", None)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[1:])
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert (defaults["timeout"], defaults["attempt_timeout"], defaults["max_body_bytes"]) == (60.0, 15.0, 64 * 2**20)


def test_the_package_is_typed() -> None:
    """Ship the marker for type checkers, and the contract."""
    assert (ROOT / "py.typed").exists()
    assert (ROOT / "sandbox" / "openapi.json").exists()


def test_the_version_is_stated_once() -> None:
    """State the same version in the installed metadata and in the package."""
    assert importlib.metadata.version("audiences_async") == audiences_async.__version__


@pytest.mark.slow
@pytest.mark.parametrize("optional", ["cyclopts", "rich", "pytest", "audiences_async.sandbox"])
def test_an_import_brings_nothing_optional(optional: str) -> None:
    """Import the package without loading an extra, a test tool or a server."""
    code = f"import sys, audiences_async; sys.exit({optional!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
