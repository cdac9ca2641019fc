"""The service on this machine, for tests, demonstrations and a first try without a key."""

from audiences_async.sandbox.accounts import EXAMPLE_AUDIENCES, many_audiences
from audiences_async.sandbox.answers import Answer, Failure, SeenRequest
from audiences_async.sandbox.limits import (
    ConnectionLimit,
    FixedWindow,
    LeakyBucket,
    Limit,
    Meter,
    Quota,
    SlidingWindow,
    TokenBucket,
)
from audiences_async.sandbox.outages import Outage
from audiences_async.sandbox.server import Sandbox
from audiences_async.sandbox.stepping import SteppedTime

__all__ = [
    "EXAMPLE_AUDIENCES",
    "Answer",
    "ConnectionLimit",
    "Failure",
    "FixedWindow",
    "LeakyBucket",
    "Limit",
    "Meter",
    "Outage",
    "Quota",
    "Sandbox",
    "SeenRequest",
    "SlidingWindow",
    "SteppedTime",
    "TokenBucket",
    "many_audiences",
]
