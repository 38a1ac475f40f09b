"""
Reconciliation: whatever hand changed a certification, the portal comes to show it.

An application that writes a table directly, a backup that was restored, a row that was deleted:
none of them goes the way of a transition, so what follows from the change is missing. Here it
is looked for, and made up for by the ordinary transition. Each mentor is looked at once more
under the lock, so that of several who reconcile at once one does it.

    missing        certifications, but nothing says what the portal has to show
    visibility     what the portal has to show is not what the certifications say
    pauses         an expired certification without its automatic pause, or the reverse
    unconfirmed    the portal did not confirm, and neither an event nor a failure says why

What has run out and is still valid is no drift; `expire_all` is about to find it.
"""

from __future__ import annotations

import asyncio
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InterfaceError

from worker.certifications import pauses, visibility
from worker.certifications.transitions import (
    GIVE_WAY,
    LOCK_NOT_AVAILABLE,
    PATIENCE_MILLISECONDS,
    date_in,
)
from worker.database import TRANSACTION_SECONDS, reading, single_statements, transaction
from worker.wakeup import Notifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
    from datetime import date

    from sqlalchemy import Row, TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

log = structlog.get_logger(__name__)

PAGE = 1000
"""Mentors in one transaction."""

LOOK = 20 * PAGE
"""Mentors that one look brings at most; it may have to read whole tables for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """
    What was found and made up for, in mentors; one may count under several kinds.

    Args:
        missing, visibility, pauses, unconfirmed: see the module.
        skipped: of other organisations; brought in line, and nothing is sent for them.
        held: somebody else was at work on them; they are looked at again next time.
        failed: the database refused; each is in the log.
    """

    missing: int = 0
    visibility: int = 0
    pauses: int = 0
    unconfirmed: int = 0
    skipped: int = 0
    held: int = 0
    failed: int = 0

    def __add__(self, other: Reconciled) -> Reconciled:
        names = self.__slots__
        sums = map(sum, zip(astuple(self), astuple(other), strict=True))
        return Reconciled(**dict(zip(names, sums, strict=True)))


# What `status` says decides; a date that has passed is the business of expire.
_ASTRAY = """
WITH certified AS (
    SELECT mentor_id,
           bool_and(status = 'valid') AS visible,
           bool_or(status = 'valid' AND expires_on < :today) AS running_out
      FROM public.certifications
     WHERE mentor_id {among}
     GROUP BY mentor_id
),
-- By sets and not by joins: these are hashed however many the planner believes there are.
expired AS (
    SELECT mentor_id, id AS certification_id
      FROM public.certifications
     WHERE mentor_id {among} AND status = 'expired'
),
paused AS (
    SELECT mentor_id, certification_id
      FROM public.mentor_pauses
     WHERE mentor_id {among} AND reason = 'certification_expired' AND resumed_at IS NULL
),
unequal AS (
    (TABLE expired EXCEPT TABLE paused) UNION ALL (TABLE paused EXCEPT TABLE expired)
),
astray AS (
    SELECT mentor.id AS mentor_id,
           desired.mentor_id IS NULL AS missing,
           -- Whoever has no certification at all is not certified.
           desired.visible <> coalesce(certified.visible, false)
           OR mentor.organization_id = :organization_id
              AND desired.organization_id <> mentor.organization_id AS visibility,
           mentor.id IN (SELECT mentor_id FROM unequal) AS pauses
      FROM public.mentors AS mentor
      LEFT JOIN certified ON certified.mentor_id = mentor.id
      LEFT JOIN public.portal_visibility AS desired ON desired.mentor_id = mentor.id
     WHERE mentor.id {among}
       AND certified.running_out IS NOT TRUE
       AND (desired.mentor_id IS NOT NULL OR certified.mentor_id IS NOT NULL)
)
SELECT mentor_id, missing, coalesce(visibility, false) AS visibility, pauses
  FROM astray
 WHERE missing OR visibility OR pauses
 ORDER BY mentor_id
 LIMIT :page
