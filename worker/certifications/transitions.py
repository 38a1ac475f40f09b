"""
The transitions: a certification expires or is renewed, and everything that follows from it
is written in the same transaction.

    lock the mentors, new versions      visibility.draw_versions
    certification                       EXPIRE or RENEW
    automatic pause                     pauses
    what the portal has to show         visibility.decide
    the event that says so              visibility.announce

Every transition goes this way, for one certification or for many, so all of them lock in
the same order: mentors ascending, then events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import structlog
from sqlalchemy import text

from worker.certifications import pauses, visibility
from worker.certifications.confirmations import wait_for
from worker.database import transaction
from worker.errors import (
    DynamicsSyncException,
    RenewalNotInFutureError,
    StillValidError,
    UnknownCertificationError,
    UnknownMentorError,
    UsageError,
)
from worker.wakeup import notify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from datetime import date

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from worker.certifications.visibility import Desired

log = structlog.get_logger(__name__)

LONGEST_WAIT_SECONDS = 15.0
"""A person waits for the portal no longer than this."""

PAGE = 100
"""Certifications that expire in one transaction: its locks are held for milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """
    What a transition of one certification came to.

    Args:
        visible: what the portal has to show for the mentor now.
        version: of that decision; grows with each transition of the mentor.
        synchronised: an event was enqueued; False for another organisation's mentor.
    """

    certification_id: UUID
    mentor_id: UUID
    organization_id: UUID
    visible: bool
    version: int
    synchronised: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """
    One page of a night's expiries.

    Args:
        certifications: how many expired.
        mentors: how many mentors they belong to.
        skipped: mentors of other organisations, for whom nothing is synchronised.
    """

    certifications: int
    mentors: int
    skipped: int


LOOK_UP = text("""
SELECT mentor_id, status, expires_on FROM public.certifications WHERE id = :certification_id
""")

EXPIRE = text("""
UPDATE public.certifications
   SET status = 'expired',
       expired_at = now()
 WHERE id = ANY (:certification_ids)
   AND status = 'valid'
   AND expires_on < :today
RETURNING id, mentor_id
""")

RENEW = text("""
UPDATE public.certifications
   SET status = 'valid',
       expires_on = :until,
       expired_at = NULL,
       renewed_at = now()
 WHERE id = ANY (:certification_ids)
RETURNING id, mentor_id
""")

# Only of mentors that there are: an adopted table may have no foreign key that says so.
RUN_OUT = text("""
SELECT certification.id, certification.mentor_id
  FROM public.certifications AS certification
 WHERE certification.status = 'valid'
   AND certification.expires_on < :today
   AND (certification.mentor_id, certification.id) > (:after_mentor, :after_id)
   AND EXISTS (SELECT FROM public.mentors AS mentor WHERE mentor.id = certification.mentor_id)
 ORDER BY certification.mentor_id, certification.id
 LIMIT :limit
""")

_BEFORE_ALL = UUID(int=0)

TODAY = text("SELECT CAST(now() AT TIME ZONE :timezone AS date)")


class _AlreadyExpiredError(Exception):
    """
    Nothing to do; rolls back the version that was drawn.
    """


