"""OpenTelemetry: one span per call with its attempts, and metrics, beside an HTTP instrumentation."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import frozen
from opentelemetry import trace
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from audiences_async import Account, AudiencesClient, CachePolicy, NotFoundError, RateLimit, RetryPolicy, ServerError
from audiences_async.sandbox import Answer, Sandbox, SteppedTime
from audiences_async.telemetry import OpenTelemetry, request_hook

AT_ONCE = RetryPolicy(base_delay=0, throttle_base_delay=0)


@frozen
class Told:
    """Providers that record spans and metrics."""

    spans: InMemorySpanExporter
    reader: InMemoryMetricReader
    tracers: TracerProvider
    hook: OpenTelemetry

    def calls(self, name: str = "get_audiences") -> list[ReadableSpan]:
        """Return the spans of calls."""
        return [span for span in self.spans.get_finished_spans() if span.name == name]

    def metrics(self) -> dict[str, list[Any]]:
        """Return the data points of each metric."""
        data = self.reader.get_metrics_data()
        assert data is not None
        found = [metric for one in data.resource_metrics for scope in one.scope_metrics for metric in scope.metrics]
        return {metric.name: list(metric.data.data_points) for metric in found}


@pytest.fixture
def told() -> Iterator[Told]:
    """Collect spans and metrics in memory."""
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    yield Told(spans, reader, tracers, OpenTelemetry(tracer_provider=tracers, meter_provider=meters))
    tracers.shutdown()
    meters.shutdown()


async def test_one_span_for_a_call(sandbox: Sandbox, north: Account, told: Told) -> None:
    """A call is one INTERNAL span below the caller's, with its attempts as events, and never the key."""
    sandbox.script("north", Answer(500), Answer(failure="reset"))
    async with AudiencesClient(base_url=sandbox.base_url, on_event=told.hook, retry=AT_ONCE) as client:
        with told.tracers.get_tracer("app").start_as_current_span("handler") as handler:
            await client.get_audiences(north)
            assert trace.get_current_span() is handler
    (span,) = told.calls()
    assert (span.kind, span.status.status_code) == (SpanKind.INTERNAL, StatusCode.UNSET)
    assert span.parent is not None
    assert span.parent.span_id == handler.get_span_context().span_id
    attributes = dict(span.attributes or {})
    assert len(str(attributes.pop("audiences.call.id"))) == 36
    assert attributes == {"audiences.account.name": "north", "audiences.call.attempts": 3}
    attempts = [dict(event.attributes or {}) for event in span.events]
    assert [event.name for event in span.events] == ["attempt"] * 3
    assert [attempt.get("http.response.status_code") for attempt in attempts] == [500, None, 200]
    assert [attempt["http.request.resend_count"] for attempt in attempts] == [0, 1, 2]
    assert [attempt["audiences.attempt.reason"] for attempt in attempts] == ["backoff", "stale-connection", "success"]
    assert str(north.api_key) not in span.to_json()


async def test_a_failed_call(sandbox: Sandbox, north: Account, told: Told) -> None:
    """A call that fails, or is cancelled, is a span with an error, and leaves the caller's own current."""
    sandbox.script("north", Answer(404), Answer(delay=60))
    async with AudiencesClient(base_url=sandbox.base_url, on_event=told.hook) as client:
        with told.tracers.get_tracer("app").start_as_current_span("handler") as handler:
            with pytest.raises(NotFoundError):
                await client.get_audiences(north)
            assert trace.get_current_span() is handler
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.get_audiences(north)
            assert trace.get_current_span() is handler
    failed, cancelled = told.calls()
    for span, name in ((failed, "NotFoundError"), (cancelled, "CancelledError")):
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, name)
        assert (span.attributes or {})["error.type"] == name


async def test_another_call_of_the_api(sandbox: Sandbox, north: Account, told: Told) -> None:
    """A call of `get_json` has a span of that name, with its path."""
    async with AudiencesClient(base_url=sandbox.base_url, on_event=told.hook) as client:
        await client.get_json("audiences", north)
    (span,) = told.calls("get_json")
    assert (span.attributes or {})["audiences.path"] == "audiences"