"""

# An event or a failure says it only if it is of this very version. By sets again: of events and
# failures there are none at one moment, and as many as mentors at the next.
_UNCONFIRMED = """
WITH unconfirmed AS (
    SELECT desired.mentor_id, desired.version, desired.visible,
           -- What was confirmed of a later version stands in the way of every one to come.
           coalesce(confirmed.version > desired.version, false) AS overtaken
      FROM public.portal_visibility AS desired
      JOIN public.mentors AS mentor
        ON mentor.id = desired.mentor_id AND mentor.organization_id = desired.organization_id
      LEFT JOIN public.portal_confirmations AS confirmed
        ON confirmed.mentor_id = desired.mentor_id
     WHERE desired.mentor_id {among}
       AND desired.organization_id = :organization_id
       AND (confirmed.version, confirmed.visible)
           IS DISTINCT FROM (desired.version, desired.visible)
),
unheard (key, version, visible) AS (
    SELECT CAST(mentor_id AS text), version, to_jsonb(visible) FROM unconfirmed WHERE NOT overtaken
    EXCEPT
    SELECT key, version, payload -> 'visible'
      FROM outbox.events
     WHERE destination = 'dynamics' AND {among_keys}
    EXCEPT
    SELECT CAST(mentor_id AS text), version, to_jsonb(visible)
      FROM public.dynamics_sync_failures
     WHERE resolved_at IS NULL AND mentor_id {among}
)
SELECT mentor_id FROM unconfirmed WHERE overtaken
 UNION
SELECT CAST(key AS uuid) FROM unheard
 ORDER BY mentor_id
 LIMIT :page
