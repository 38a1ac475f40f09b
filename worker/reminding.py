"""
Reminders as a destination of the outbox: where events meet the webhook.

A reminder is decided when it is enqueued, and looked at once more when it is claimed: what was
renewed, has run out or is paused meanwhile is withdrawn, not sent.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqlalchemy import text
from tenacity import wait_exponential

from outbox import Delivered, Destination, LookUp, NewEvent, RetryPolicy, Skipped, enqueue
from worker.certifications.reminders import DESTINATION
from worker.database import TRANSACTION_SECONDS
from worker.webhook import FINAL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from outbox import Event, Settlement
    from worker.settings import Settings
    from worker.webhook import ReminderWebhook

REMINDER_POLICY = RetryPolicy(
    max_attempts=10,
    wait=wait_exponential(multiplier=10, max=3600),  # 10 s, 20 s, 40 s, … 43 min
    window_seconds=7 * 86_400,
)
"""Ten attempts within an hour and a half. Nobody waits for a reminder, so no window ends them."""

CONCURRENCY = 8
"""Requests to the webhook at once, from this process."""

POLL_SECONDS = 10.0
"""A reminder has days; whoever enqueues one wakes the worker anyway."""

REDRIVE_DAYS = 7
"""What died longer ago has been overtaken by a nearer threshold, or soon is."""

REDRIVE_PAGE = 100
"""Reminders that are enqueued again in one transaction."""

_STILL_WANTED = """
       certification.status = 'valid'
   AND certification.expires_on >= CAST(now() AT TIME ZONE :timezone AS date)
   AND mentor.organization_id = :organization_id
   AND NOT EXISTS (SELECT FROM public.mentor_pauses AS pause
                    WHERE pause.mentor_id = mentor.id AND pause.resumed_at IS NULL)
"""

# Who may enqueue may enqueue nonsense: it must not be in the way of what is claimed with it.
WANTED = f"""
SELECT true
  FROM public.certifications AS certification
  JOIN public.mentors AS mentor ON mentor.id = certification.mentor_id
 WHERE certification.id =
       CASE WHEN claimed.key ~ '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$'
            THEN CAST(claimed.key AS uuid) END
   AND claimed.payload ->> 'certification_id' = claimed.key
   AND claimed.payload ->> 'expires_on' = to_char(certification.expires_on, 'YYYY-MM-DD')
   AND {_STILL_WANTED}
"""  # noqa: S608 (nothing from outside)

# What was given up says so in the history alone. The last word on a reminder counts. OFFSET is a
# fence: looked up for one after the other, however few seem to be given up.
RECOVERABLE = text(f"""
WITH dead AS MATERIALIZED (
    SELECT id, key, version, payload
      FROM outbox.settled AS dead
     WHERE outcome = 'dead'
       AND settled_at > now() - make_interval(days => :days)
       AND destination = 'reminders'
       AND organization_id = :organization_id
       AND error_code <> ALL (:final)
       AND id > :after
       AND NOT EXISTS (SELECT FROM outbox.settled AS later
                        WHERE later.destination = dead.destination
                          AND later.key = dead.key
                          AND later.version >= dead.version
                          AND later.id > dead.id
                       OFFSET 0)
       AND NOT EXISTS (SELECT FROM outbox.events AS live
                        WHERE live.destination = dead.destination AND live.key = dead.key
                       OFFSET 0)
)
SELECT dead.id, dead.key, dead.version, dead.payload
  FROM dead
 CROSS JOIN LATERAL (
       SELECT mentor_id, status, expires_on FROM public.certifications
        WHERE id = CAST(dead.key AS uuid)
          AND expires_on = CAST(dead.payload ->> 'expires_on' AS date)
       OFFSET 0) AS certification
  JOIN public.mentors AS mentor ON mentor.id = certification.mentor_id
 WHERE {_STILL_WANTED}
 ORDER BY dead.id
 LIMIT :limit
""")  # noqa: S608 (nothing from outside)


def destination(engine: AsyncEngine, webhook: ReminderWebhook, settings: Settings) -> Destination:
    """
    The webhook of this organisation's reminders, for a relay.
    """

    async def redrive(limit: int | None) -> int:
        return await redrive_recoverable(
            engine,
            organization_id=settings.organization_id,
            timezone=settings.timezone,
            limit=limit,
        )

    return Destination(
        name=DESTINATION,
        organization_id=settings.organization_id,
        deliver=_deliverer(webhook),
        look_up=LookUp(sql=WANTED, parameters={"timezone": settings.timezone}),
        record=_record,
        redrive=redrive,
        policy=REMINDER_POLICY,
        concurrency=CONCURRENCY,
        attempt_seconds=settings.request_seconds,
        lease_seconds=settings.lease_seconds,
        # It is no state: an old request that lands late does no harm, and the receiver knows it.
        doubt_seconds=0,
        poll_seconds=max(POLL_SECONDS, settings.poll_seconds),
        names=_names,
    )


def _names(event: Event) -> dict[str, object]:
    return {"mentor_id": event.payload.get("mentor_id"), "certification_id": event.key}


def _deliverer(
    webhook: ReminderWebhook,
) -> Callable[[Event, float], Awaitable[Delivered | Skipped]]:
    async def deliver(event: Event, seconds: float) -> Delivered | Skipped:
        if not event.found:
            return Skipped(reason="withdrawn")
        await webhook.send(event.payload, enqueued_at=event.created_at, seconds=seconds)
        return Delivered()

    return deliver


async def _record(_connection: AsyncConnection, _settlements: Sequence[Settlement]) -> None:
    """
    The history says it all: a reminder that was given up is nothing about Dynamics.
    """


async def redrive_recoverable(
    engine: AsyncEngine, *, organization_id: UUID, timezone: str, limit: int | None = None
) -> int:
    """
    Enqueue again what was given up in the last days for a cause that passes, and is still wanted.

    Args:
        limit: reminders at most; None means all.

    Returns:
        How many were enqueued.
    """
    enqueued, after = 0, 0
    while limit is None or enqueued < limit:
        page = REDRIVE_PAGE if limit is None else min(REDRIVE_PAGE, limit - enqueued)
        # Doing it twice is harmless, so a COMMIT without an answer is no riddle here.
        async with asyncio.timeout(TRANSACTION_SECONDS), engine.begin() as connection:
            rows = (
                await connection.execute(
                    RECOVERABLE,
                    {
                        "organization_id": organization_id,
                        "timezone": timezone,
                        "days": REDRIVE_DAYS,
                        "final": [*FINAL, "abandoned"],
                        "after": after,
                        "limit": page,
                    },
                )
            ).all()
            if not rows:
                break
            after = rows[-1].id
            await enqueue(
                connection,
                [
                    NewEvent(
                        destination=DESTINATION,
                        key=row.key,
                        organization_id=organization_id,
                        version=row.version,
                        payload=row.payload,
                    )
                    for row in rows
                ],
            )
            enqueued += len(rows)
    return enqueued
