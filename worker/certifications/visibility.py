"""
What we want the portal to show: one row per mentor, and the event that says so.

A mentor is to be visible when none of the certifications has expired. Each change of mind
has a version, drawn under the lock of the mentor's row *before* certifications are read, so
that versions follow the order in which transitions commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

from outbox import NewEvent, enqueue
from worker.tracing import current_traceparent

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import date
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

DESTINATION = "dynamics"
"""The outbox's name of Dynamics; the key of its events is the mentor's id."""

HIDE_FIRST = {False: 0, True: 1}
"""Priority by visibility: a wrongly visible mentor is worse than a wrongly hidden one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """
    What the portal has to show for a mentor.
    """

    mentor_id: UUID
    organization_id: UUID
    visible: bool
    version: int


DRAW = text("""
INSERT INTO public.portal_visibility AS desired (mentor_id, organization_id, visible)
SELECT id, organization_id, false
  FROM public.mentors
 WHERE id = ANY (:mentor_ids)
 ORDER BY id
    ON CONFLICT (mentor_id) DO UPDATE
   SET version = desired.version + 1,
       organization_id = excluded.organization_id
RETURNING mentor_id
""")


async def draw_versions(connection: AsyncConnection, mentor_ids: Collection[UUID]) -> set[UUID]:
    """
    Lock these mentors, in ascending order, and give each a new version.

    Returns the mentors there are. Their visibility is stale until `decide` is called.
    """
    rows = await connection.execute(DRAW, {"mentor_ids": list(mentor_ids)})
    return set(rows.scalars())


# The row of a mentor whom somebody deleted was of some version; a lower one would be taken for
# an old state that comes late, and be heeded nowhere.
_NEXT_VERSION = """
    1 + greatest(
        0,
        (SELECT confirmed.version FROM public.portal_confirmations AS confirmed
          WHERE confirmed.mentor_id = mentor.id),
        (SELECT live.version FROM outbox.events AS live
          WHERE live.destination = 'dynamics' AND live.key = CAST(mentor.id AS text)),
        (SELECT max(settled.version) FROM outbox.settled AS settled
          WHERE settled.destination = 'dynamics' AND settled.key = CAST(mentor.id AS text)),
        (SELECT max(doubt.version) FROM outbox.doubts AS doubt
          WHERE doubt.destination = 'dynamics' AND doubt.key = CAST(mentor.id AS text)),
        (SELECT failure.version FROM public.dynamics_sync_failures AS failure
          WHERE failure.mentor_id = mentor.id AND failure.resolved_at IS NULL)
    )
"""

MAKE_MISSING = text(f"""
INSERT INTO public.portal_visibility (mentor_id, organization_id, visible, version)
SELECT mentor.id, mentor.organization_id, false, {_NEXT_VERSION}
  FROM public.mentors AS mentor
 WHERE mentor.id = ANY (:mentor_ids)
   AND NOT EXISTS (SELECT FROM public.portal_visibility AS held
                    WHERE held.mentor_id = mentor.id)
 ORDER BY mentor.id
    ON CONFLICT (mentor_id) DO NOTHING
RETURNING mentor_id
""")  # noqa: S608 (nothing from outside)


async def make_missing(connection: AsyncConnection, mentor_ids: Collection[UUID]) -> set[UUID]:
    """
    Make the rows that these mentors lack, above every version of theirs that is known.

    Returns the mentors who got one. Their visibility is stale until `decide` is called.
    """
    rows = await connection.execute(MAKE_MISSING, {"mentor_ids": list(mentor_ids)})
    return set(rows.scalars())


LOCK_FREE = text("""
SELECT mentor_id
  FROM public.portal_visibility
 WHERE mentor_id = ANY (:mentor_ids)
 ORDER BY mentor_id
   FOR NO KEY UPDATE SKIP LOCKED
""")


async def lock_free(connection: AsyncConnection, mentor_ids: Collection[UUID]) -> set[UUID]:
    """
    Lock those of these mentors whom nobody else holds, and return them.
    """
    rows = await connection.execute(LOCK_FREE, {"mentor_ids": list(mentor_ids)})
    return set(rows.scalars())


DRAW_ABOVE = text(f"""
UPDATE public.portal_visibility AS desired
   SET version = greatest(desired.version + 1, {_NEXT_VERSION}),
       organization_id = mentor.organization_id
  FROM public.mentors AS mentor
 WHERE mentor.id = desired.mentor_id
   AND desired.mentor_id = ANY (:mentor_ids)
RETURNING desired.mentor_id, desired.organization_id, desired.visible, desired.version
""")  # noqa: S608 (nothing from outside)


async def draw_above(connection: AsyncConnection, mentor_ids: Collection[UUID]) -> list[Desired]:
    """
    Give locked mentors a version above every one of theirs that is known, whatever their row says.

    Returns what the rows say of them.
    """
    if not mentor_ids:
        return []
    rows = await connection.execute(DRAW_ABOVE, {"mentor_ids": list(mentor_ids)})
    return [Desired(**row) for row in rows.mappings()]


DECIDE = text("""
UPDATE public.portal_visibility AS desired
   SET visible = decision.visible,
       changed_at = clock_timestamp()
  FROM (SELECT mentor_id, bool_and(status = 'valid' AND expires_on >= :today) AS visible
          FROM public.certifications
         WHERE mentor_id = ANY (:mentor_ids)
         GROUP BY mentor_id) AS decision
 WHERE desired.mentor_id = decision.mentor_id
RETURNING desired.mentor_id, desired.organization_id, desired.visible, desired.version
""")


