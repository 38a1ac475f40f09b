"""
What the database is asked about the outbox, and the port at which a worker answers.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from outbox import Destination, NewEvent, RetryPolicy, enqueue, gate
from tests.conftest import until
from tests.integration.test_statements import counted
from worker import bootstrap, database
from worker.bootstrap import REVISION
from worker.coordinator import nights, retry
from worker.listening import address_of, bind
from worker.monitoring import figures as asking
from worker.monitoring import serving
from worker.monitoring.figures import FIGURES, Figures, Reader
from worker.monitoring.serving import Monitor
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.factories import World

DESTINATIONS = ("dynamics", "reminders")


def reader(world: World) -> Reader:
    """
    HLF's.
    """
    return Reader(world.engine, organization_id=world.hlf, destinations=DESTINATIONS)


async def look(world: World) -> Figures:
    """
    An answer of its own.
    """
    figures = await reader(world).figures()
    assert figures is not None
    return figures


# ------------------------------------------------------------------------------ figures


async def test_an_empty_outbox_is_empty(world: World) -> None:
    """
    Nobody waits, nothing failed, no gate was ever closed, and no night has been.
    """
    assert await look(world) == Figures(
        revision=REVISION,
        queues=[],
        failures=[],
        wrongly_visible_seconds=0,
        gates=[],
        jobs={},
    )


async def test_what_waits_is_counted_with_its_age_and_others_are_left_out(world: World) -> None:
    """
    By destination and whether a worker has it, of one organisation.
    """
    first, second = await world.mentor(), await world.mentor()
    await world.certifications.expire(first.certification_id)
    await world.certifications.expire(second.certification_id)
    await world.execute(
        "UPDATE outbox.events SET claim_token = gen_random_uuid(), claimed_version = version,"
        " claimed_by = gen_random_uuid(), attempts = 1, first_attempt_at = now()"
        " WHERE key = :key",
        key=str(first.id),
    )
    await world.execute("UPDATE outbox.events SET created_at = now() - interval '1 hour'")
    async with world.engine.begin() as connection:
        await enqueue(
            connection,
            [
                NewEvent(
                    destination="dynamics",
                    key=str(uuid4()),
                    organization_id=world.other,
                    version=1,
                    payload={},
                )
            ],
        )

    [queue] = (await look(world)).queues
    assert (queue["destination"], queue["waiting"], queue["in_flight"]) == ("dynamics", 1, 1)
    assert 3600 <= queue["oldest_seconds"] < 3700


async def test_a_mentor_is_wrongly_visible_since_the_change_of_mind_and_until_it_is_confirmed(
    world: World,
) -> None:
    """
    Saying the same once more makes the event young, not the wrong.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id)
    await world.execute(
        "UPDATE public.portal_visibility SET changed_at = now() - interval '2 days'"
    )

    found = (await look(world)).wrongly_visible_seconds
    assert 172_800 <= found < 172_900

    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " SELECT mentor_id, organization_id, visible, version FROM public.portal_visibility"
    )
    assert (await look(world)).wrongly_visible_seconds == 0


async def test_a_mentor_who_is_only_hidden_once_more_is_in_question_since_then(
    world: World,
) -> None:
    """
    Somebody ran `resync`, a year after the portal had confirmed. With another, whose hiding it
    never confirmed, it is the change of mind that counts.
    """
    hidden, other = await world.mentor(), await world.mentor()
    await world.certifications.expire(hidden.certification_id)
    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " SELECT mentor_id, organization_id, visible, version FROM public.portal_visibility"
    )
    await world.execute("DELETE FROM outbox.events")
    await world.execute(
        "UPDATE public.portal_confirmations SET confirmed_at = now() - interval '1 year'"
    )
    await world.execute(
        "UPDATE public.portal_visibility SET changed_at = now() - interval '2 years'"
    )
    assert [states async for _, states in retry.resync(world.engine, organization_id=world.hlf)]
    await world.execute("UPDATE outbox.events SET created_at = now() - interval '1 hour'")

    assert 3600 <= (await look(world)).wrongly_visible_seconds < 3700

    await world.certifications.expire(other.certification_id)
    await world.execute(
        "UPDATE public.portal_visibility SET changed_at = now() - interval '2 days'"
        " WHERE mentor_id = :mentor",
        mentor=other.id,
    )
    assert (await look(world)).wrongly_visible_seconds > 172_800