"""

_AFTER, _THESE = "> :after", "= ANY (:mentor_ids)"

ASTRAY = text(_ASTRAY.format(among=_AFTER))
STILL_ASTRAY = text(_ASTRAY.format(among=_THESE))
UNCONFIRMED = text(_UNCONFIRMED.format(among=_AFTER, among_keys="true"))
STILL_UNCONFIRMED = text(
    _UNCONFIRMED.format(
        among=_THESE, among_keys="key = ANY (CAST(CAST(:mentor_ids AS uuid[]) AS text[]))"
    )
)


class ReconciliationService:
    """
    Brings what follows from certifications in line with them.

    Args:
        organization_id: whose portal is kept in step; for the mentors of others nothing is sent.
        timezone: in which a certification's last valid day ends.
    """

    def __init__(self, engine: AsyncEngine, *, organization_id: UUID, timezone: str) -> None:
        self._engine = engine
        self._notify = Notifier(engine)
        self._organization_id = organization_id
        self._timezone = timezone

    async def aclose(self) -> None:
        """
        Wake the workers for what was committed last, if they have not been told yet.
        """
        await self._notify.aclose()

    async def reconcile_all(self, *, today: date | None = None) -> AsyncIterator[Reconciled]:
        """
        Look for every drift and make up for it, a page to a transaction; yields each page.

        Passes over whomever somebody else holds. Where the database refuses a page, its mentors
        are done in halves, down to the one who is the reason. Safe to run twice at once and to
        stop anywhere.

        Args:
            today: as in `expire_all`.

        Raises:
            DBAPIError, TimeoutError: the database is away.
        """
        if today is None:
            async with reading(self._engine) as connection:
                today = await date_in(connection, self._timezone)
        for find, mend in ((ASTRAY, self._bring_in_line), (UNCONFIRMED, self._say_again)):
            after: UUID | None = UUID(int=0)
            while after is not None:
                found = await self._found(find, today, after=after)
                after = found[-1] if len(found) == LOOK else None
                for start in range(0, len(found), PAGE):
                    yield await self._page(found[start : start + PAGE], today, mend)

    async def _found(self, find: TextClause, today: date, *, after: UUID) -> Sequence[UUID]:
        # A look at everything may take longer than what a person waits for.
        async with (
            asyncio.timeout(TRANSACTION_SECONDS),
            single_statements(self._engine) as connection,
        ):
            rows = await connection.execute(find, self._where(today) | {"after": after})
            return rows.scalars().all()

    async def _page(
        self,
        mentor_ids: Sequence[UUID],
        today: date,
        mend: Callable[[AsyncConnection, Sequence[UUID], date], Coroutine[None, None, Reconciled]],
    ) -> Reconciled:
        """
        Mend these, all together; if that fails for one's own fault, in halves.
        """
        try:
            async with transaction(self._engine) as connection:
                await connection.execute(GIVE_WAY, {"patience": f"{PATIENCE_MILLISECONDS}ms"})
                done = await mend(connection, mentor_ids, today)
        except DBAPIError as error:
            if error.connection_invalidated or isinstance(error, InterfaceError):
                raise
            if len(mentor_ids) == 1:
                return _refused(error, mentor_ids[0])
        else:
            self._notify()
            return done
        half = len(mentor_ids) // 2
        first = await self._page(mentor_ids[:half], today, mend)
        return first + await self._page(mentor_ids[half:], today, mend)

    async def _bring_in_line(
        self, connection: AsyncConnection, mentor_ids: Sequence[UUID], today: date
    ) -> Reconciled:
        """
        The ordinary transition, of mentors whose certifications say something else.
        """
        new = await visibility.make_missing(connection, mentor_ids)
        free = await visibility.lock_free(connection, mentor_ids)
        astray = await self._still(connection, STILL_ASTRAY, [*free], today)
        drifts = [row for row in astray if row.mentor_id not in new]
        changing = [*new, *(row.mentor_id for row in drifts)]
        held = len({*mentor_ids} - free)
        if not changing:
            return Reconciled(held=held)
        # Who is new has a version already, that of the row.
        await visibility.draw_above(connection, [row.mentor_id for row in drifts])
        await pauses.align_automatic(connection, changing)
        wanted = await visibility.decide(connection, changing, today=today)
        uncertified = {*changing} - {one.mentor_id for one in wanted}
        wanted += await visibility.hide_uncertified(connection, uncertified)
        skipped = await visibility.announce(
            connection, wanted, organization_id=self._organization_id, certifications={}
        )
        return Reconciled(
            missing=len(new),
            visibility=sum(row.visibility for row in drifts),
            pauses=sum(row.pauses for row in astray),
            skipped=skipped,
            held=held,
        )

    async def _say_again(
        self, connection: AsyncConnection, mentor_ids: Sequence[UUID], today: date
    ) -> Reconciled:
        """
        What the portal has to show stands, only nobody is about to tell it.
        """
        free = await visibility.lock_free(connection, mentor_ids)
        found = await self._still(connection, STILL_UNCONFIRMED, [*free], today)
        wanted = await visibility.draw_above(connection, [row.mentor_id for row in found])
        await visibility.announce(
            connection, wanted, organization_id=self._organization_id, certifications={}
        )
        return Reconciled(unconfirmed=len(wanted), held=len({*mentor_ids} - free))

    async def _still(
        self, connection: AsyncConnection, find: TextClause, mentor_ids: list[UUID], today: date
    ) -> Sequence[Row[Any]]:
        """
        Those of these mentors of whom it is still true, now that they are locked.
        """
        rows = await connection.execute(find, self._where(today) | {"mentor_ids": mentor_ids})
        return rows.all()

    def _where(self, today: date) -> dict[str, Any]:
        return {"organization_id": self._organization_id, "today": today, "page": LOOK}


def _refused(error: DBAPIError, mentor_id: UUID) -> Reconciled:
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate == LOCK_NOT_AVAILABLE:
        return Reconciled(held=1)
    log.error("reconciliation.refused", mentor_id=str(mentor_id), sqlstate=sqlstate)
    return Reconciled(failed=1)
