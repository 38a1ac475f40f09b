"""
"Try again": make the portal show what it has to show *now*.

Never a replay of what failed: the mentor may have been renewed since. Two people who press
at once cause one send; the failure stays open until Dynamics confirms.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import structlog
from sqlalchemy import text

from worker.certifications import visibility
from worker.database import reading, transaction
from worker.errors import UnknownFailureError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    Record = Callable[[AsyncConnection, Sequence["Answer"]], Awaitable[None]]

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


Outcome = Literal["started", "under_way", "resolved", "gone"]
"""Of one failure; the words of `Retried`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """
    What "try again" came to for one failure.
    """

    failure_id: UUID
    mentor_id: UUID
    outcome: Outcome


CHOSEN = text("""
SELECT id, mentor_id, certification_id, resolved_at IS NULL AS open
  FROM public.dynamics_sync_failures
 WHERE organization_id = :organization_id AND id = ANY (:failure_ids)
""")

OURS = text("""
SELECT mentor_id FROM public.portal_visibility
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
    engine: AsyncEngine,
    failure_ids: Sequence[UUID],
    *,
    organization_id: UUID,
    actor: str,
    record: Record | None = None,
) -> Retried:
    """
    Try these failures again.

    Args:
        actor: who asked, for the log.
        record: writes down what it came to, in the same transaction.

    Raises:
        UnknownFailureError: one of them is none of this organisation; nothing was changed.
    """
    async with transaction(engine) as connection:
        answers = await _try_again(connection, failure_ids, organization_id=organization_id)
        if record is not None:
            await record(connection, answers)
    started = [str(one.mentor_id) for one in answers if one.outcome == "started"]
    log.info("failures.retried", actor=actor, mentors=sorted(started))
    return _counted(answers)


async def _try_again(
    connection: AsyncConnection, failure_ids: Sequence[UUID], *, organization_id: UUID
) -> list[Answer]:
    which = {"organization_id": organization_id, "failure_ids": list(failure_ids)}
    chosen = (await connection.execute(CHOSEN, which)).all()
    if unknown := set(failure_ids) - {row.id for row in chosen}:
        raise UnknownFailureError(
            "There is no such failure: " + ", ".join(sorted(map(str, unknown))) + "."
        )
    causes = {row.mentor_id: row.certification_id for row in chosen if row.open}
    started = await visibility.assert_again(
        connection,
        list(causes),
        organization_id=organization_id,
        certifications=causes,
        failing=True,
    )
    rows = await connection.execute(
        OURS, {"organization_id": organization_id, "mentor_ids": list(causes)}
    )
    ours = set(rows.scalars())

    def outcome(mentor_id: UUID, *, still_open: bool) -> Outcome:
        if not still_open:
            return "resolved"
        if mentor_id in started:
            return "started"
        return "under_way" if mentor_id in ours else "gone"

    # Once more: the worker may have delivered while we waited for a lock.
    return [
        Answer(
            failure_id=row.id,
            mentor_id=row.mentor_id,
            outcome=outcome(row.mentor_id, still_open=row.open),
        )
        for row in await connection.execute(CHOSEN, which)
    ]


def _counted(answers: Sequence[Answer]) -> Retried:
    count = Counter(one.outcome for one in answers)
    return Retried(
        started=count["started"],
        under_way=count["under_way"],
        resolved=count["resolved"],
        gone=count["gone"],
    )


async def retry_all(
    engine: AsyncEngine, *, organization_id: UUID, actor: str, record: Record | None = None
) -> Retried:
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
            record=record,
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
