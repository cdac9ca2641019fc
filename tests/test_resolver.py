"""Host name look-ups."""

from audiences_async._http.resolver import SharedResolver


async def test_failed_addresses_come_last() -> None:
    """Try an address that has failed last, and bound the memory of failures."""
    resolver = SharedResolver()
    found = await resolver.resolve("localhost", 80)
    assert [result["port"] for result in found] == [80] * len(found)
    for number in range(200):
        resolver.failed(f"10.0.0.{number}")
    assert len(resolver._failed_at) <= 64
    await resolver.close()
