"""The end of the service, as replies announce it: one event for each client."""

from datetime import UTC, datetime

import pytest

from audiences_async import Account, AudiencesClient, Event, RetryPolicy
from audiences_async.events import ServiceDeprecated
from audiences_async.sandbox import Answer, Sandbox

SINCE = datetime(2023, 6, 30, 23, 59, 59, tzinfo=UTC)
UNTIL = datetime(2024, 12, 31, 23, 59, 59, tzinfo=UTC)
BODY = {"status": "200", "data": []}


async def announced(sandbox: Sandbox, account: Account, *replies: Answer) -> list[ServiceDeprecated]:
    """Return the events of calls that get these replies, from a client and a variant of it."""
    events: list[Event] = []
    sandbox.script(account.name, *replies)
    policy = RetryPolicy(base_delay=0)
    async with AudiencesClient(base_url=sandbox.base_url, on_event=events.append, retry=policy) as client:
        await client.get_audiences(account)
        await client.with_options(retry=RetryPolicy()).get_audiences(account)
    return [event for event in events if isinstance(event, ServiceDeprecated)]


async def test_it_is_reported_once(sandbox: Sandbox, north: Account) -> None:
    """Report the first announcement with its times and its link, whatever the reply's status."""
    link = '<https://api.example/next>; rel="next", <https://api.example/end>; rel="deprecation"; type="text/html"'
    headers = {"Deprecation": "@1688169599", "Sunset": "Tue, 31 Dec 2024 23:59:59 GMT", "Link": link}
    (event,) = await announced(sandbox, north, Answer(500, headers=headers), Answer(200, BODY, headers=headers))
    assert event == ServiceDeprecated("north", SINCE, UNTIL, "https://api.example/end")
    assert event.call_id is not None


@pytest.mark.parametrize(
    ("headers", "times"),
    [
        ({"sunset": "Tue, 31 Dec 2024 23:59:59 GMT"}, (None, UNTIL)),
        ({"Deprecation": "true"}, (None, None)),
        ({"Deprecation": "@999999999999"}, (None, None)),
        ({"Deprecation": "@1688169599", "Sunset": "soon", "Link": "<x>; rel=next"}, (SINCE, None)),
    ],
)
async def test_what_is_unreadable_has_no_time(
    sandbox: Sandbox, north: Account, headers: dict[str, str], times: tuple[datetime | None, datetime | None]
) -> None:
    """Report an announcement without a time if that is missing or odd."""
    (event,) = await announced(sandbox, north, Answer(200, BODY, headers=headers))
    assert (event.deprecation, event.sunset, event.link) == (*times, None)


async def test_a_link_never_has_the_key(sandbox: Sandbox) -> None:
    """Mask the key that a service echoes in a link."""
    account = sandbox.add_account("north", api_key="key-of-north-4711")
    headers = {"Deprecation": "@1", "Link": "</end?for=key-of-north-4711>; rel=sunset"}
    (event,) = await announced(sandbox, account, Answer(200, BODY, headers=headers))
    assert event.link == "/end?for=***"


async def test_nothing_is_announced(sandbox: Sandbox, north: Account) -> None:
    """Report nothing without an announcement."""
    assert await announced(sandbox, north) == []
