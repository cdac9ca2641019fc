"""`until_disconnect`: a call ends with its web request, and leaves nothing behind."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from audiences_async import Account, AudiencesClient, AudiencesError
from audiences_async.sandbox import Answer, Sandbox
from audiences_async.web import DisconnectedError, Receive, until_disconnect

REQUEST = {"type": "http.request", "body": b"", "more_body": False}


def receiving(*messages: Mapping[str, object], then: Exception | None = None) -> Receive:
    """Return a ``receive`` that yields the messages and then raises, or else waits for ever."""
    left = list(messages)

    async def receive() -> Mapping[str, object]:
        await asyncio.sleep(0)
        if left:
            return left.pop(0)
        if then is not None:
            raise then
        await asyncio.Event().wait()
        raise AssertionError

    return receive


@pytest.fixture(autouse=True)
async def _no_task_is_left() -> AsyncIterator[None]:
    """Check that no task outlives the test."""
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_result_or_the_error_of_the_call() -> None:
    """Return what the call returns, and raise what it raises, if the client stays."""

    async def fail() -> None:
        raise AudiencesError("failed")

    assert await until_disconnect(receiving(REQUEST), asyncio.sleep(0.01, "answer")) == "answer"
    with pytest.raises(AudiencesError, match="failed"):
        await until_disconnect(receiving(REQUEST), fail())


async def test_a_disconnect_cancels_the_call(sandbox: Sandbox, north: Account) -> None:
    """Cancel the call, and give its connection back, before the error is raised."""
    sandbox.script("north", Answer(delay=60))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        gone = receiving(REQUEST, REQUEST, {"type": "http.disconnect"})
        with pytest.raises(DisconnectedError, match="disconnected before the answer came") as caught:
            await until_disconnect(gone, client.get_audiences(north))
        assert [pace.in_flight for pace in client.snapshot().accounts] == [0]
    assert (caught.value.gateway_status, caught.value.gateway_headers) == (499, {})


async def test_an_answer_that_came_with_the_disconnect_counts() -> None:
    """Prefer the result if both happen in one turn of the event loop."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    ready.set_result("answer")
    assert await until_disconnect(receiving({"type": "http.disconnect"}), ready) == "answer"


async def test_a_cancelled_handler_cancels_the_call() -> None:
    """End the call if the handler itself is cancelled."""
    ended: list[str] = []

    async def call() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("call")

    handler = asyncio.create_task(until_disconnect(receiving(REQUEST), call()))
    await asyncio.sleep(0.01)
    handler.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handler
    assert ended == ["call"]


async def test_a_failing_receive_is_raised() -> None:
    """Raise the server's exception, and end the call; an error of the call at its end is not logged."""

    async def call() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError

    with pytest.raises(RuntimeError, match="lost"):
        await until_disconnect(receiving(then=RuntimeError("lost")), call())
