"""
What Dynamics acknowledged, and what failed: written by the worker, in the transaction that
settles the events, and only after their rows are locked.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from outbox import driver
from outbox.outcome import Dead
from worker.database import single_statements

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from outbox import Settlement

CONFIRM = text("""
WITH delivered AS MATERIALIZED (
    SELECT *
      FROM jsonb_to_recordset(CAST(:delivered AS jsonb))
           AS delivered (mentor_id uuid, organization_id uuid, visible boolean, version bigint)
),
confirmed AS (
    INSERT INTO public.portal_confirmations AS confirmed
           (mentor_id, organization_id, visible, version)
    SELECT mentor_id, organization_id, visible, version
      FROM delivered
     ORDER BY mentor_id
        ON CONFLICT (mentor_id) DO UPDATE
       SET organization_id = excluded.organization_id,
           visible = excluded.visible,
           version = excluded.version,
           confirmed_at = excluded.confirmed_at
     WHERE confirmed.version <= excluded.version
)
UPDATE public.dynamics_sync_failures AS failure
   SET resolved_at = now(),
       resolution = CASE WHEN failure.visible = delivered.visible
                         THEN 'delivered' ELSE 'superseded' END
  FROM delivered
 -- The array is a fence: of a table that it takes for empty the planner would read all of it.
 WHERE failure.mentor_id = ANY (ARRAY (SELECT mentor_id FROM delivered))
   AND failure.mentor_id = delivered.mentor_id
   AND failure.resolved_at IS NULL
   AND failure.version <= delivered.version
""")

FAIL = text("""
INSERT INTO public.dynamics_sync_failures AS failure
       (organization_id, mentor_id, certification_id, visible, version,
        error_code, error_message, retry_count, recoverable)
SELECT organization_id, mentor_id, certification_id, visible, version,
       error_code, error_message, retry_count, recoverable
  FROM jsonb_to_recordset(CAST(:dead AS jsonb))
       AS dead (organization_id uuid, mentor_id uuid, certification_id uuid, visible boolean,
                version bigint, error_code text, error_message text, retry_count integer,
                recoverable boolean)
 ORDER BY mentor_id
    ON CONFLICT (mentor_id) WHERE resolved_at IS NULL DO UPDATE
   SET organization_id = excluded.organization_id,
       certification_id = excluded.certification_id,
       visible = excluded.visible,
       version = excluded.version,
       attempted_at = excluded.attempted_at,
       error_code = excluded.error_code,
       error_message = excluded.error_message,
       retry_count = excluded.retry_count,
       recoverable = excluded.recoverable
 WHERE failure.version <= excluded.version
""")


async def record(connection: AsyncConnection, settlements: Sequence[Settlement]) -> None:
    """
    Write confirmations and failures for what was just settled.

    A delivery confirms its version (only forward) and closes the mentor's open failures. A
    dead event opens one, or updates the one that is open.
    """
    delivered = [_confirmation(one) for one in settlements if one.ending == "delivered"]
    dead = [
        _failure(one, one.outcome)
        for one in settlements
        if isinstance(one.outcome, Dead) and one.ending == "dead"
    ]
    if delivered:
        await driver.execute(connection, CONFIRM, {"delivered": json.dumps(delivered)})
    if dead:
        await connection.execute(FAIL, {"dead": json.dumps(dead)})


def _confirmation(settlement: Settlement) -> dict[str, Any]:
    return {
        "mentor_id": settlement.key,
        "organization_id": str(settlement.organization_id),
        "visible": settlement.payload["visible"],
        "version": settlement.version,
    }


def _failure(settlement: Settlement, outcome: Dead) -> dict[str, Any]:
    return _confirmation(settlement) | {
        "certification_id": settlement.payload.get("certification_id"),
        "error_code": outcome.code,
        "error_message": outcome.message,
        "retry_count": settlement.retries,
        "recoverable": outcome.recoverable,
    }


# ------------------------------------------------------------------------------- waiting

PROGRESS = text("""
SELECT coalesce((SELECT confirmed.version >= :version
                   FROM public.portal_confirmations AS confirmed
                  WHERE confirmed.mentor_id = :mentor_id), false) AS delivered,
       EXISTS (SELECT FROM outbox.events AS live
                WHERE live.destination = 'dynamics' AND live.key = :key) AS waiting,
       coalesce((SELECT live.last_error_code FROM outbox.events AS live
                  WHERE live.destination = 'dynamics' AND live.key = :key),
                (SELECT failure.error_code FROM public.dynamics_sync_failures AS failure
                  WHERE failure.mentor_id = :mentor_id AND failure.resolved_at IS NULL))
           AS error_code
""")

Progress = Literal["delivered", "pending", "failed"]

FIRST_LOOK_SECONDS = 0.02
SLOWEST_LOOK_SECONDS = 0.25
SHORTEST_LOOK_SECONDS = 0.5
"""How long one look may take, also when the time is over."""


async def wait_for(
    engine: AsyncEngine, *, mentor_id: UUID, version: int, seconds: float
) -> tuple[Progress, str | None]:
    """
    Wait until the portal has this version or a newer one, or it failed, or time is over.

    Looks at the rows again and again, so no wake-up can be missed. Also returns the error
    code of the last attempt, if it failed.
    """
    ends_at = time.monotonic() + seconds
    pause = FIRST_LOOK_SECONDS
    while True:
        try:
            async with asyncio.timeout(max(SHORTEST_LOOK_SECONDS, ends_at - time.monotonic())):
                progress, code = await _look(engine, mentor_id, version)
        except (SQLAlchemyError, OSError, TimeoutError):
            # The change is saved whatever happens to our looking, so nothing else is known.
            progress, code = "pending", None
        left = ends_at - time.monotonic()
        if progress != "pending" or left <= 0:
            return progress, code
        await asyncio.sleep(min(pause, left))
        pause = min(SLOWEST_LOOK_SECONDS, pause * 2)


async def _look(engine: AsyncEngine, mentor_id: UUID, version: int) -> tuple[Progress, str | None]:
    async with single_statements(engine) as connection:
        row = (
            await connection.execute(
                PROGRESS, {"mentor_id": mentor_id, "key": str(mentor_id), "version": version}
            )
        ).one()
    if row.delivered:
        return "delivered", None
    return ("pending" if row.waiting else "failed"), row.error_code
