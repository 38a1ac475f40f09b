"""
"Try again": make the portal show what it has to show *now*.

Never a replay of what failed: the mentor may have been renewed since. Two people who press
at once cause one send; the failure stays open until Dynamics confirms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
from sqlalchemy import text

from worker.certifications import visibility
from worker.database import reading, transaction
from worker.errors import UnknownFailureError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

log = structlog.get_logger(__name__)

PAGE = 100
"""Mentors to a transaction: locks are held for milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """
    What "try again" came to, in failures.

    Args:
        started: their mentors' state is on its way now.
        under_way: it was already; nothing was added.
        resolved: nothing is left to do.
        gone: nothing can be sent, as the mentor is not this organisation's any more.
    """

    started: int
    under_way: int
    resolved: int
    gone: int


CHOSEN = text("""
SELECT id, mentor_id, certification_id, resolved_at IS NULL AS open
  FROM public.dynamics_sync_failures
 WHERE organization_id = :organization_id AND id = ANY (:failure_ids)
""")

OURS = text("""
SELECT count(*) FROM public.portal_visibility
 WHERE organization_id = :organization_id AND mentor_id = ANY (:mentor_ids)
""")

ALL_OPEN = text("""
SELECT id FROM public.dynamics_sync_failures
 WHERE organization_id = :organization_id AND resolved_at IS NULL
 ORDER BY mentor_id
""")

EVERY_MENTOR = text("""
SELECT mentor_id FROM public.portal_visibility
 WHERE organization_id = :organization_id AND mentor_id > :after
 ORDER BY mentor_id
 LIMIT :limit
""")


async def retry(
    engine: AsyncEngine, failure_ids: Sequence[UUID], *, organization_id: UUID, actor: str
) -> Retried:
    """
    Try these failures again.

    Args:
        actor: who asked, for the log.

    Raises:
        UnknownFailureError: one of them is none of this organisation; nothing was changed.
    """
    async with transaction(engine) as connection:
        rows = await connection.execute(
            CHOSEN, {"organization_id": organization_id, "failure_ids": list(failure_ids)}
        )
        chosen = rows.all()
        if unknown := set(failure_ids) - {row.id for row in chosen}:
            raise UnknownFailureError(
                "There is no such failure: " + ", ".join(sorted(map(str, unknown))) + "."
            )
        causes = {row.mentor_id: row.certification_id for row in chosen if row.open}
        started = await visibility.assert_again(
            connection, list(causes), organization_id=organization_id, certifications=causes
        )
        ours = await connection.scalar(
            OURS, {"organization_id": organization_id, "mentor_ids": list(causes)}
        )
    log.info("failures.retried", actor=actor, mentors=sorted(map(str, started)))
    return Retried(
        started=len(started),
        under_way=ours - len(started),
        resolved=len(chosen) - len(causes),
        gone=len(causes) - ours,
    )


async def retry_all(engine: AsyncEngine, *, organization_id: UUID, actor: str) -> Retried:
    """
    Try every open failure of the organisation again, a page to a transaction.
    """
    async with reading(engine) as connection:
        rows = await connection.execute(ALL_OPEN, {"organization_id": organization_id})
        everything: list[UUID] = list(rows.scalars())
    total = Retried(started=0, under_way=0, resolved=0, gone=0)
    for start in range(0, len(everything), PAGE):
        page = await retry(
            engine,
            everything[start : start + PAGE],
            organization_id=organization_id,
            actor=actor,
        )
        total = Retried(
            started=total.started + page.started,
            under_way=total.under_way + page.under_way,
            resolved=total.resolved + page.resolved,
            gone=total.gone + page.gone,
        )
    return total


async def resync(engine: AsyncEngine, *, organization_id: UUID) -> AsyncIterator[tuple[int, int]]:
    """
    Assert every mentor's state again; yields (mentors seen, states enqueued) of each page.
    """
    after = UUID(int=0)
    while True:
        async with transaction(engine) as connection:
            rows = await connection.execute(
                EVERY_MENTOR, {"organization_id": organization_id, "after": after, "limit": PAGE}
            )
            page: list[UUID] = list(rows.scalars())
            if not page:
                return
            after = page[-1]
            enqueued = await visibility.assert_again(
                connection, page, organization_id=organization_id
            )
        yield len(page), len(enqueued)