async def test_a_mentor_whose_hiding_was_given_up_is_still_wrongly_visible(world: World) -> None:
    """
    Without an event; and the failure is counted by what was wanted and who can help.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id)
    await world.execute("DELETE FROM outbox.events")
    await world.execute(
        "INSERT INTO public.dynamics_sync_failures (organization_id, mentor_id, visible, version,"
        " error_code, error_message, retry_count, recoverable)"
        " VALUES (:hlf, :mentor, false, 1, 'gone', 'Gone.', 0, false)",
        hlf=world.hlf,
        mentor=mentor.id,
    )

    found = await look(world)
    assert found.wrongly_visible_seconds > 0
    assert found.failures == [{"wanted": "hide", "recoverable": False, "mentors": 1}]


async def test_a_gate_is_told_with_its_reason_and_its_end(world: World) -> None:
    """
    One that a person closed has no end.
    """
    where: gate.Where = {"destination": "dynamics", "organization_id": world.hlf}
    async with world.engine.begin() as connection:
        await gate.close_by_hand(connection, **where, message="", closed_by="somebody")

    assert (await look(world)).gates == [
        {
            "destination": "dynamics",
            "state": "closed",
            "reason": "operator",
            "closed_until": None,
        }
    ]


async def test_jobs_of_the_night_have_the_time_of_their_last_success(world: World) -> None:
    """
    Each part by itself: one that failed does not take the others' success away.
    """
    parts = [{"part": "expire", "verdict": "done"}, {"part": "drain", "verdict": "unreachable"}]
    async with world.engine.begin() as connection:
        run = await nights.begin(connection, organization_id=world.hlf)
        await nights.finish(connection, run, ok=False, summary={"parts": parts})
        await nights.begin(connection, organization_id=world.hlf)

    jobs = (await look(world)).jobs
    assert jobs.keys() == {"nightly_expire"}
    assert jobs["nightly_expire"] > 1.7e9


async def test_the_question_reads_no_names_and_no_history(world: World) -> None:
    """
    Nothing that grows with the years, and nothing that a login for figures may not read.
    """
    async with world.engine.begin() as connection:
        await connection.execute(text("SET LOCAL enable_seqscan = off"))
        rows = await connection.execute(
            text(f"EXPLAIN (FORMAT JSON) {FIGURES.text}"),
            {"organization_id": world.hlf, "destinations": list(DESTINATIONS)},
        )
        plan = json.dumps(rows.scalar_one())

    assert '"Seq Scan"' not in plan, plan  # each table has an index for what is asked of it
    assert '"settled"' not in plan
    assert '"mentors"' not in plan


async def test_many_who_ask_at_once_cost_one_query_every_few_seconds(world: World) -> None:
    """
    However many scrape.
    """
    clock = [0.0]
    one = Reader(
        world.engine,
        organization_id=world.hlf,
        destinations=DESTINATIONS,
        clock=lambda: clock[0],
    )
    with counted(world.engine) as statements:
        answers = await asyncio.gather(*(one.figures() for _ in range(20)))
        assert await one.figures() is answers[0]
        assert len(statements) == 1, statements

        clock[0] += asking.GOOD_SECONDS
        await one.figures()
        assert len(statements) == 2, statements


async def test_a_database_that_says_nothing_keeps_nobody_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Neither the first who asks nor those who come meanwhile; and there is no old answer.
    """
    one = reader(world)
    await one.figures()
    one._good_until = None
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", 0.05)
    async with world.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE outbox.gates"))
        async with asyncio.timeout(5):
            assert not any(await asyncio.gather(one.figures(), one.figures()))
            await until(lambda: one._asking is None)
            assert await one.figures() is None
    await one.aclose()


# --------------------------------------------------------------------------- the port


async def _nothing(*_: object) -> Any:  # noqa: ANN401
    raise NotImplementedError


