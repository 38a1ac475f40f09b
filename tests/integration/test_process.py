"""
The two ways of running, in this process: signals, side tasks, and history that is forgotten.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from outbox import Delivered, Destination, NewEvent, Relay, enqueue
from tests.conftest import until
from worker import process
from worker.certifications import confirmations
from worker.errors import SettingsError
from worker.portal import DYNAMICS_POLICY
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox import Drained, Event, Settlement
    from tests.factories import Mentor, World

SLOW_POLL = "3600"
"""Seconds: whatever happens sooner was not a poll."""


class Office:
    """
    A process of HLF, with a portal that can be made to hang.

    Attributes:
        arrived: keys of the requests, in order.
        held: while set, requests hang.
    """

    def __init__(self, world: World, database_url: str) -> None:
        self.world = world
        self.url = database_url
        self.settings = Settings.load()
        self.arrived: list[str] = []
        self.held = asyncio.Event()
        self.held.set()
        self.destination = Destination(
            name="dynamics",
            organization_id=world.hlf,
            deliver=self._deliver,
            record=confirmations.record,
            redrive=self._nothing,
            policy=DYNAMICS_POLICY,
            concurrency=1,
            attempt_seconds=25,
            lease_seconds=60,
        )

    async def _deliver(self, event: Event, _seconds: float) -> Delivered:
        self.arrived.append(event.key)
        await self.held.wait()
        return Delivered()

    async def _nothing(self, _limit: int | None) -> int:
        return 0

    async def listener(self) -> psycopg.AsyncConnection[Any]:
        """
        A connection to be woken by.
        """
        return await psycopg.AsyncConnection.connect(self.url, autocommit=True)

    async def expire(self, mentor: Mentor) -> None:
        """
        Give the process something to do.
        """
        await self.world.certifications.expire(mentor.certification_id)

    @asynccontextmanager
    async def working(
        self,
        destinations: Sequence[Destination] = (),
        *,
        connect: Callable[[], Awaitable[psycopg.AsyncConnection[Any]]] | None = None,
    ) -> AsyncIterator[asyncio.Task[None]]:
        """
        Work meanwhile; a process that has not ended by itself is stopped.
        """
        task = asyncio.create_task(
            process.work(
                self.world.engine,
                destinations or [self.destination],
                self.settings,
                connect_listener=connect or self.listener,
            )
        )
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def listened_to(self) -> bool:
        """
        Whether a listener is there.
        """
        return bool(
            await self.world.value(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            )
        )

    async def delivered(self, mentor: Mentor) -> bool:
        """
        Whether a mentor's state was confirmed.
        """
        return bool(
            await self.world.value(
                "SELECT count(*) FROM public.portal_confirmations WHERE mentor_id = :id",
                id=mentor.id,
            )
        )


@pytest.fixture
def office(world: World, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Office:
    """
    A process that does not poll.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", str(world.hlf))
    monkeypatch.setenv("HLF_SYNC_POLL_SECONDS", SLOW_POLL)
    monkeypatch.setenv("HLF_SYNC_GRACE_SECONDS", "3600")
    return Office(world, database_url)


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


async def test_a_commit_elsewhere_wakes_a_worker_that_would_not_poll_for_an_hour(
    office: Office,
) -> None:
    """
    From the transition to the portal without a poll.
    """
    mentor = await office.world.mentor()
    async with office.working():
        await until(office.listened_to)
        await office.expire(mentor)
        await until(lambda: office.delivered(mentor))


