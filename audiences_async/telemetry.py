"""OpenTelemetry spans and metrics from the client's events (extra ``otel``).

Names follow the semantic conventions if one applies (https://opentelemetry.io/docs/specs/semconv/). The span is
INTERNAL, because an HTTP instrumentation already creates a client span for each request.
"""

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen
from opentelemetry import context, metrics, trace

from audiences_async._version import __version__
from audiences_async.events import (
    Attempt,
    AttemptFinished,
    AttemptStarted,
    CacheLookup,
    CallFinished,
    CallStarted,
    Event,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME: Final = "audiences_async"
_SPAN: Final = "get_audiences"
_JSON_SPAN: Final = "get_json"
_ACCOUNT: Final = "audiences.account.name"
_CACHE_RESULT: Final = "audiences.cache.result"
_CALL_ID: Final = "audiences.call.id"
_PATH: Final = "audiences.path"
_ERROR_TYPE: Final = "error.type"
_RESEND_COUNT: Final = "http.request.resend_count"
# The default boundaries are meant for milliseconds. These are those of `http.client.request.duration`, plus two for
# calls that wait: https://opentelemetry.io/docs/specs/semconv/http/http-metrics/.
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_STATUS_CODE: Final = "http.response.status_code"


@frozen
class _Open:
    """The span of the call that the current task makes."""

    span: trace.Span
    token: "Token[context.Context]"


_open: ContextVar[_Open | None] = ContextVar("audiences_async_span", default=None)
_resend: ContextVar[int] = ContextVar("audiences_async_resend", default=0)


class OpenTelemetry:
    """Record spans and metrics from a client's events: ``AudiencesClient(on_event=OpenTelemetry())``.

    Each call has an INTERNAL span ``get_audiences`` or ``get_json``, which is current while the call runs, with an
    event per attempt. The span names the account and the ``call_id``, never the key. The metrics measure times in
    seconds:

    - ``audiences.client.call.duration``, a histogram, with ``error.type`` if the call failed;
    - ``audiences.client.pacing.wait``, a histogram of each attempt's wait for its turn;
    - ``audiences.client.retries``, a counter of attempts after the first of a call;
    - ``audiences.client.cache.lookups``, a counter of a cache's answers, with ``audiences.cache.result``.

    An error for which a stale answer stands in is none for callers, and is not counted as one.

    Args:
        tracer_provider: Provider for spans; ``None`` means the global one.
        meter_provider: Provider for metrics; ``None`` means the global one.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(_NAME, __version__, tracer_provider)
        meter = metrics.get_meter(_NAME, __version__, meter_provider)
        self._duration = meter.create_histogram(
            "audiences.client.call.duration",
            "s",
            "Duration of calls, every attempt and wait included.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._waited = meter.create_histogram(
            "audiences.client.pacing.wait",
            "s",
            "Wait of attempts for their account's turn and a connection.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._retries = meter.create_counter(
            "audiences.client.retries", "{retry}", "Attempts after the first one of a call."
        )

        self._lookups = meter.create_counter(
            "audiences.client.cache.lookups", "{lookup}", "Answers of a client with a cache, by where they come from."
        )

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        match event:
            case CallStarted():
                self._start(event)
            case AttemptStarted():
                _resend.set(event.number - 1)
                self._waited.record(event.waited)
                if event.number > 1:
                    self._retries.add(1)
            case AttemptFinished():
                trace.get_current_span().add_event("attempt", _attributes(event.attempt))
            case CallFinished():
                self._finish(event)
            case CacheLookup():
                self._lookups.add(1, {_CACHE_RESULT: event.result})

    def _start(self, event: CallStarted) -> None:
        attributes = {_ACCOUNT: event.account, _CALL_ID: event.call_id or ""}
        if event.path is not None:
            attributes[_PATH] = event.path
        span = self._tracer.start_span(_SPAN if event.path is None else _JSON_SPAN, attributes=attributes)
        _open.set(_Open(span, context.attach(trace.set_span_in_context(span))))

    def _finish(self, event: CallFinished) -> None:
        failed: dict[str, Any] = {} if event.error is None or event.stale else {_ERROR_TYPE: event.error}
        self._duration.record(event.elapsed, failed)
        opened = _open.get()
        assert opened is not None  # events of a call are ordered, in one task
        _open.set(None)
        opened.span.set_attribute("audiences.call.attempts", event.attempts)
        if event.stale:
            opened.span.set_attribute(_CACHE_RESULT, "stale")
        elif event.error is not None:
            opened.span.set_attributes(failed)
            opened.span.set_status(trace.StatusCode.ERROR, event.error)
        context.detach(opened.token)
        opened.span.end()


def request_hook(span: trace.Span, _params: Any) -> None:
    """Set ``http.request.resend_count`` on the span of an HTTP instrumentation.

    Pass it to ``AioHttpClientInstrumentor().instrument(request_hook=request_hook)`` before the client is created.
    """
    if span.is_recording() and _open.get() is not None and _resend.get():
        span.set_attribute(_RESEND_COUNT, _resend.get())


def _attributes(attempt: Attempt) -> "Mapping[str, Any]":
    values = {
        _RESEND_COUNT: attempt.number - 1,
        _STATUS_CODE: attempt.status,
        "audiences.attempt.error": attempt.error,
        "audiences.attempt.duration": attempt.elapsed,
        "audiences.attempt.wait": attempt.wait,
        "audiences.attempt.reason": attempt.reason,
    }
    return {name: value for name, value in values.items() if value is not None}
