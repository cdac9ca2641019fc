"""The service on this machine, for tests, demonstrations and a first try without a key."""

from audiences_async.sandbox.accounts import EXAMPLE_AUDIENCES, many_audiences
from audiences_async.sandbox.answers import Answer, Failure, SeenRequest
from audiences_async.sandbox.server import Sandbox
from audiences_async.sandbox.stepping import SteppedTime

__all__ = ["EXAMPLE_AUDIENCES", "Answer", "Failure", "Sandbox", "SeenRequest", "SteppedTime", "many_audiences"]