async def test_a_worker_that_cannot_listen_polls(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The wake-up is a hint, not a condition.
    """

    async def refuse() -> psycopg.AsyncConnection[Any]:
        raise psycopg.OperationalError("no")

    monkeypatch.setenv("HLF_SYNC_POLL_SECONDS", "0.05")
    office.settings = Settings.load()
    mentor = await office.world.mentor()
    async with office.working(connect=refuse):
        await office.expire(mentor)
        await until(lambda: office.delivered(mentor))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_flight_land_and_claims_nothing_more(
    office: Office, number: signal.Signals
) -> None:
    """
    What is under way is delivered, what waits is left as it was, and the end is no error.
    """
    flying, waiting = await office.world.mentor(), await office.world.mentor()
    office.held.clear()
    await office.expire(flying)
    async with office.working() as work:
        await until(lambda: office.arrived)
        await office.expire(waiting)
        _signal(number)
        with capture_logs() as logs:
            office.held.set()
            async with asyncio.timeout(20):
                await work

    assert office.arrived == [str(flying.id)]
    assert await office.delivered(flying)
    event = await office.world.row("SELECT key, attempts, claim_token FROM outbox.events")
    assert tuple(event) == (str(waiting.id), 0, None)
    assert logs[-1]["event"] == "worker.stopped"
    assert logs[-1]["delivered"] == 1


async def test_each_destination_is_delivered_to_whatever_the_other_does(office: Office) -> None:
    """
    One hangs and the other goes on; a signal reaches both, and the tally is of both.
    """
    mentor = await office.world.mentor()
    await office.expire(mentor)
    async with office.world.engine.begin() as connection:
        await enqueue(
            connection,
            [
                NewEvent(
                    destination="second",
                    key="a",
                    organization_id=office.world.hlf,
                    version=1,
                    payload={},
                )
            ],
        )
    office.held.clear()
    told: list[str] = []

    async def deliver(event: Event, _seconds: float) -> Delivered:
        told.append(event.key)
        return Delivered()

    async def record(_connection: AsyncConnection, _settled: Sequence[Settlement]) -> None:
        office.held.set()

    second = replace(office.destination, name="second", deliver=deliver, record=record)
    with capture_logs() as logs:
        drained = await process.drain(
            office.world.engine, [office.destination, second], office.settings, max_seconds=None
        )
        async with office.working([office.destination, second]) as work:
            await until(office.listened_to)
            _signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                await work

    assert told == ["a"]
    assert {name: end.tally["delivered"] for name, end in drained.items()} == {
        "dynamics": 1,
        "second": 1,
    }
    started = [entry["destination"] for entry in logs if entry["event"] == "worker.started"]
    assert started == ["dynamics", "second"]


async def test_an_error_of_one_destination_lets_the_others_end_their_drain(
    office: Office,
) -> None:
    """
    And is raised afterwards.
    """
    mentor = await office.world.mentor()
    await office.expire(mentor)

    broken = replace(office.destination, name="broken")
    relay_drain = Relay.drain

    async def drain(relay: Relay, *, seconds: float | None = None) -> Drained:
        if relay._destination is broken:
            raise OperationalError("SELECT", {}, Exception())
        return await relay_drain(relay, seconds=seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Relay, "drain", drain)
        with pytest.raises(OperationalError):
            await process.drain(
                office.world.engine, [broken, office.destination], office.settings, max_seconds=None
            )
    assert await office.delivered(mentor)


async def test_a_second_signal_does_not_wait_for_flights(office: Office) -> None:
    """
    With an hour of grace left the flight is ended, and given back without an attempt.
    """
    mentor = await office.world.mentor()
    office.held.clear()
    await office.expire(mentor)
    async with office.working() as work:
        await until(lambda: office.arrived)
        _signal(signal.SIGTERM)
        _signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            await work

    event = await office.world.row("SELECT attempts, claim_token FROM outbox.events")
    assert tuple(event) == (0, None)


async def test_a_signal_ends_a_drain_with_work_left(office: Office) -> None:
    """
    It says so, instead of "done", and what is left is as it was.
    """
    mentors = await office.world.mentors(3)
    for mentor in mentors:
        await office.expire(mentor)
    office.held.clear()
    drain = asyncio.create_task(
        process.drain(office.world.engine, [office.destination], office.settings, max_seconds=None)
    )
    await until(lambda: office.arrived)
    _signal(signal.SIGINT)
    office.held.set()

    drained = (await drain)["dynamics"]
    assert drained.ended == "time"
    assert 1 <= drained.tally["delivered"] < len(mentors)
    assert await office.world.value("SELECT max(attempts) FROM outbox.events") == 0


async def test_a_side_task_that_dies_ends_the_worker(office: Office) -> None:
    """
    Better restarted than half alive; the bug itself is in what is raised, no task is left.
    """

    async def broken() -> psycopg.AsyncConnection[Any]:
        raise ZeroDivisionError

    before = asyncio.all_tasks()
    async with office.working(connect=broken) as work:
        with pytest.raises(ExceptionGroup) as raised:
            await work
    assert raised.group_contains(ZeroDivisionError, depth=1)
    assert asyncio.all_tasks() <= before


async def test_a_wrong_setting_of_the_listener_is_told_as_such(office: Office) -> None:
    """
    As its own sentence, which the command can print, not as part of a group.
    """

    async def unset() -> psycopg.AsyncConnection[Any]:
        raise SettingsError("LISTEN_DATABASE_URL is no address.")

    async with office.working(connect=unset) as work:
        with pytest.raises(SettingsError, match="LISTEN_DATABASE_URL"):
            await work


async def _settle_long_ago(world: World, outcome: str, days: int) -> None:
    await world.execute(
        "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version,"
        " payload, outcome, attempts, created_at, settled_at)"
        " VALUES (1, 'dynamics', 'x', :hlf, 1, '{}', :outcome, 1, now(),"
        " now() - make_interval(days => :days))",
        hlf=world.hlf,
        outcome=outcome,
        days=days,
    )


async def test_a_drain_forgets_old_history_by_its_outcome(office: Office) -> None:
    """
    Deliveries after a month, deaths after a year; open failures are not history.
    """
    for outcome, days in (("delivered", 29), ("delivered", 31), ("dead", 364), ("dead", 366)):
        await _settle_long_ago(office.world, outcome, days)

    await process.drain(
        office.world.engine, [office.destination], office.settings, max_seconds=None
    )

    left = await office.world.rows(
        "SELECT outcome, extract(day FROM now() - settled_at)::int FROM outbox.settled ORDER BY 2"
    )
    assert [tuple(row) for row in left] == [("delivered", 29), ("dead", 364)]


async def test_all_old_history_is_forgotten_however_much_there_is(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A page at a time.
    """
    monkeypatch.setattr(process, "PRUNE_PAGE", 2)
    for _ in range(5):
        await _settle_long_ago(office.world, "delivered", 31)

    await process.drain(
        office.world.engine, [office.destination], office.settings, max_seconds=None
    )

    assert await office.world.value("SELECT count(*) FROM outbox.settled") == 0


async def test_a_worker_forgets_old_history_now_and_then(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Without being asked, and again and again.
    """
    monkeypatch.setattr(process, "PRUNE_SECONDS", 0.01)

    async def forgotten() -> bool:
        return not await office.world.value("SELECT count(*) FROM outbox.settled")

    async with office.working():
        for _ in range(2):
            await _settle_long_ago(office.world, "superseded", 31)
            await until(forgotten)


@pytest.mark.parametrize(
    "error", [OperationalError("DELETE", {}, Exception()), OSError(), TimeoutError()]
)
async def test_history_that_cannot_be_forgotten_is_one_line_in_the_log(
    office: Office, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """
    The drain itself is done.
    """

    async def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(process, "prune", fail)
    with capture_logs() as logs:
        drained = await process.drain(
            office.world.engine, [office.destination], office.settings, max_seconds=None
        )
    assert drained["dynamics"].ended == "done"
    [entry] = [entry for entry in logs if entry["event"] == "history.prune_failed"]
    assert entry["error"] == type(error).__name__
