"""Microseconds of CPU to decode a record, ours beside pydantic, msgspec, cattrs and orjson.

Run ``python benchmarks/decode.py [rounds] [--json FILE]``; it needs ``pip install --group bench``.
"""

import gc
import time
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
import orjson
from attrs import define
from cattrs import Converter
from cattrs.strategies import configure_tagged_union
from common import arguments, body, check, report, save
from pydantic import BaseModel, Field, TypeAdapter

from audiences_async import structuring

BASELINE = "pydantic, discriminated union"
MSGSPEC = "msgspec, tagged structs"
PEERS = ("orjson", "pydantic")


class PydanticStatic(BaseModel):
    type: Literal["Static"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    created_time: datetime
    user_count: Annotated[int, Field(ge=0)]


class PydanticDynamic(BaseModel):
    type: Literal["Dynamic"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    created_time: datetime


class PydanticEnvelope(BaseModel):
    status: int
    description: str
    response_time: datetime
    data: list[Annotated[PydanticStatic | PydanticDynamic, Field(discriminator="type")]]


class MsgspecStatic(msgspec.Struct, frozen=True, tag_field="type", tag="Static"):
    id: Annotated[str, msgspec.Meta(min_length=1)]
    name: str
    created_time: datetime
    user_count: Annotated[int, msgspec.Meta(ge=0)]


class MsgspecDynamic(msgspec.Struct, frozen=True, tag_field="type", tag="Dynamic"):
    id: Annotated[str, msgspec.Meta(min_length=1)]
    name: str
    created_time: datetime


class MsgspecEnvelope(msgspec.Struct, frozen=True):
    status: str
    description: str
    response_time: datetime
    data: list[MsgspecStatic | MsgspecDynamic]


@define
class Static:
    id: str
    name: str
    created_time: datetime
    user_count: int


@define
class Dynamic:
    id: str
    name: str
    created_time: datetime


@define
class Envelope:
    status: int
    description: str
    response_time: datetime
    data: list[Static | Dynamic]


def _cattrs() -> Converter:
    converter = Converter(detailed_validation=False)
    converter.register_structure_hook(datetime, lambda value, _: datetime.fromisoformat(value))
    configure_tagged_union(Static | Dynamic, converter, tag_generator=lambda cls: cls.__name__, tag_name="type")
    converter.get_structure_hook(Envelope)
    return converter


_CATTRS = _cattrs()
with_pydantic: Callable[[bytes], PydanticEnvelope] = TypeAdapter(PydanticEnvelope).validate_json
with_msgspec: Callable[[bytes], MsgspecEnvelope] = msgspec.json.Decoder(MsgspecEnvelope).decode


def with_cattrs(reply: bytes) -> Envelope:
    return _CATTRS.structure(orjson.loads(reply), Envelope)


CASES: dict[str, Callable[[bytes], Any]] = {
    BASELINE: with_pydantic,
    MSGSPEC: with_msgspec,
    "cattrs, tagged union after orjson": with_cattrs,
    "orjson alone": orjson.loads,
    "audiences_async": structuring.decode,
}


def spot_check(decoded: Any, count: int) -> None:
    got = decoded["data"] if isinstance(decoded, dict) else decoded.data
    assert len(got) == count
    last = got[-1]
    assert (last["id"] if isinstance(last, dict) else last.id) == f"bench-{count - 1}"


def timed(decode: Callable[[bytes], Any], reply: bytes, count: int, batches: int, batch: int) -> float:
    """Seconds of CPU for a record; every result is checked outside the time, and one of them whole."""
    took = 0.0
    results: list[Any] = []
    gc.collect()
    for _ in range(batches):
        results.clear()
        started = time.process_time()
        for _ in range(batch):
            results.append(decode(reply))  # noqa: PERF401 - the plain loop is what is measured
        took += time.process_time() - started
        for result in results:
            spot_check(result, count)
    check(results[-1], reply)
    return took / (batches * batch * count)


def measure(count: int, rounds: int, batches: int, batch: int) -> dict[str, list[float]]:
    reply = body(count)
    figures: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, decode in CASES.items():
            took = timed(decode, reply, count, batches, batch)
            if number:  # the first round warms up
                figures[name].append(took)
    return figures


def main() -> None:
    options = arguments(9)
    records = []
    for count, batches, batch in ((20, 40, 50), (1_000, 40, 1), (100_000, 1, 1)):
        figures = measure(count, options.rounds, batches, batch)
        title = f"CPU per record, {count:,} records"
        records += report(title, BASELINE, figures, "us", 1e6, also=(MSGSPEC,), peers=PEERS)
    save(options.json, records, *PEERS)


if __name__ == "__main__":
    main()
