"""
Traces: an attempt is linked to where its state came from, and tells nothing that is secret.
"""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from outbox import PermanentError, Relay, TransientError
from tests.factories import NEXT_YEAR
from tests.unit.test_architecture import run_python
from worker import credentials, logs, portal
from worker.errors import SettingsError
from worker.settings import Settings
from worker.tracing import current_traceparent, traced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.factories import World


class Tracing:
    """
    A provider of the real SDK, whose spans stay here.
    """

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    @property
    def attempts(self) -> list[ReadableSpan]:
        """
        The spans of attempts that have ended, in that order.
        """
        spans = self._exporter.get_finished_spans()
        return [span for span in spans if span.name == "hlf_sync.attempt"]


@pytest.fixture
def tracing() -> Iterator[Tracing]:
    """
    Of this test alone.
    """
    tracing = Tracing()
    yield tracing
    tracing.provider.shutdown()


class Writer:
    """
    A portal that answers what it was told to, and then takes everything.
    """

    takes_mentor_id = True

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)

    async def set_visibility(self, *_: object, **__: object) -> None:
        """
        Take it, or not.
        """
        if self._errors:
            raise self._errors.pop(0)
        structlog.get_logger("x").info("said", status=204)


def relay_of(
    world: World, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, *errors: Exception
) -> Relay:
    """
    That of a worker that traces.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", str(world.hlf))
    destination = portal.destination(world.engine, Writer(*errors), Settings.load())
    return Relay(world.engine, traced(destination, tracing.tracer))


async def test_a_transition_in_a_span_leaves_its_context_with_the_event(
    world: World, tracing: Tracing
) -> None:
    """
    The newest state has its own: what it took the place of is not what is sent.
    """
    mentor = await world.mentor()

    async def stored() -> object:
        return await world.value("SELECT traceparent FROM outbox.events")

    await world.certifications.expire(mentor.certification_id)
    assert await stored() is None

    with tracing.tracer.start_as_current_span("renewal") as span:
        await world.certifications.renew(mentor.certification_id, until=NEXT_YEAR, wait_seconds=0)
        assert await stored() == current_traceparent()
    assert f"{span.get_span_context().trace_id:032x}" in str(await stored())


async def test_every_attempt_is_a_trace_of_its_own_that_is_linked_to_the_transition(
    world: World, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The one that failed and the one that did not.
    """
    mentor = await world.mentor()
    with tracing.tracer.start_as_current_span("expiry") as cause:
        await world.certifications.expire(mentor.certification_id)

    busy = TransientError("http_503", "Busy: canary.")
    with tracing.tracer.start_as_current_span("whatever else goes on"):
        await relay_of(world, tracing, monkeypatch, busy).drain()

    failed, delivered = tracing.attempts
    for span in (failed, delivered):
        assert span.parent is None
        assert span.kind is SpanKind.CONSUMER
        [link] = span.links
        assert link.context.trace_id == cause.get_span_context().trace_id
        assert link.context.span_id == cause.get_span_context().span_id
        assert span.context is not None
        assert span.context.trace_id != link.context.trace_id
        assert span.attributes is not None
        assert span.attributes["messaging.destination.name"] == "dynamics"
        assert span.attributes["hlf_sync.organization_id"] == str(world.hlf)
        assert str(mentor.id) not in span.to_json()
        assert "canary" not in span.to_json()
    assert failed.attributes is not None
    assert (failed.status.status_code, failed.attributes["error.type"]) == (
        StatusCode.ERROR,
        "http_503",
    )
    assert delivered.attributes is not None
    assert delivered.attributes["hlf_sync.outcome"] == "delivered"


@pytest.mark.parametrize("traceparent", [None, "nonsense", "00-0-0-01"])
async def test_an_event_that_nobody_traced_is_delivered_without_a_link(
    world: World, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, traceparent: str | None
) -> None:
    """
    Also one whose context nobody can read.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id)
    await world.execute("UPDATE outbox.events SET traceparent = :it", it=traceparent)

    drained = await relay_of(world, tracing, monkeypatch).drain()

    assert drained.tally["delivered"] == 1
    [span] = tracing.attempts
    assert not span.links


async def test_a_bug_is_told_by_its_name_alone(
    world: World, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its text may hold a row or a header, and neither status nor events of the span have it.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id)

    await relay_of(world, tracing, monkeypatch, LookupError("canary")).drain()

    span = tracing.attempts[0]
    assert span.attributes is not None
    assert span.attributes["error.type"] == "LookupError"
    assert not span.events
    assert "canary" not in span.to_json()


async def test_the_log_of_an_attempt_has_its_trace(
    world: World, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What is logged in it and what is logged of its failure; and nothing else has one.
    """
    for _ in range(2):
        mentor = await world.mentor()
        await world.certifications.expire(mentor.certification_id)
    said = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", said)
        logs.configure("json")
    gone = PermanentError("gone", "Gone.")
    try:
        await relay_of(world, tracing, monkeypatch, gone).drain()
        structlog.get_logger("x").info("afterwards")
    finally:
        structlog.reset_defaults()

    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    traces = {f"{span.context.trace_id:032x}" for span in tracing.attempts if span.context}
    assert {line["event"] for line in lines} == {"said", "outbox.attempt_failed", "afterwards"}
    assert {line["trace_id"] for line in lines if line["event"] != "afterwards"} == traces
    assert "trace_id" not in lines[-1]


# ------------------------------------------------------------------------------- set-up


HIDE = "import sys; sys.modules['opentelemetry'] = None; "


def test_without_opentelemetry_everything_is_as_before() -> None:
    """
    It is an extra: nothing of ours needs it, and its variables are often set for everybody.
    """
    told = run_python(
        HIDE + "import os; os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://collector:4318';"
        "import worker.cli; from worker import credentials; from worker.tracing import"
        " current_traceparent; print(current_traceparent(), credentials.trace_exporter())"
    )
    assert told.splitlines()[-1] == "None None"


def test_it_is_not_loaded_for_those_who_do_not_trace() -> None:
    """
    No command, and no transition, waits for it.
    """
    loaded = run_python(
        "import sys, worker.cli; from worker.tracing import current_traceparent;"
        "current_traceparent(); print(*sorted(sys.modules))"
    )
    assert "worker.tracing" in loaded.split()
    assert not {"opentelemetry", "opentelemetry.trace"} & set(loaded.split())


def test_secret_headers_do_not_travel_in_the_clear(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    And are not repeated, whether they can be read or not.
    """
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.example:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=canary")
    with pytest.raises(SettingsError, match="https") as refused:
        credentials.trace_exporter()
    assert "canary" not in str(refused.value)

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector.example:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "canary without a name")
    exporter = credentials.trace_exporter()
    assert exporter is not None
    exporter.shutdown()
    assert "canary" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many"), ("OTEL_BSP_MAX_QUEUE_SIZE", "1")],
)
def test_a_wrong_variable_of_opentelemetrys_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """
    They are often set for everybody; none of them is a bug of ours. Some are read at the import.
    """
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector.example:4318")
    monkeypatch.setenv(name, value)
    told = run_python(
        "import asyncio; from worker import bootstrap, errors\n"
        "try: asyncio.run(bootstrap.open_tracing().__aenter__())\n"
        "except errors.SettingsError as error: print(error)"
    )
    assert told.startswith("A variable of OpenTelemetry's is wrong: ")


@pytest.mark.parametrize(
    "variables", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://x", "OTEL_TRACES_EXPORTER": "none"}]
)
def test_without_an_address_or_an_exporter_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """
    As OpenTelemetry's own variables have it.
    """
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert credentials.trace_exporter() is None
