"""
Pauses: a mentor is paused while any pause is open.

A certification that expires opens an automatic pause of its own, and its renewal lifts just
that one. What a person paused, a person resumes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from worker.database import transaction
from worker.errors import UnknownMentorError

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

OPEN_AUTOMATIC = text("""
INSERT INTO public.mentor_pauses (mentor_id, certification_id, reason)
SELECT mentor_id, id, 'certification_expired'
  FROM public.certifications
 WHERE id = ANY (:certification_ids)
 ORDER BY mentor_id, id
    ON CONFLICT (mentor_id, reason, certification_id) WHERE resumed_at IS NULL DO NOTHING
""")

# Not now(), the start of this transaction: the pause may have been opened since.
LIFT_AUTOMATIC = text("""
UPDATE public.mentor_pauses
   SET resumed_at = greatest(clock_timestamp(), paused_at)
 WHERE certification_id = ANY (:certification_ids)
   AND reason = 'certification_expired'
   AND resumed_at IS NULL
""")

OPEN_MISSING = text("""
INSERT INTO public.mentor_pauses (mentor_id, certification_id, reason)
SELECT mentor_id, id, 'certification_expired'
  FROM public.certifications
 WHERE mentor_id = ANY (:mentor_ids) AND status = 'expired'
 ORDER BY mentor_id, id
    ON CONFLICT (mentor_id, reason, certification_id) WHERE resumed_at IS NULL DO NOTHING
""")

# OFFSET is a fence: looked up for one after the other, however few certifications there seem to be.
LIFT_BASELESS = text("""
UPDATE public.mentor_pauses AS pause
   SET resumed_at = greatest(clock_timestamp(), paused_at)
 WHERE pause.mentor_id = ANY (:mentor_ids)
   AND pause.reason = 'certification_expired'
   AND pause.resumed_at IS NULL
   AND NOT EXISTS (SELECT FROM public.certifications AS certification
                    WHERE certification.id = pause.certification_id
                      AND certification.mentor_id = pause.mentor_id
                      AND certification.status = 'expired'
                   OFFSET 0)
""")

OPEN_MANUAL = text("""
INSERT INTO public.mentor_pauses (mentor_id, reason)
SELECT id, 'manual' FROM public.mentors WHERE id = :mentor_id
    ON CONFLICT (mentor_id, reason, certification_id) WHERE resumed_at IS NULL DO NOTHING
""")

LIFT_MANUAL = text("""
UPDATE public.mentor_pauses
   SET resumed_at = greatest(clock_timestamp(), paused_at)
 WHERE mentor_id = :mentor_id AND reason = 'manual' AND resumed_at IS NULL
""")

EXISTS = text("SELECT true FROM public.mentors WHERE id = :mentor_id")

IS_PAUSED = text("""
SELECT EXISTS (SELECT FROM public.mentor_pauses
                WHERE mentor_id = :mentor_id AND resumed_at IS NULL)
""")


async def open_automatic(connection: AsyncConnection, certification_ids: Collection[UUID]) -> None:
    """
    Pause the mentors of expired certifications, in the transition's transaction.
    """
    await connection.execute(OPEN_AUTOMATIC, {"certification_ids": list(certification_ids)})


async def lift_automatic(connection: AsyncConnection, certification_ids: Collection[UUID]) -> None:
    """
    Lift the pauses that these certifications caused, in the transition's transaction.
    """
    await connection.execute(LIFT_AUTOMATIC, {"certification_ids": list(certification_ids)})


async def align_automatic(connection: AsyncConnection, mentor_ids: Collection[UUID]) -> None:
    """
    Open and lift automatic pauses of locked mentors, until they are those of their expired
    certifications.
    """
    await connection.execute(OPEN_MISSING, {"mentor_ids": list(mentor_ids)})
    await connection.execute(LIFT_BASELESS, {"mentor_ids": list(mentor_ids)})


class PauseManagementService:
    """
    Pauses by hand. They do not change what the portal shows: certifications alone do.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def pause(self, mentor_id: UUID) -> bool:
        """
        Pause a mentor by hand; False if somebody had done so already.

        Raises:
            UnknownMentorError: there is no such mentor.
        """
        async with transaction(self._engine) as connection:
            await _require_mentor(connection, mentor_id)
            result = await connection.execute(OPEN_MANUAL, {"mentor_id": mentor_id})
            return bool(result.rowcount)

    async def resume(self, mentor_id: UUID) -> bool:
        """
        Lift a pause made by hand; False if there was none.

        Raises:
            UnknownMentorError: there is no such mentor.
        """
        async with transaction(self._engine) as connection:
            await _require_mentor(connection, mentor_id)
            result = await connection.execute(LIFT_MANUAL, {"mentor_id": mentor_id})
            return bool(result.rowcount)

    async def is_paused(self, mentor_id: UUID) -> bool:
        """
        Whether any pause of the mentor is open.
        """
        async with transaction(self._engine) as connection:
            return bool(await connection.scalar(IS_PAUSED, {"mentor_id": mentor_id}))


async def _require_mentor(connection: AsyncConnection, mentor_id: UUID) -> None:
    if not await connection.scalar(EXISTS, {"mentor_id": mentor_id}):
        raise UnknownMentorError(f"There is no mentor {mentor_id}.")
