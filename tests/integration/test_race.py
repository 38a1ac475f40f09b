"""
The lock order, raced: producers of every kind and relays over few mentors, with crashes.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs
from tenacity import wait_exponential
from typing_extensions import override

from outbox import Delivered, Destination, Event, Relay, RetryPolicy, TransientError
from tests.conftest import until
from tests.factories import NEXT_YEAR, TODAY, YESTERDAY
from worker import database
from worker.certifications import confirmations, visibility
from worker.certifications.visibility import DESTINATION
from worker.database import transaction
from worker.errors import StillValidError
from worker.portal import redrive_recoverable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, MutableMapping
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.factories import Mentor, World

    Logged = list[MutableMapping[str, Any]]

MENTORS = 12
ROUNDS = 60
"""Of each of the producers; a round is a handful of transitions."""

LEASE_SECONDS = 0.7
ATTEMPT_SECONDS = 0.3


class Portal:
    """
    A portal in memory that is slow, fails, hangs, and notes what overlaps.

    Of a request that hangs the caller hears nothing more; it takes effect late all the same.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 (no secret)
        self.shown: dict[str, bool] = {}
        self.spans: dict[str, list[tuple[float, float]]] = {}
        self.calm = False
        self.slow = False
        self.under_way = 0
        self.late: set[asyncio.Task[None]] = set()

    async def deliver(self, event: Event, _seconds: float) -> Delivered:
        """
        Show or hide, after a while, perhaps.
        """
        started = time.monotonic()
        self.under_way += 1
        try:
            luck = 1.0 if self.calm else self.random.random()
            await asyncio.sleep(self.random.random() * (0.2 if self.slow else 0.04))
            if luck < 0.1:
                raise TransientError("busy", "Busy.")
            if luck < 0.2:
                self.late.add(asyncio.create_task(self._show_late(event)))
                await asyncio.sleep(ATTEMPT_SECONDS * 2)  # past its deadline
            self.shown[event.key] = event.payload["visible"]
            if luck < 0.25:
                raise TransientError("lost", "The reply was lost.", doubtful=True)
            return Delivered()
        finally:
            self.under_way -= 1
            self.spans.setdefault(event.key, []).append((started, time.monotonic()))

    async def _show_late(self, event: Event) -> None:
        await asyncio.sleep(ATTEMPT_SECONDS + self.random.random())
        self.shown[event.key] = event.payload["visible"]

    def quiet(self) -> bool:
        """
        Whether nothing old can arrive any more.
        """
        return not self.under_way and all(task.done() for task in self.late)

    def overlaps(self) -> list[str]:
        """
        Mentors for whom two deliveries were under way at once.
        """
        found = []
        for key, spans in self.spans.items():
            if any(later[0] < earlier[1] for earlier, later in pairwise(sorted(spans))):
                found.append(key)
        return found


@pytest.fixture
def log() -> Iterator[Logged]:
    """
    What everybody logged.
    """
    with capture_logs() as entries:
        yield entries


@pytest.fixture
async def crowd(database_url: str) -> AsyncIterator[AsyncEngine]:
    """
    An engine with room for everybody at once.
    """
    engine = database.connect(database_url, application_name="race", pool_size=20)
    yield engine
    await engine.dispose()


class SluggishRelay(Relay):
    """
    A relay that now and then stands still, with results in its hands, until others have its
    claims.
    """

    @override
    async def _collect(self) -> None:
        if self._flights._over and random.random() < 0.2:  # noqa: S311 (no secret)
            await asyncio.sleep(LEASE_SECONDS + random.random() * 0.06)  # noqa: S311 (no secret)
        await super()._collect()


def relay(engine: AsyncEngine, world: World, portal: Portal, *, kind: type[Relay] = Relay) -> Relay:
    """
    A relay with a short lease, as impatient as can be.
    """

    async def redrive(limit: int | None) -> int:
        return await redrive_recoverable(engine, organization_id=world.hlf, limit=limit)

    return kind(
        engine,
        Destination(
            name=DESTINATION,
            organization_id=world.hlf,
            deliver=portal.deliver,
            record=confirmations.record,
            redrive=redrive,
            policy=RetryPolicy(
                max_attempts=4, wait=wait_exponential(multiplier=0.01), window_seconds=5
            ),
            concurrency=4,
            attempt_seconds=ATTEMPT_SECONDS,
            lease_seconds=LEASE_SECONDS,
            breaker_keys=1000,  # no outage here, only bad luck
        ),
        poll_seconds=0.005,
    )


