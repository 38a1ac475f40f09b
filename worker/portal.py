"""
The portal as a destination of the outbox: where events, Dynamics and confirmations meet.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, cast
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import text
from tenacity import wait_exponential

from outbox import Destination, LookUp, RetryPolicy
from worker.certifications import confirmations, visibility
from worker.database import TRANSACTION_SECONDS, reading
from worker.dynamics.service import HLFDynamicsSyncService, MentorLink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Delivered, Event, Skipped
    from worker.dynamics.service import VisibilityWriter
    from worker.settings import Settings

    _Found = tuple[UUID, UUID | None] | None

DYNAMICS_POLICY = RetryPolicy(
    max_attempts=4,
    wait=wait_exponential(multiplier=1),  # 1 s, 2 s, 4 s
    window_seconds=15,
)
"""The first attempt and up to 3 retries, 1 s, 2 s and 4 s apart, within 15 s in all."""

REDRIVE_PAGE = 100
"""Mentors whose state is enqueued again in one transaction."""

MENTOR = text("SELECT organization_id, dynamics_id FROM public.mentors WHERE id = :mentor_id")

LINK = LookUp(
    sql="""
SELECT ARRAY[mentor.organization_id, mentor.dynamics_id]
  FROM public.mentors AS mentor
 WHERE mentor.id = CAST(claimed.key AS uuid)
"""
)
"""The mentor's link to Dynamics; it may have been made after the event."""

RECOVERABLE = text("""
SELECT failure.mentor_id, failure.certification_id
  FROM public.dynamics_sync_failures AS failure
 WHERE failure.organization_id = :organization_id
   AND failure.resolved_at IS NULL
   AND failure.recoverable
   AND failure.mentor_id > :after
   -- OFFSET is a fence: looked up for one after the other, however few events there seem to be.
   AND NOT EXISTS (SELECT FROM outbox.events AS live
                    WHERE live.destination = 'dynamics'
                      AND live.key = CAST(failure.mentor_id AS text)
                   OFFSET 0)
 ORDER BY failure.mentor_id
 LIMIT :limit
""")


def destination(engine: AsyncEngine, writer: VisibilityWriter, settings: Settings) -> Destination:
    """
    HLF's portal, for a relay.

    Args:
        writer: of single values, or of many together; then it is given as many at once.
    """
    service = HLFDynamicsSyncService(
        writer,
        organization_id=settings.organization_id,
        find_mentor=partial(find_mentor, engine),
    )
    organization_id = settings.organization_id

    async def redrive(limit: int | None) -> int:
        return await redrive_recoverable(engine, organization_id=organization_id, limit=limit)

    return Destination(
        name=visibility.DESTINATION,
        organization_id=organization_id,
        deliver=_deliverer(service),
        look_up=LINK,
        record=confirmations.record,
        redrive=redrive,
        policy=DYNAMICS_POLICY,
        concurrency=settings.concurrency * settings.batch,
        attempt_seconds=settings.request_seconds,
        lease_seconds=settings.lease_seconds,
        names=lambda event: {"mentor_id": event.key},
    )


def _deliverer(
    service: HLFDynamicsSyncService,
) -> Callable[[Event, float], Awaitable[Delivered | Skipped]]:
    async def deliver(event: Event, seconds: float) -> Delivered | Skipped:
        return await service.show(
            UUID(event.key),
            _link(cast("_Found", event.found)),
            visible=event.payload["visible"],
            seconds=seconds,
            correlation_id=correlation_id(event),
        )

    return deliver


def _link(found: _Found) -> MentorLink | None:
    if found is None:
        return None
    organization_id, dynamics_id = found
    return MentorLink(organization_id=organization_id, dynamics_id=dynamics_id)


def correlation_id(event: Event) -> UUID:
    """
    The same for every attempt at one version, so that both sides' logs can be joined.
    """
    return uuid5(NAMESPACE_URL, f"outbox:{event.destination}/{event.key}/{event.version}")


async def find_mentor(engine: AsyncEngine, mentor_id: UUID) -> MentorLink | None:
    """
    The link of one mentor to Dynamics, as it is now; None if there is no such mentor.
    """
    async with reading(engine) as connection:
        found = (await connection.execute(MENTOR, {"mentor_id": mentor_id})).one_or_none()
    if found is None:
        return None
    return MentorLink(organization_id=found.organization_id, dynamics_id=found.dynamics_id)


async def redrive_recoverable(
    engine: AsyncEngine, *, organization_id: UUID, limit: int | None = None
) -> int:
    """
    Enqueue the current state of mentors whose delivery died of something that passes.

    Args:
        limit: mentors at most; None means all.

    Returns:
        How many were enqueued. Their failures stay open until Dynamics confirms.
    """
    enqueued, after = 0, UUID(int=0)
    while limit is None or enqueued < limit:
        page = REDRIVE_PAGE if limit is None else min(REDRIVE_PAGE, limit - enqueued)
        # Doing it twice is harmless, so a COMMIT without an answer is no riddle here.
        async with asyncio.timeout(TRANSACTION_SECONDS), engine.begin() as connection:
            rows = await connection.execute(
                RECOVERABLE, {"organization_id": organization_id, "after": after, "limit": page}
            )
            found: dict[UUID, UUID | None] = {row[0]: row[1] for row in rows}
            if not found:
                break
            after = max(found)
            enqueued += len(
                await visibility.assert_again(
                    connection,
                    list(found),
                    organization_id=organization_id,
                    certifications=found,
                )
            )
    return enqueued
