"""``audiences demo``: three accounts against a service that throttles, fails and hangs up."""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from audiences_async.cli.output import table
from audiences_async.client import AudiencesClient
from audiences_async.clock import Clock
from audiences_async.events import Attempt, AttemptFinished, Event, EventHook
from audiences_async.models import Account, AudiencesResponse
from audiences_async.policies import RetryPolicy
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox, many_audiences

_FIRST_FAULT: Final[Mapping[str, Answer]] = {
    "north": Answer(500),
    "east": Answer(failure="reset"),
    "south": Answer(failure="cut-body"),
}
_MORE_FAULTS: Final = (Answer(502, "<html>Bad Gateway</html>"), Answer(503, b""), Answer(408))
# Waits stay below the 1 s of the sandbox's limit, so that the outcome depends on the seed alone.
_RETRY: Final = RetryPolicy(base_delay=0.2, throttle_base_delay=0.2)
_jitter: ContextVar[float] = ContextVar("_jitter")


def run(seed: int, console: Console) -> None:
    """Fetch three accounts from a misbehaving sandbox; show the audiences and the attempts."""
    with Sandbox(seed=seed) as sandbox:
        accounts = [_open(sandbox, name, _source(seed, name)) for name in _FIRST_FAULT]
        asyncio.run(_fetch_and_show(sandbox.base_url, accounts, seed, console))


async def _fetch_and_show(base_url: str, accounts: Sequence[Account], seed: int, console: Console) -> None:
    attempts: dict[str, list[Attempt]] = {account.name: [] for account in accounts}

    def remember(event: Event) -> None:
        if isinstance(event, AttemptFinished):
            attempts[event.account].append(event.attempt)

    responses = await _fetch(base_url, accounts, seed, remember)
    console.print(table(*zip(attempts, responses, strict=True)))
    console.print(_summary(attempts))
    console.print(Text(_absorbed(attempts, responses)))


def _source(seed: int, name: str) -> random.Random:
    """Return the random source of one account, so that waits do not depend on how the accounts interleave."""
    return random.Random(f"{seed}/{name}")  # noqa: S311 - a demonstration, not a secret


def _open(sandbox: Sandbox, name: str, chance: random.Random) -> Account:
    """Open an account with one or two scripted faults and a limit of one request per second."""
    audiences = [*EXAMPLE_AUDIENCES, *many_audiences(name, chance.randint(1, 3))]
    account = sandbox.add_account(name, audiences=audiences, rate=1.0, retry_after=True)
    sandbox.script(name, _FIRST_FAULT[name], *chance.sample(_MORE_FAULTS, chance.randint(0, 1)))
    return account


async def _fetch(base_url: str, accounts: Sequence[Account], seed: int, on_event: EventHook) -> list[AudiencesResponse]:
    # One jitter value per account: the number of draws would depend on how the accounts interleave.
    clock = Clock(random=_jitter.get)
    async with AudiencesClient(base_url=base_url, retry=_RETRY, on_event=on_event, clock=clock) as client:

        async def fetch(account: Account) -> AudiencesResponse:
            _jitter.set(_source(seed, account.name).random())
            return await client.get_audiences(account)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(fetch(account)) for account in accounts]
    return [task.result() for task in tasks]


def _summary(attempts: Mapping[str, Sequence[Attempt]]) -> Table:
    result = Table("account", "attempts", "waited", "absorbed")
    for column in result.columns[1:3]:
        column.justify = "right"
    for name, made in attempts.items():
        waited = sum(attempt.wait for attempt in made)
        result.add_row(Text(name), str(len(made)), f"{waited:.2f} s", Text(_counted(made)))
    return result


def _absorbed(attempts: Mapping[str, Sequence[Attempt]], responses: Sequence[AudiencesResponse]) -> str:
    total = sum(map(len, responses))
    what = _counted([attempt for made in attempts.values() for attempt in made])
    return f"{total} audiences of {len(responses)} accounts, complete; absorbed: {what}."


def _counted(attempts: Sequence[Attempt]) -> str:
    kinds = Counter(attempt.error.partition(":")[0] for attempt in attempts if attempt.error)
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