async def test_producers_relays_and_crashes_neither_deadlock_nor_end_wrong(  # noqa: C901, PLR0915
    world: World, crowd: AsyncEngine, log: Logged
) -> None:
    """
    Single and bulk transitions, retries by hand and relays that crash share 12 mentors.

    If confirmations stood in the transitions' own table, or anything locked in another
    order, this deadlocks within a second.
    """
    world.engine = crowd
    mentors = [await world.mentor() for _ in range(MENTORS)]
    portal = Portal(seed=7)
    transitions = 0

    async def one_by_one(seed: int) -> None:
        nonlocal transitions
        luck = random.Random(seed)  # noqa: S311 (no secret)
        for _ in range(ROUNDS):
            mentor = luck.choice(mentors)
            with suppress(StillValidError):
                await world.certifications.expire(mentor.certification_id, today=TODAY)
            await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
            await run_out(world, mentor)
            transitions += 2

    async def in_bulk() -> None:
        nonlocal transitions
        for _ in range(ROUNDS):
            async for page in world.certifications.expire_all(today=TODAY):
                transitions += page.certifications

    async def by_hand(seed: int) -> None:
        luck = random.Random(seed)  # noqa: S311 (no secret)
        for _ in range(ROUNDS):
            some = luck.sample(mentors, 5)
            async with transaction(crowd) as connection:
                await visibility.assert_again(
                    connection, [mentor.id for mentor in some], organization_id=world.hlf
                )

    async def crashing() -> None:
        while not done.is_set():
            victim = asyncio.create_task(relay(crowd, world, portal).run(grace_seconds=0))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await done.wait()
            # Its flights go on without it, as requests of a killed process may.
            victim.cancel()
            with suppress(asyncio.CancelledError):
                await victim

    done = asyncio.Event()
    steady = [
        relay(crowd, world, portal, kind=kind) for kind in (Relay, Relay, Relay, SluggishRelay)
    ]
    async with asyncio.TaskGroup() as everybody:
        for one in steady:
            everybody.create_task(one.run(grace_seconds=5))
        everybody.create_task(crashing())
        async with asyncio.TaskGroup() as producers:
            for seed in range(3):
                producers.create_task(one_by_one(seed))
            producers.create_task(in_bulk())
            producers.create_task(in_bulk())
            producers.create_task(by_hand(99))
        done.set()
        portal.calm = True
        await until(portal.quiet)
        await until(lambda: _drained(world), seconds=40)
        assert await _wrongs(world, portal) == []
        await change_minds_in_flight(world, mentors, portal)
        await until(lambda: _drained(world), seconds=40)
        for one in steady:
            one.stop()

    assert transitions > 3 * ROUNDS
    # A relay survives a deadlock; here there must be none to survive.
    assert [entry for entry in log if entry["event"] == "outbox.database_failed"] == []
    assert portal.overlaps() == []
    assert await _wrongs(world, portal) == []
    assert await _unaccounted(world) == []


async def change_minds_in_flight(world: World, mentors: list[Mentor], portal: Portal) -> None:
    """
    Renew everybody, and expire everybody while the news of it is under way; without a doubt
    left that would have it said again in any case.
    """
    portal.slow = True
    service = world.certifications
    await asyncio.gather(
        *[service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY) for mentor in mentors]
    )
    await until(lambda: portal.under_way)
    async for _page in service.expire_all(today=NEXT_YEAR + timedelta(days=1)):
        pass


async def run_out(world: World, mentor: Mentor) -> None:
    """
    Let a renewed certification have run out, behind everybody's back.
    """
    await world.execute(
        "UPDATE public.certifications SET expires_on = :yesterday WHERE id = :id",
        yesterday=YESTERDAY,
        id=mentor.certification_id,
    )


async def _drained(world: World) -> bool:
    """
    Nothing is alive any more, also nothing that waits to be said again after a doubt.
    """
    await world.execute("UPDATE outbox.doubts SET until = now()")
    await world.execute("UPDATE outbox.events SET available_at = now() WHERE claim_token IS NULL")
    return not await world.value("SELECT count(*) FROM outbox.events")


async def _wrongs(world: World, portal: Portal) -> list[UUID]:
    """
    Mentors without an open failure whom the portal shows wrongly, or who are confirmed ahead.
    """
    rows = await world.rows(
        "SELECT desired.mentor_id, desired.visible, confirmed.version > desired.version AS ahead"
        " FROM public.portal_visibility AS desired"
        " LEFT JOIN public.portal_confirmations AS confirmed USING (mentor_id)"
        " WHERE NOT EXISTS (SELECT FROM public.dynamics_sync_failures AS failure"
        "                    WHERE failure.mentor_id = desired.mentor_id"
        "                      AND failure.resolved_at IS NULL)"
    )
    return [
        row.mentor_id
        for row in rows
        if row.ahead or portal.shown.get(str(row.mentor_id)) is not row.visible
    ]


async def _unaccounted(world: World) -> list[UUID]:
    """
    Mentors whose newest version has no ending; an ending speaks for every older version.
    """
    rows = await world.rows(
        "SELECT desired.mentor_id"
        "  FROM public.portal_visibility AS desired"
        " WHERE desired.version IS DISTINCT FROM ("
        "       SELECT max(ended.version) FROM outbox.settled AS ended"
        "        WHERE ended.key = CAST(desired.mentor_id AS text))"
    )
    return [row.mentor_id for row in rows]