@asynccontextmanager
async def monitored(world: World) -> AsyncIterator[tuple[Monitor, httpx.AsyncClient]]:
    """
    A monitor on loopback, and whoever asks it.
    """
    destination = Destination(
        name="dynamics",
        organization_id=world.hlf,
        deliver=_nothing,
        record=_nothing,
        redrive=_nothing,
        policy=RetryPolicy(),
    )
    with bind("127.0.0.1", 0, variables="HLF_METRICS_PORT") as listener:
        monitor = Monitor(
            world.engine,
            organization_id=world.hlf,
            destinations=[destination],
            listener=listener,
            poll_seconds=1,
            version="1.2.3",
            revision=REVISION,
        )
        running = asyncio.create_task(monitor.serve())
        try:
            async with httpx.AsyncClient(base_url=address_of(listener)) as client:
                yield monitor, client
        finally:
            running.cancel()
            await asyncio.wait({running})


async def test_a_worker_is_live_before_it_is_ready(world: World) -> None:
    """
    And ready with its first answer, until it is told to stop.
    """
    async with monitored(world) as (monitor, client):
        assert (await client.get("/live")).status_code == 200
        answer = await client.get("/ready")
        assert (answer.status_code, answer.text.count(".")) == (503, 1)

        observer = monitor.destinations[0].observer
        observer.turned(seconds=0.01, claimed=0)
        assert (await client.get("/ready")).status_code == 200

        observer.stopping()
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/live")).status_code == 200


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /live HTTP/1.1\r\nHost:", b"GET /live HTTP/1.1\r\nHost: a\r\n\r\nGET /li"],
    ids=["nothing", "half a request", "one and a half"],
)
async def test_who_asks_for_nothing_is_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """
    A worker runs for months, and each such connection would cost it a file descriptor.
    """
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.1)
    async with monitored(world) as (_, client), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        with closing(writer):
            writer.write(said)
            heard = await reader.read()

    assert heard.count(b"200 OK") == said.count(b"\r\n\r\n")


async def test_a_worker_on_a_database_that_was_set_back_is_not_ready(world: World) -> None:
    """
    Somebody restored a backup of an earlier release beneath it.
    """
    async with monitored(world) as (monitor, client):
        monitor.destinations[0].observer.turned(seconds=0.01, claimed=0)
        monitor._reader.latest = Figures(
            revision="0004",
            queues=[],
            failures=[],
            wrongly_visible_seconds=0,
            gates=[],
            jobs={},
        )
        monitor._reader._good_until = float("inf")
        answer = await client.get("/ready")

    assert answer.status_code == 503
    assert f"at migration 0004, and this release needs {REVISION}" in answer.text


async def test_metrics_are_told_whatever_format_is_asked_for(world: World) -> None:
    """
    Those of the process and those of the database in one answer.
    """
    unready = f'hlf_sync_ready{{organization_id="{world.hlf}"}} 0.0'
    async with monitored(world) as (monitor, client):
        monitor.done("prune")
        assert unready in (await client.get("/metrics")).text
        monitor.destinations[0].observer.turned(seconds=0.01, claimed=0)
        plain = await client.get("/metrics")
        assert unready not in plain.text
        openmetrics = await client.get(
            "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )

    assert plain.headers["content-type"].startswith("text/plain")
    assert openmetrics.text.endswith("# EOF\n")
    names = {family.name for family in text_string_to_metric_families(plain.text)}
    assert {"hlf_sync_database_up", "hlf_sync_events", "hlf_sync_attempts"} <= names
    assert 'task="prune"' in plain.text


async def test_metrics_without_a_database_say_so(world: World, database_url: str) -> None:
    """
    At once, and with what the process itself knows.
    """
    dead = database.connect("postgresql://127.0.0.1:9/x", application_name="test")
    world.engine, engine = dead, world.engine
    try:
        async with monitored(world) as (_, client):
            told = (await client.get("/metrics")).text
    finally:
        world.engine = engine
        await dead.dispose()
    assert f'hlf_sync_database_up{{organization_id="{world.hlf}"}} 0.0' in told
    assert "hlf_sync_events{" not in told
    assert "hlf_sync_attempts_total{" in told


async def test_without_a_port_there_is_no_monitor(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nothing listens.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", str(world.hlf))
    async with bootstrap.open_monitor(world.engine, Settings.load(), ()) as monitor:
        assert monitor is None
