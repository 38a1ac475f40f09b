"""
Reminders: a mentor is told once for each threshold and certification period that the
certification runs out.

    days left          61   60 … 31   30 … 8   7 … 0   -1
    nearest threshold   –        60       30       7     –     of 60, 30 and 7

Only the nearest threshold is sent. The larger ones are noted with it as passed, so a run that
was missed for days sends one reminder and not several. What decides is the upsert on
`cert_notification_log`: the row that it returns is the permission to send, and the event is
enqueued in the same transaction. Whoever comes second gets no row, and skips.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sqlalchemy import text

from outbox import NewEvent, enqueue
from worker.certifications.transitions import TODAY
from worker.database import reading, transaction
from worker.tracing import current_traceparent
from worker.wakeup import Notifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

DESTINATION = "reminders"
"""The outbox's name of the webhook; the key of its events is the certification's id."""

PAGE = 1000
"""Certifications that are looked at in one transaction."""

LONGEST_THRESHOLD_DAYS = 999
"""So that a version has room for the threshold beside the day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reminded:
    """
    One page of a run.

    Args:
        enqueued: reminders that are on their way now.
        by_threshold: of which threshold how many, in days.
        skipped: certifications of other organisations that have reached a threshold.
    """

    enqueued: int
    by_threshold: Mapping[int, int] = field(default_factory=dict)
    skipped: int


class _Place(NamedTuple):
    """
    A certification's place in the order in which pages go through them.
    """

    day: date
    mentor_id: UUID
    certification_id: UUID


_BEFORE_ALL = _Place(date.min, UUID(int=0), UUID(int=0))

# What was noted before is left out first: a second run reads, and locks nothing. A live event
# of a later day is about to be withdrawn, and would not let go of its place before. Each
# question is a subquery that the planner cannot turn into a join: of what a page holds it
# expects one row where there are a thousand.
REMIND_PAGE = text("""
WITH page AS MATERIALIZED (
    SELECT id, mentor_id, expires_on
      FROM public.certifications
     WHERE status = 'valid'
       AND expires_on >= CAST(:today AS date)
       AND expires_on <= CAST(:today AS date) + CAST(:longest AS integer)
       AND (expires_on, mentor_id, id) > (:after_day, :after_mentor, :after_certification)
     ORDER BY expires_on, mentor_id, id
     LIMIT :page
),
due AS MATERIALIZED (
    SELECT id, mentor_id, expires_on,
           (SELECT mentor.organization_id FROM public.mentors AS mentor
             WHERE mentor.id = page.mentor_id) = :organization_id AS ours,
           (SELECT min(days) FROM unnest(CAST(:thresholds AS integer[])) AS days
             WHERE days >= page.expires_on - CAST(:today AS date)) AS nearest
      FROM page
     WHERE (SELECT min(pause.paused_at) FROM public.mentor_pauses AS pause
             WHERE pause.mentor_id = page.mentor_id AND pause.resumed_at IS NULL) IS NULL
),
wanted AS MATERIALIZED (
    SELECT id, mentor_id, expires_on, nearest
      FROM due
     WHERE ours
       AND coalesce((SELECT min(known.threshold_days)
                       FROM public.cert_notification_log AS known
                      WHERE known.mentor_id = due.mentor_id
                        AND known.cert_id = due.id
                        AND known.expires_on = due.expires_on) > nearest, true)
       AND coalesce((SELECT max(CAST(live.payload ->> 'expires_on' AS date))
                       FROM outbox.events AS live
                      WHERE live.destination = 'reminders'
                        AND live.key = CAST(due.id AS text)) <= expires_on, true)
),
noted AS (
    INSERT INTO public.cert_notification_log AS noted
           (mentor_id, threshold_days, cert_id, expires_on)
    SELECT wanted.mentor_id, days, wanted.id, wanted.expires_on
      FROM wanted, unnest(CAST(:thresholds AS integer[])) AS days
     WHERE days >= wanted.nearest
     ORDER BY wanted.mentor_id, wanted.id, days
        ON CONFLICT (mentor_id, threshold_days, cert_id) DO UPDATE
       SET expires_on = excluded.expires_on,
           notified_at = excluded.notified_at
     WHERE noted.expires_on IS DISTINCT FROM excluded.expires_on
    RETURNING mentor_id, threshold_days, cert_id, expires_on,
              threshold_days = (SELECT min(days)
                                  FROM unnest(CAST(:thresholds AS integer[])) AS days
                                 WHERE days >= noted.expires_on - CAST(:today AS date)) AS nearest
)
SELECT last.expires_on AS last_day, last.mentor_id AS last_mentor, last.id AS last_certification,
       (SELECT count(*) FROM due WHERE NOT ours) AS skipped,
       noted.cert_id, noted.mentor_id, noted.expires_on, noted.threshold_days
  FROM (SELECT * FROM page ORDER BY expires_on DESC, mentor_id DESC, id DESC LIMIT 1) AS last
  LEFT JOIN noted ON noted.nearest
""")