async def test_concurrent_calls_keep_their_own_spans(sandbox: Sandbox, told: Told) -> None:
    """Concurrent calls each have their own attempts in their own span."""
    accounts = [sandbox.add_account(f"a{number}") for number in range(20)]
    for number, account in enumerate(accounts):
        sandbox.script(account.name, *[Answer(500)] * (number % 3))
    async with AudiencesClient(base_url=sandbox.base_url, on_event=told.hook, retry=AT_ONCE) as client:
        await client.fetch_all(accounts)
    counts = {str((span.attributes or {})["audiences.account.name"]): len(span.events) for span in told.calls()}
    assert counts == {f"a{number}": 1 + number % 3 for number in range(20)}


async def test_metrics(sandbox: Sandbox, north: Account, told: Told, time: SteppedTime) -> None:
    """Metrics have the duration of calls by result, the wait of attempts for their turn, and the retries."""
    sandbox.script("north", Answer(429, retry_after=0), Answer(200), Answer(404))
    limit = RateLimit(rate=20.0)
    async with AudiencesClient(
        base_url=sandbox.base_url, on_event=told.hook, rate_limit=limit, retry=AT_ONCE, clock=time.clock
    ) as client:
        await client.get_audiences(north)
        with pytest.raises(NotFoundError):
            await client.get_audiences(north)
    metrics = told.metrics()
    durations = {point.attributes.get("error.type"): point.count for point in metrics["audiences.client.call.duration"]}
    assert durations == {None: 1, "NotFoundError": 1}
    (waits,) = metrics["audiences.client.pacing.wait"]
    assert waits.count == 3
    assert waits.sum == pytest.approx(0.1)
    assert [point.value for point in metrics["audiences.client.retries"]] == [1]


async def test_beside_an_http_instrumentation(sandbox: Sandbox, north: Account, told: Told) -> None:
    """Each request has one client span, aiohttp's, below the call's; retries are marked on it."""
    instrumentor = AioHttpClientInstrumentor()
    instrumentor.instrument(tracer_provider=told.tracers, request_hook=request_hook)
    try:
        sandbox.script("north", Answer(500), Answer(503))
        async with AudiencesClient(base_url=sandbox.base_url, on_event=told.hook, retry=AT_ONCE) as client:
            await client.get_audiences(north)
    finally:
        instrumentor.uninstrument()
    (call,) = told.calls()
    requests = [span for span in told.spans.get_finished_spans() if span.kind is SpanKind.CLIENT]
    assert [(span.attributes or {}).get("http.request.resend_count") for span in requests] == [None, 1, 2]
    for span in requests:
        assert span.parent is not None
        assert span.parent == call.get_span_context()


async def test_a_shared_request_is_one_span(sandbox: Sandbox, north: Account, told: Told) -> None:
    """With a cache there is one span per request sent, and none for callers that share it."""
    async with AudiencesClient(base_url=sandbox.base_url, on_event=told.hook, cache=CachePolicy(10.0)) as client:
        await asyncio.gather(*(client.get_audiences(north) for _ in range(10)))
        await client.get_audiences(north)
    assert len(told.calls()) == 1


async def test_a_stale_answer_is_no_error(sandbox: Sandbox, north: Account, told: Told, time: SteppedTime) -> None:
    """Count no error for a call whose callers get a stale answer, and count where answers come from."""
    policy = CachePolicy(ttl=10.0, stale_if_error=100.0)
    client = AudiencesClient(
        base_url=sandbox.base_url, on_event=told.hook, cache=policy, clock=time.clock, retry=RetryPolicy(max_attempts=1)
    )
    async with client:
        await client.get_audiences(north)
        time.now += 50
        sandbox.script("north", Answer(500), Answer(500))
        await client.get_audiences(north)
        time.now += 100
        with pytest.raises(ServerError):
            await client.get_audiences(north)
    metrics = told.metrics()
    durations = {point.attributes.get("error.type"): point.count for point in metrics["audiences.client.call.duration"]}
    assert durations == {None: 2, "ServerError": 1}
    lookups = metrics["audiences.client.cache.lookups"]
    assert {point.attributes["audiences.cache.result"]: point.value for point in lookups} == {"wire": 1, "stale": 1}
    assert [span.status.status_code for span in told.calls()] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert (told.calls()[1].attributes or {})["audiences.cache.result"] == "stale"


async def test_the_global_providers_are_the_default(sandbox: Sandbox, north: Account) -> None:
    """Without explicit providers the global ones are used, which do nothing until they are configured."""
    async with AudiencesClient(base_url=sandbox.base_url, on_event=OpenTelemetry()) as client:
        assert len(await client.get_audiences(north)) == 2
