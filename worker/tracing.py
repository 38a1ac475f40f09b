"""
Traces: the transition that wanted a state, and the attempts that told it, as spans with links.

An attempt is no child of the transition: it may come hours later, and would stretch a trace that
ended long ago. OpenTelemetry is an extra; without it nothing here does anything.

Requests to Dynamics and to the webhook carry no `traceparent`: those are other people's houses,
they would learn how ours is built and nobody could follow a trace into them. What joins both
sides' logs is `x-ms-correlation-id`, and `webhook-id`.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

from structlog.contextvars import bind_contextvars

from outbox import DeliveryError
from worker.redaction import name_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Link, Tracer

    from outbox import Delivered, Destination, Event, Skipped

    Trace = Callable[[Destination], Destination]

LAST_SECONDS = 3.0
"""For what was traced last to be sent, when a process ends."""

ATTEMPT = "hlf_sync.attempt"
"""Name of the span of an attempt."""

# Source: OpenTelemetry's semantic conventions for messaging spans, which are not stable yet.
SYSTEM = "messaging.system"
OPERATION_NAME = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
ERROR_TYPE = "error.type"

ORGANIZATION = "hlf_sync.organization_id"
VERSION = "hlf_sync.version"
NUMBER = "hlf_sync.attempt"
OUTCOME = "hlf_sync.outcome"


def current_traceparent() -> str | None:
    """
    The W3C trace context of the span under way; None if there is none.

    Whoever traces has loaded OpenTelemetry, so it is never loaded for this.
    """
    if sys.modules.get("opentelemetry.trace") is None:
        return None
    from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415 (an extra)

    carrier: dict[str, str] = {}
    tracecontext.TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


@asynccontextmanager
async def sending(exporter: SpanExporter, *, name: str, version: str) -> AsyncIterator[Trace]:
    """
    What makes a destination traced, as long as the block lasts; spans are sent beside the work.

    Args:
        exporter: closed in the end.
        name: of the service, unless OpenTelemetry's own variables have another.

    Raises:
        ValueError: one of those variables is wrong.
    """
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415 (an extra)
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 (an extra)
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 (an extra)

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: name}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield partial(traced, tracer=provider.get_tracer(name, version))
    finally:
        # A collector that is away keeps nobody from ending.
        ending = Thread(target=provider.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, LAST_SECONDS)


def traced(destination: Destination, tracer: Tracer) -> Destination:
    """
    The same destination; each attempt is a span, linked to where its state came from.
    """
    from opentelemetry.context import Context  # noqa: PLC0415 (an extra)
    from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id  # noqa: PLC0415

    async def deliver(event: Event, seconds: float) -> Delivered | Skipped:
        with tracer.start_as_current_span(
            ATTEMPT,
            context=Context(),
            kind=SpanKind.CONSUMER,
            links=_links(event.traceparent),
            attributes={
                SYSTEM: "hlf_outbox",
                OPERATION_NAME: "deliver",
                OPERATION_TYPE: "process",
                DESTINATION: event.destination,
                MESSAGE_ID: str(event.id),
                ORGANIZATION: str(event.organization_id),
                VERSION: event.version,
                NUMBER: event.attempts,
            },
            # An exception's text may hold anything.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            # An attempt is a task of its own, so this ends with it.
            own = span.get_span_context()
            if own.is_valid:  # not with OTEL_SDK_DISABLED
                bind_contextvars(
                    trace_id=format_trace_id(own.trace_id), span_id=format_span_id(own.span_id)
                )
            try:
                outcome = await destination.deliver(event, seconds)
            except BaseException as error:
                code = error.code if isinstance(error, DeliveryError) else name_of(type(error))
                span.set_attribute(ERROR_TYPE, code)
                span.set_status(StatusCode.ERROR)
                raise
            span.set_attribute(OUTCOME, type(outcome).__name__.lower())
            return outcome

    return replace(destination, deliver=deliver)


def _links(traceparent: str | None) -> list[Link]:
    """
    To the span in which a state was enqueued; none if it was not traced, or nobody can read it.
    """
    from opentelemetry.trace import Link, get_current_span  # noqa: PLC0415 (an extra)
    from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415 (an extra)

    if traceparent is None:
        return []
    context: Context = tracecontext.TraceContextTextMapPropagator().extract(
        {"traceparent": traceparent}
    )
    cause = get_current_span(context).get_span_context()
    return [Link(cause)] if cause.is_valid else []