class CertificationReminderService:
    """
    Finds whom to remind, and enqueues the reminders.

    Args:
        organization_id: whose mentors are reminded.
        timezone: in which days are counted.
        thresholds: days before the last valid day; each from 1 to 999.

    Raises:
        ValueError: there is no threshold, or one is out of range.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        organization_id: UUID,
        timezone: str,
        thresholds: Sequence[int],
    ) -> None:
        if not thresholds or not all(1 <= days <= LONGEST_THRESHOLD_DAYS for days in thresholds):
            raise ValueError(
                f"Thresholds are days from 1 to {LONGEST_THRESHOLD_DAYS}, not {list(thresholds)}."
            )
        self._engine = engine
        self._notify = Notifier(engine)
        self._organization_id = organization_id
        self._timezone = timezone
        self._thresholds = sorted(set(thresholds))

    async def aclose(self) -> None:
        """
        Wake the workers for what was committed last, if they have not been told yet.
        """
        await self._notify.aclose()

    async def remind_all(self, *, today: date | None = None) -> AsyncIterator[Reminded]:
        """
        Enqueue every reminder that is due, a page to a transaction; yields each page that had any.

        Safe to run twice at once and to stop anywhere: what is noted is on its way, the rest is
        found again. Who is paused now gets what is nearest when the pause is over.

        Args:
            today: the date to count from; by default the database's, in the organisation's zone.
        """
        if today is None:
            async with reading(self._engine) as connection:
                today = await connection.scalar(TODAY, {"timezone": self._timezone})
        after: _Place | None = _BEFORE_ALL
        while after is not None:
            async with transaction(self._engine) as connection:
                after, reminded = await self._remind_page(connection, after, today)
            if reminded.enqueued:
                self._notify()
            if reminded.enqueued or reminded.skipped:
                yield reminded

    async def _remind_page(
        self, connection: AsyncConnection, after: _Place, today: date | None
    ) -> tuple[_Place | None, Reminded]:
        """
        The page that begins here, and where the next one does; None if there is none.
        """
        result = await connection.execute(
            REMIND_PAGE,
            {
                "organization_id": self._organization_id,
                "today": today,
                "thresholds": self._thresholds,
                "longest": self._thresholds[-1],
                "after_day": after.day,
                "after_mentor": after.mentor_id,
                "after_certification": after.certification_id,
                "page": PAGE,
            },
        )
        rows = result.all()
        if not rows:
            return None, Reminded(enqueued=0, skipped=0)
        due = [row for row in rows if row.cert_id is not None]
        await enqueue(connection, [self._event(row) for row in due])
        end = _Place(rows[0].last_day, rows[0].last_mentor, rows[0].last_certification)
        return end, Reminded(
            enqueued=len(due),
            by_threshold=Counter(row.threshold_days for row in due),
            skipped=rows[0].skipped,
        )

    def _event(self, row: Row[tuple[object, ...]]) -> NewEvent:
        return NewEvent(
            destination=DESTINATION,
            key=str(row.cert_id),
            organization_id=self._organization_id,
            version=version_of(row.expires_on, row.threshold_days),
            payload={
                "certification_id": str(row.cert_id),
                "mentor_id": str(row.mentor_id),
                "expires_on": row.expires_on.isoformat(),
                "threshold_days": row.threshold_days,
            },
            traceparent=current_traceparent(),
        )


def version_of(expires_on: date, threshold_days: int) -> int:
    """
    Of a reminder: grows with the period, and within it with nearer thresholds.
    """
    return expires_on.toordinal() * 1000 + LONGEST_THRESHOLD_DAYS - threshold_days