async def decide(
    connection: AsyncConnection, mentor_ids: Collection[UUID], *, today: date
) -> list[Desired]:
    """
    Read the certifications of locked mentors and write what the portal has to show.
    """
    rows = await connection.execute(DECIDE, {"mentor_ids": list(mentor_ids), "today": today})
    return [Desired(**row) for row in rows.mappings()]


HIDE_UNCERTIFIED = text("""
UPDATE public.portal_visibility AS desired
   SET visible = false,
       changed_at = clock_timestamp()
 WHERE desired.mentor_id = ANY (:mentor_ids)
RETURNING desired.mentor_id, desired.organization_id, desired.visible, desired.version
""")


async def hide_uncertified(
    connection: AsyncConnection, mentor_ids: Collection[UUID]
) -> list[Desired]:
    """
    Of locked mentors for whom there was nothing to decide: no certification is left.
    """
    if not mentor_ids:
        return []
    rows = await connection.execute(HIDE_UNCERTIFIED, {"mentor_ids": list(mentor_ids)})
    return [Desired(**row) for row in rows.mappings()]


async def announce(
    connection: AsyncConnection,
    wanted: Iterable[Desired],
    *,
    organization_id: UUID,
    certifications: Mapping[UUID, UUID | None],
) -> int:
    """
    Enqueue what this organisation's portal has to show; others' mentors are skipped.

    Args:
        certifications: by mentor, the certification that was the cause.

    Returns:
        How many were skipped.
    """
    everybody = list(wanted)
    ours = [one for one in everybody if one.organization_id == organization_id]
    await enqueue(
        connection,
        [
            _event(
                one.mentor_id,
                organization_id=one.organization_id,
                version=one.version,
                visible=one.visible,
                certification_id=certifications.get(one.mentor_id),
            )
            for one in ours
        ],
    )
    return len(everybody) - len(ours)


async def announce_hidden(
    connection: AsyncConnection, hidden: Iterable[tuple[str, int, str]], *, organization_id: UUID
) -> None:
    """
    Enqueue that this organisation's portal has to hide these mentors.

    Args:
        hidden: mentor, version and certification; ids as text, as they go into the event.
    """
    await enqueue(
        connection,
        [
            _event(
                mentor_id,
                organization_id=organization_id,
                version=version,
                visible=False,
                certification_id=certification_id,
            )
            for mentor_id, version, certification_id in hidden
        ],
    )


def _event(
    mentor_id: UUID | str,
    *,
    organization_id: UUID,
    version: int,
    visible: bool,
    certification_id: UUID | str | None,
) -> NewEvent:
    return NewEvent(
        destination=DESTINATION,
        key=str(mentor_id),
        organization_id=organization_id,
        version=version,
        payload={
            "visible": visible,
            "certification_id": str(certification_id) if certification_id else None,
        },
        priority=HIDE_FIRST[visible],
        traceparent=current_traceparent(),
    )


LOCK = text("""
SELECT mentor_id
  FROM public.portal_visibility
 WHERE mentor_id = ANY (:mentor_ids) AND organization_id = :organization_id
 ORDER BY mentor_id
   FOR NO KEY UPDATE
""")

# A second statement, so that it sees an event which somebody enqueued before we got the lock.
# Keys are compared with what is bound: under row-level security a cast of a column could not be
# looked up in the index.
RENEW_VERSIONS = text("""
UPDATE public.portal_visibility AS desired
   SET version = version + 1
 WHERE mentor_id = ANY (:mentor_ids)
   AND CAST(mentor_id AS text) <> ALL (ARRAY (
           SELECT live.key FROM outbox.events AS live
            WHERE live.destination = 'dynamics' AND live.key = ANY (:keys)))
   -- In the same snapshot: a delivery takes away the event and the failure together.
   AND (NOT :failing OR EXISTS (SELECT FROM public.dynamics_sync_failures AS failure
                                 WHERE failure.mentor_id = desired.mentor_id
                                   AND failure.resolved_at IS NULL))
RETURNING mentor_id, organization_id, visible, version
""")


async def assert_again(
    connection: AsyncConnection,
    mentor_ids: Sequence[UUID],
    *,
    organization_id: UUID,
    certifications: Mapping[UUID, UUID | None] | None = None,
    failing: bool = False,
) -> set[UUID]:
    """
    Enqueue what the portal has to show *now*, never what was sent before.

    Whose state is on its way already is left alone: two people who ask cause one send.

    Args:
        failing: only of mentors who have an open failure at that moment.

    Returns:
        The mentors whose state was enqueued.
    """
    locked = await connection.execute(
        LOCK, {"mentor_ids": list(mentor_ids), "organization_id": organization_id}
    )
    ours = list(locked.scalars())
    rows = await connection.execute(
        RENEW_VERSIONS,
        {"mentor_ids": ours, "keys": [str(mentor) for mentor in ours], "failing": failing},
    )
    wanted = [Desired(**row) for row in rows.mappings()]
    await announce(
        connection, wanted, organization_id=organization_id, certifications=certifications or {}
    )
    return {one.mentor_id for one in wanted}