class CertificationManagementService:
    """
    Expires and renews certifications, with all that follows, in one transaction each.

    Args:
        organization_id: whose portal is kept in step. Mentors of other organisations get
            their certification and pause changed, and nothing is sent about them.
        timezone: in which a certification's last valid day ends.
    """

    def __init__(self, engine: AsyncEngine, *, organization_id: UUID, timezone: str) -> None:
        self._engine = engine
        self._organization_id = organization_id
        self._timezone = timezone

    async def expire(
        self, certification_id: UUID, *, today: date | None = None, wait_seconds: float = 0
    ) -> Transition | None:
        """
        A certification has run out: expire it, pause the mentor, have the portal hide them.

        Args:
            today: the date to judge by; by default the database's, in the organisation's
                zone. The last valid day is not run out yet.
            wait_seconds: how long to wait for Dynamics once the change is saved, up to 15.

        Returns:
            The transition, or None if the certification had expired already.

        Raises:
            UnknownCertificationError, UnknownMentorError, StillValidError: nothing was changed.
            DynamicsSyncException: the change stands; the portal is not there yet.
        """
        _check_wait(wait_seconds)
        try:
            async with transaction(self._engine) as connection:
                today = today or await self._today(connection)
                mentor_id = (await _look_up(connection, certification_id)).mentor_id
                await _lock(connection, mentor_id)
                await _expire_still_valid(connection, certification_id, today)
                await pauses.open_automatic(connection, [certification_id])
                done = await self._follow_up(connection, certification_id, mentor_id, today)
        except _AlreadyExpiredError:
            return None
        await self._wait(done, wait_seconds)
        return done

    async def renew(
        self,
        certification_id: UUID,
        until: date,
        *,
        today: date | None = None,
        wait_seconds: float = 0,
    ) -> Transition:
        """
        A certification was renewed: lift the pause it caused, have the portal decide again.

        Args:
            until: the new last valid day; it must lie in the future.
            today, wait_seconds: as in `expire`.

        Raises:
            UnknownCertificationError, UnknownMentorError, RenewalNotInFutureError: nothing was
            changed.
            DynamicsSyncException: the renewal stands; the portal is not there yet.
        """
        _check_wait(wait_seconds)
        async with transaction(self._engine) as connection:
            today = today or await self._today(connection)
            if until <= today:
                raise RenewalNotInFutureError(
                    f"A certification cannot be renewed until {until}: that is not after "
                    f"today, {today}. Give a later date."
                )
            mentor_id = (await _look_up(connection, certification_id)).mentor_id
            await _lock(connection, mentor_id)
            renewed = await connection.execute(
                RENEW, {"certification_ids": [certification_id], "until": until}
            )
            if not renewed.all():  # it vanished between the look-up and the lock
                raise UnknownCertificationError(f"There is no certification {certification_id}.")
            await pauses.lift_automatic(connection, [certification_id])
            done = await self._follow_up(connection, certification_id, mentor_id, today)
        await self._wait(done, wait_seconds)
        return done

    async def expire_all(self, *, today: date | None = None) -> AsyncIterator[Expired]:
        """
        Expire everything that has run out, a page to a transaction; yields each page.

        Safe to run twice at once and to stop anywhere: what is done is done, the rest is
        found again.
        """
        after_mentor = after_id = _BEFORE_ALL
        while True:
            async with transaction(self._engine) as connection:
                today = today or await self._today(connection)
                found = await connection.execute(
                    RUN_OUT,
                    {
                        "today": today,
                        "after_mentor": after_mentor,
                        "after_id": after_id,
                        "limit": PAGE,
                    },
                )
                page = found.all()
                if not page:
                    return
                after_id, after_mentor = page[-1]
                expired = await self._expire_page(
                    connection, {row.id: row.mentor_id for row in page}, today
                )
            await notify(self._engine)
            yield expired

    async def _expire_page(
        self,
        connection: AsyncConnection,
        page: Mapping[UUID, UUID],
        today: date,
    ) -> Expired:
        changed = await _expire_run_out(connection, page, today)
        mentor_ids = set(changed.values())
        await pauses.open_automatic(connection, changed)
        wanted = await visibility.decide(connection, mentor_ids, today=today)
        skipped = await visibility.announce(
            connection,
            wanted,
            organization_id=self._organization_id,
            certifications={mentor: certification for certification, mentor in changed.items()},
        )
        return Expired(certifications=len(changed), mentors=len(mentor_ids), skipped=skipped)

    async def _follow_up(
        self, connection: AsyncConnection, certification_id: UUID, mentor_id: UUID, today: date
    ) -> Transition:
        [wanted] = await visibility.decide(connection, [mentor_id], today=today)
        skipped = await visibility.announce(
            connection,
            [wanted],
            organization_id=self._organization_id,
            certifications={mentor_id: certification_id},
        )
        return _transition(certification_id, wanted, synchronised=not skipped)

    async def _wait(self, done: Transition, seconds: float) -> None:
        if not done.synchronised:
            return
        await notify(self._engine)
        if not seconds:
            return
        progress, code = await wait_for(
            self._engine, mentor_id=done.mentor_id, version=done.version, seconds=seconds
        )
        if progress != "delivered":
            raise DynamicsSyncException(done.mentor_id, state=progress, error_code=code)

    async def _today(self, connection: AsyncConnection) -> date:
        today: date = (await connection.execute(TODAY, {"timezone": self._timezone})).scalar_one()
        return today


def _check_wait(seconds: float) -> None:
    if not 0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise UsageError(f"Waiting takes 0 to {LONGEST_WAIT_SECONDS:.0f} seconds, not {seconds}.")


async def _lock(connection: AsyncConnection, mentor_id: UUID) -> None:
    if not await visibility.draw_versions(connection, [mentor_id]):
        raise UnknownMentorError(
            f"The certification's mentor, {mentor_id}, is not in the register: nothing was changed."
        )


async def _look_up(connection: AsyncConnection, certification_id: UUID) -> Row[Any]:
    """
    Mentor, status and last valid day of a certification.
    """
    row = (await connection.execute(LOOK_UP, {"certification_id": certification_id})).one_or_none()
    if row is None:
        raise UnknownCertificationError(f"There is no certification {certification_id}.")
    return row


async def _expire_run_out(
    connection: AsyncConnection, page: Mapping[UUID, UUID], today: date
) -> dict[UUID, UUID]:
    """
    Lock the mentors and expire their certifications; mentor by certification that changed.

    Another run may have come first for some of them. Then the versions that were drawn are
    given back and only the others are tried again, so that two runs leave what one would.
    """
    changed = dict(page)
    while changed:
        savepoint = await connection.begin_nested()
        mentor_ids = set(changed.values())
        await visibility.draw_versions(connection, mentor_ids)
        rows = await connection.execute(
            EXPIRE, {"certification_ids": list(changed), "today": today}
        )
        changed = {row.id: row.mentor_id for row in rows}
        if set(changed.values()) == mentor_ids:
            await savepoint.commit()
            break
        await savepoint.rollback()
    return changed


async def _expire_still_valid(
    connection: AsyncConnection, certification_id: UUID, today: date
) -> None:
    changed = await connection.execute(
        EXPIRE, {"certification_ids": [certification_id], "today": today}
    )
    if changed.all():
        return
    row = await _look_up(connection, certification_id)
    if row.status == "expired":
        raise _AlreadyExpiredError
    raise StillValidError(
        f"Certification {certification_id} is valid until {row.expires_on}, and today is "
        f"{today}: it cannot expire yet."
    )


def _transition(certification_id: UUID, wanted: Desired, *, synchronised: bool) -> Transition:
    if not synchronised:
        log.info("visibility.skipped", mentor_id=str(wanted.mentor_id), reason="other_organization")
    return Transition(
        certification_id=certification_id,
        mentor_id=wanted.mentor_id,
        organization_id=wanted.organization_id,
        visible=wanted.visible,
        version=wanted.version,
        synchronised=synchronised,
    )
