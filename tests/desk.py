"""
A coordinator of HLF, and the rows that a situation is made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from outbox import Delivered, Destination, Relay
from worker.certifications import confirmations
from worker.coordinator import alerts, retry
from worker.portal import DYNAMICS_POLICY

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Event
    from tests.factories import Mentor, World
    from worker.coordinator.alerts import Failure, Status


class Desk:
    """
    A coordinator of HLF, and the rows that a situation is made of.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.engine = world.engine

    async def wanted(
        self,
        *,
        visible: bool = False,
        version: int = 2,
        organization_id: UUID | None = None,
        days_old: int = 0,
    ) -> Mentor:
        """
        A mentor whom the portal has to show, or not.
        """
        mentor = await self.world.mentor(organization_id=organization_id)
        await self.world.execute(
            "INSERT INTO public.portal_visibility"
            " (mentor_id, organization_id, visible, version, changed_at)"
            " VALUES (:id, :organization_id, :visible, :version,"
            " now() - make_interval(days => :days_old))",
            id=mentor.id,
            organization_id=organization_id or self.world.hlf,
            visible=visible,
            version=version,
            days_old=days_old,
        )
        return mentor

    async def confirmed(self, mentor: Mentor, version: int = 2) -> None:
        """
        Dynamics has confirmed this version of a mentor.
        """
        await self.world.execute(
            "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
            " SELECT mentor_id, organization_id, visible, :version FROM public.portal_visibility"
            " WHERE mentor_id = :id",
            id=mentor.id,
            version=version,
        )

    async def on_its_way(self, mentor: Mentor, *, minutes: int = 0) -> None:
        """
        A mentor's state waits to be delivered.
        """
        await self.world.execute(
            "INSERT INTO outbox.events"
            " (destination, key, organization_id, version, payload, created_at)"
            " SELECT 'dynamics', CAST(mentor_id AS text), organization_id, version,"
            " jsonb_build_object('visible', visible), now() - make_interval(mins => :minutes)"
            " FROM public.portal_visibility WHERE mentor_id = :id",
            id=mentor.id,
            minutes=minutes,
        )

    async def failed(
        self,
        mentor: Mentor,
        *,
        organization_id: UUID | None = None,
        visible: bool = False,
        code: str = "record_not_found",
        minutes_ago: int = 1,
        resolved_minutes_ago: int | None = None,
    ) -> UUID:
        """
        A mentor's state did not get through.
        """
        failure_id = uuid4()
        await self.world.execute(
            "INSERT INTO public.dynamics_sync_failures (id, organization_id, mentor_id,"
            " certification_id, visible, version, error_code, error_message, retry_count,"
            " recoverable, created_at, resolved_at, resolution)"
            " VALUES (:id, :organization_id, :mentor_id, :certification_id, :visible, 2, :code,"
            " 'A sentence.', 3, false, now() - make_interval(mins => :minutes_ago),"
            " now() - make_interval(mins => CAST(:resolved AS integer)),"
            " CASE WHEN CAST(:resolved AS integer) IS NOT NULL THEN 'delivered' END)",
            id=failure_id,
            organization_id=organization_id or self.world.hlf,
            mentor_id=mentor.id,
            certification_id=mentor.certification_id,
            visible=visible,
            code=code,
            minutes_ago=minutes_ago,
            resolved=resolved_minutes_ago,
        )
        return failure_id

    async def failing(self) -> tuple[Mentor, UUID]:
        """
        A mentor with an open failure and nothing on the way.
        """
        mentor = await self.wanted()
        return mentor, await self.failed(mentor)

    async def status(self) -> Status:
        """
        What the coordinator is told.
        """
        async with self.engine.connect() as connection:
            return await alerts.status(connection, organization_id=self.world.hlf)

    async def failures(self, **which: Any) -> list[Failure]:  # noqa: ANN401 (passed on)
        """
        The list of failures.
        """
        async with self.engine.connect() as connection:
            return await alerts.failures(connection, organization_id=self.world.hlf, **which)

    async def retry(
        self, *failure_ids: UUID, engine: AsyncEngine | None = None
    ) -> tuple[int, int, int, int]:
        """
        Press "try again": started, under way, resolved, gone.
        """
        done = await retry.retry(
            engine or self.engine, failure_ids, organization_id=self.world.hlf, actor="someone"
        )
        return done.started, done.under_way, done.resolved, done.gone

    async def events(self) -> dict[str, int]:
        """
        Versions on their way, by mentor.
        """
        rows = await self.world.rows("SELECT key, version FROM outbox.events")
        return {row.key: row.version for row in rows}

    async def deliver(self) -> None:
        """
        Let everything on its way arrive.
        """

        async def arrive(_event: Event, _seconds: float) -> Delivered:
            return Delivered()

        async def nothing(_limit: int | None) -> int:
            return 0

        destination = Destination(
            name="dynamics",
            organization_id=self.world.hlf,
            deliver=arrive,
            record=confirmations.record,
            redrive=nothing,
            policy=DYNAMICS_POLICY,
        )
        await Relay(self.engine, destination).drain()
