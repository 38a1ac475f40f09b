"""
The night runs: when, good or bad, and what each part did; no names in any of it.

A run is noted when it begins, so that one that was killed shows as begun and never ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

KEEP_RUNS = 400
"""Of each organisation: more than a year of nights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NightRun:
    """
    One run.

    Args:
        finished_at, ok, summary: None while it runs, or if it was killed.
        summary: what `hlf-sync nightly --json` printed.
    """

    started_at: datetime
    finished_at: datetime | None
    ok: bool | None
    summary: dict[str, Any] | None


BEGIN = text("""
INSERT INTO outbox.nightly_runs (organization_id) VALUES (:organization_id) RETURNING id
""")

FORGET = text("""
DELETE FROM outbox.nightly_runs
 WHERE organization_id = :organization_id
   AND id <= (SELECT id FROM outbox.nightly_runs
               WHERE organization_id = :organization_id
               ORDER BY id DESC
              OFFSET :keep LIMIT 1)
""")

FINISH = text("""
UPDATE outbox.nightly_runs
   SET finished_at = clock_timestamp(), ok = :ok, summary = CAST(:summary AS jsonb)
 WHERE id = :id
""")

LAST = text("""
SELECT started_at, finished_at, ok, summary
  FROM outbox.nightly_runs
 WHERE organization_id = :organization_id
 ORDER BY id DESC
 LIMIT 1
""")


async def begin(connection: AsyncConnection, *, organization_id: UUID) -> int:
    """
    Note that a run begins, and forget the oldest.

    Returns:
        What `finish` needs.
    """
    run: int = (await connection.execute(BEGIN, {"organization_id": organization_id})).scalar_one()
    await connection.execute(FORGET, {"organization_id": organization_id, "keep": KEEP_RUNS})
    return run


async def finish(
    connection: AsyncConnection, run: int, *, ok: bool, summary: dict[str, Any]
) -> None:
    """
    Note how a run ended.
    """
    await connection.execute(FINISH, {"id": run, "ok": ok, "summary": json.dumps(summary)})


async def last(connection: AsyncConnection, *, organization_id: UUID) -> NightRun | None:
    """
    The organisation's latest run; None if there was none yet.
    """
    rows = await connection.execute(LAST, {"organization_id": organization_id})
    row = rows.mappings().one_or_none()
    return NightRun(**row) if row else None
