"""Many processes that do not know of each other under one limit, in virtual time."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import TypeAlias
from unittest import mock

import virtual
from attrs import define, field
from virtual import FixedWindow, LeakyBucket, Service, TokenBucket, shared

from audiences_async import Account, AudiencesClient, Failed
from audiences_async._http.wire import Reply
from audiences_async.credentials import ApiKey
from audiences_async.errors import TransportError

Limit: TypeAlias = Callable[[str, float], int]

KINDS: dict[str, Callable[[float], Limit]] = {
    "leaky": lambda rate: LeakyBucket(rate, 5),
    "token": lambda rate: TokenBucket(rate, int(rate)),
    "window": lambda rate: FixedWindow(int(10 * rate), 10.0),
}
"""Limits by name: a leaky bucket with a burst of 5, a token bucket of one second, and a fixed window of ten seconds."""


@define
class Distant(Service):
    """A service whose round trips last 10 to 30 ms, at random, so that processes do not run in lockstep."""

    chance: random.Random = field(factory=lambda: random.Random(1))

    async def attempt(self, key: ApiKey, call: object = None, **_: object) -> Reply | TransportError:
        """Answer after a round trip of a random length."""
        self.round_trip = self.chance.uniform(0.01, 0.03)
        return await super().attempt(key)


@define
class Process:
    """Results of one process.

    Attributes:
        answered: When its accounts were answered, in seconds.
        failures: How many of its accounts failed, by reason.
        ended: When its job ended, in seconds.
    """

    answered: list[float] = field(factory=list)
    failures: Counter[str] = field(factory=Counter)
    ended: float = 0.0


@define
class Fleet:
    """Results of all processes.

    Attributes:
        processes: Each process.
        requests: When requests arrived at the service, in seconds.
        ideal: Seconds that the limit needs for all accounts.
    """

    processes: list[Process]
    requests: list[float]
    ideal: float

    @property
    def failures(self) -> Counter[str]:
        """Return how many accounts failed, by reason."""
        return sum((process.failures for process in self.processes), Counter())

    @property
    def took(self) -> float:
        """Return the time of the last answer, as a multiple of the ideal."""
        return max(process.answered[-1] for process in self.processes) / self.ideal

    @property
    def answers(self) -> int:
        """Return how many accounts were answered."""
        return sum(len(process.answered) for process in self.processes)

    @property
    def requests_per_answer(self) -> float:
        """Return how many requests the service got for each answer."""
        return len(self.requests) / self.answers

    @property
    def first(self) -> float:
        """Return when the first process ended, in seconds."""
        return min(process.ended for process in self.processes)

    @property
    def last(self) -> float:
        """Return when the last process ended, in seconds."""
        return max(process.ended for process in self.processes)

    def shares(self, end: float) -> list[int]:
        """Return each process's answers until *end*, in seconds."""
        return [sum(at <= end for at in process.answered) for process in self.processes]

    def fairness(self, end: float) -> float:
        """Return Jain's index of the shares at *end*: 1 if all are equal, 1 / n if one process has everything."""
        shares = self.shares(end)
        return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))

    def extremes(self, end: float) -> tuple[float, float]:
        """Return the smallest and the greatest share at *end*, as multiples of the mean."""
        shares = self.shares(end)
        return min(shares) / mean(shares), max(shares) / mean(shares)

    @property
    def longest_gap(self) -> float:
        """Return the longest time that a process ran without an answer, in seconds."""
        times = ([0.0, *process.answered] for process in self.processes)
        return max(after - before for each in times for before, after in pairwise(each))

    @property
    def used(self) -> float:
        """Return the part of the limit that was used while all processes ran, from 5 s on."""
        count = sum(5 <= at <= self.first for process in self.processes for at in process.answered)
        return count / (self.answers / self.ideal) / (self.first - 5) if self.first > 5 else float("nan")


def simulate(kind: str, *, processes: int, accounts: int, rate: float, seed: int) -> Fleet:
    """Run one job of *accounts* in each of the *processes*, all at once, under one limit of *rate* requests a second.

    Each process has a client and random numbers of its own; the service and its limit are all that they share.
    """
    service = Distant(shared(KINDS[kind](rate)), chance=random.Random(seed))
    found = [Process() for _ in range(processes)]

    async def process(number: int) -> None:
        chance = random.Random(f"{seed}-{number}")
        await asyncio.sleep(chance.random())  # no two start at the same time
        this = found[number]
        async with AudiencesClient(base_url="http://localhost/", clock=virtual.clock(chance.random)) as client:
            of = (Account(f"{number}-{account}", f"{number}-{account}") for account in range(accounts))
            async with client.stream(of) as outcomes:
                async for outcome in outcomes:
                    if isinstance(outcome, Failed):
                        this.failures[outcome.error.stop_reason] += 1
                    else:
                        this.answered.append(virtual.now())
        this.ended = virtual.now()

    async def main() -> None:
        await asyncio.gather(*(process(number) for number in range(processes)))

    with mock.patch("audiences_async._call.engine.Transport", service):
        virtual.run(main())
    return Fleet(found, service.times(), processes * accounts / rate)
