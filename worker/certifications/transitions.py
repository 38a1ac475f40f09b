"""
The transitions: a certification expires or is renewed, and everything that follows from it
is written in the same transaction.

    lock the mentors, new versions      visibility.draw_versions
    certification                       EXPIRE or RENEW
    automatic pause                     pauses
    what the portal has to show         visibility.decide
    the event that says so              visibility.announce

Every transition goes this way, so all of them lock in the same order: mentors ascending, then
events. What runs out in one night goes this way too, a page at a time: EXPIRE_PAGE is all
steps but the last in one statement. It waits for nobody; whom somebody else holds meanwhile
is found again afterwards.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from outbox import driver
from worker.certifications import pauses, visibility
from worker.certifications.confirmations import wait_for
from worker.database import reading, transaction
from worker.errors import (
    DynamicsSyncException,
    HeldError,
    RenewalNotInFutureError,
    StillValidError,
    UnknownCertificationError,
    UnknownMentorError,
    UsageError,
)
from worker.wakeup import Notifier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from worker.certifications.visibility import Desired

    Record = Callable[[AsyncConnection, "Transition"], Awaitable[None]]

log = structlog.get_logger(__name__)

LONGEST_WAIT_SECONDS = 15.0
"""A person waits for the portal no longer than this."""

PAGE = 1000
"""Certifications that expire in one transaction: its locks are held for some 0.1 s."""

PATIENCE_MILLISECONDS = 200
"""
A page waits no longer for a lock, so that nobody waits long for the page. Less than the
server's `deadlock_timeout`: if there is a circle, it is the page that gives way.
"""

RENEWAL_PATIENCE_SECONDS = 5.0
"""A person waits no longer than this for each lock; who holds one longer has probably left."""

LOCK_NOT_AVAILABLE = "55P03"
"""SQLSTATE of a statement that has waited so long."""


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

_RUN_OUT = """
    SELECT expires_on, mentor_id
      FROM public.certifications
     WHERE status = 'valid'
       AND expires_on < :today
       AND (expires_on, mentor_id) > (:after_day, :after_mentor)
     ORDER BY expires_on, mentor_id
     LIMIT :page
"""

PAGE_END = text(f"""
SELECT expires_on, mentor_id
  FROM ({_RUN_OUT}) AS run_out
 ORDER BY expires_on DESC, mentor_id DESC
 LIMIT 1
""")  # noqa: S608 (nothing from outside)

GIVE_WAY = text("SELECT set_config('lock_timeout', :patience, true)")

# One snapshot is enough: what changed since it was taken is seen when a row is locked, and
# leaves a mentor without a certification in the result. The arrays are a fence: of so many
# mentors the planner would rather read whole tables, and of so few as run out in other nights,
# compare all with all.
EXPIRE_PAGE = text(f"""
WITH run_out AS MATERIALIZED ({_RUN_OUT}),
free AS MATERIALIZED (
    SELECT mentor_id
      FROM public.portal_visibility
     WHERE mentor_id = ANY (ARRAY (SELECT mentor_id FROM run_out))
     ORDER BY mentor_id
       FOR NO KEY UPDATE SKIP LOCKED
),
-- Whoever has an expired certification is hidden, whatever the others say.
hidden AS (
    INSERT INTO public.portal_visibility AS desired (mentor_id, organization_id, visible)
    SELECT mentor.id, mentor.organization_id, false
      FROM public.mentors AS mentor
     WHERE mentor.id = ANY (ARRAY (SELECT mentor_id FROM run_out))
       AND (mentor.id IN (SELECT mentor_id FROM free)
            OR NOT EXISTS (SELECT FROM public.portal_visibility AS held
                            WHERE held.mentor_id = mentor.id))
     ORDER BY mentor.id
        ON CONFLICT (mentor_id) DO UPDATE
       SET version = desired.version + 1,
           organization_id = excluded.organization_id,
           visible = false,
           changed_at = clock_timestamp()
    RETURNING mentor_id, organization_id, version
),
-- All that have run out of these mentors, so that each of them has one new version.
expired AS (
    UPDATE public.certifications
       SET status = 'expired',
           expired_at = now()
     WHERE mentor_id = ANY (ARRAY (SELECT mentor_id FROM hidden))
       AND status = 'valid'
       AND expires_on < :today
    RETURNING id, mentor_id
),
paused AS (
    INSERT INTO public.mentor_pauses (mentor_id, certification_id, reason)
    SELECT mentor_id, id, 'certification_expired' FROM expired ORDER BY mentor_id, id
        ON CONFLICT (mentor_id, reason, certification_id) WHERE resumed_at IS NULL DO NOTHING
)
SELECT CAST(hidden.mentor_id AS text) AS mentor_id,
       hidden.organization_id = :organization_id AS ours,
       hidden.version,
       CAST(expired.id AS text) AS certification_id
  FROM hidden
  -- FULL, though nobody has expired who is not hidden: no such join compares all with all.
  FULL JOIN expired ON expired.mentor_id = hidden.mentor_id
""")  # noqa: S608 (nothing from outside)

# Only of mentors that there are: an adopted table may have no foreign key that says so.
LEFT_OVER = text("""
SELECT certification.id
  FROM public.certifications AS certification
 WHERE certification.status = 'valid'
   AND certification.expires_on < :today
   AND certification.id > :after
   AND EXISTS (SELECT FROM public.mentors AS mentor WHERE mentor.id = certification.mentor_id)
 ORDER BY certification.id
 LIMIT :page
""")

TODAY = text("SELECT CAST(now() AT TIME ZONE :timezone AS date)")


class _AlreadyExpiredError(Exception):
    """
    Nothing to do; rolls back the version that was drawn.
    """


class _OvertakenError(Exception):
    """
    What a page found had changed before it was locked; rolls back the versions it drew.
    """


class _Place(NamedTuple):
    """
    A place in the index of what runs out; pages lie between two of them.
    """

    day: date
    mentor_id: UUID


_NOBODY = UUID(int=0)
_BEFORE_ALL = _Place(date.min, _NOBODY)


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
        self._notify = Notifier(engine)
        self._organization_id = organization_id
        self._timezone = timezone

    async def aclose(self) -> None:
        """
        Wake the workers for what was committed last, if they have not been told yet.
        """
        await self._notify.aclose()

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
        record: Record | None = None,
    ) -> Transition:
        """
        A certification was renewed: lift the pause it caused, have the portal decide again.

        Args:
            until: the new last valid day; it must lie in the future.
            today, wait_seconds: as in `expire`.
            record: writes down that it was done, in the same transaction.

        Raises:
            UnknownCertificationError, UnknownMentorError, RenewalNotInFutureError, HeldError:
            nothing was changed.
            DynamicsSyncException: the renewal stands; the portal is not there yet.
        """
        _check_wait(wait_seconds)
        async with _saying_that_it_is_held(), transaction(self._engine) as connection:
            patience = f"{RENEWAL_PATIENCE_SECONDS * 1000:.0f}ms"
            await connection.execute(GIVE_WAY, {"patience": patience})
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
            if record is not None:
                await record(connection, done)
        await self._wait(done, wait_seconds)
        return done

    async def expire_all(self, *, today: date | None = None) -> AsyncIterator[Expired]:
        """
        Expire everything that has run out, a page to a transaction; yields each page.

        Pages pass over whomever somebody else holds, and go round until they find nothing more
        to do. Who is left then is waited for, one at a time, with nothing held meanwhile.

        Safe to run twice at once and to stop anywhere: what is done is done, the rest is
        found again.

        Raises:
            TimeoutError: somebody did not let go of a mentor; all the others are done.
        """
        if today is None:
            async with reading(self._engine) as connection:
                today = await self._today(connection)
        progress = True
        while progress:
            progress = False
            async for expired in self._expire_pages(today):
                progress = True
                yield expired
        async for expired in self._expire_left_over(today):
            yield expired

    async def _expire_pages(self, today: date) -> AsyncIterator[Expired]:
        """
        Go through what has run out once, in the order of the index.
        """
        after = _BEFORE_ALL
        while True:
            end = expired = None
            with _giving_way():
                async with transaction(self._engine) as connection:
                    end = await _page_end(connection, after, today)
                    if end is not None:
                        expired = await self._expire_page(connection, after, today)
            if end is None:
                return
            after = end
            if expired is None:
                continue
            self._notify()
            yield expired

    async def _expire_page(
        self, connection: AsyncConnection, after: _Place, today: date
    ) -> Expired | None:
        """
        Expire the page that begins here; None if somebody else holds everybody on it.
        """
        await connection.execute(GIVE_WAY, {"patience": f"{PATIENCE_MILLISECONDS}ms"})
        rows = await driver.execute(
            connection,
            EXPIRE_PAGE,
            _page(after, today) | {"organization_id": self._organization_id},
        )
        if not rows:
            return None
        if any(certification_id is None for _, _, _, certification_id in rows):
            raise _OvertakenError
        await visibility.announce_hidden(
            connection,
            [
                (mentor, version, certification)
                for mentor, ours, version, certification in rows
                if ours
            ],
            organization_id=self._organization_id,
        )
        mentors = {mentor: ours for mentor, ours, _, _ in rows}
        skipped = len(mentors) - sum(mentors.values())
        return Expired(certifications=len(rows), mentors=len(mentors), skipped=skipped)

    async def _expire_left_over(self, today: date) -> AsyncIterator[Expired]:
        held: TimeoutError | None = None
        after = _NOBODY
        while page := await self._left_over(after, today):
            after = page[-1]
            for certification_id in page:
                try:
                    done = await self.expire(certification_id, today=today)
                except UsageError:  # renewed or gone since
                    continue
                except TimeoutError as error:
                    held = error
                    continue
                if done is not None:
                    yield Expired(certifications=1, mentors=1, skipped=int(not done.synchronised))
        if held is not None:
            raise held

    async def _left_over(self, after: UUID, today: date) -> Sequence[UUID]:
        async with reading(self._engine) as connection:
            found = await connection.execute(
                LEFT_OVER, {"after": after, "today": today, "page": PAGE}
            )
            return found.scalars().all()

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
        self._notify()
        if not seconds:
            return
        progress, code = await wait_for(
            self._engine, mentor_id=done.mentor_id, version=done.version, seconds=seconds
        )
        if progress != "delivered":
            raise DynamicsSyncException(done.mentor_id, state=progress, error_code=code)

    async def _today(self, connection: AsyncConnection) -> date:
        return await date_in(connection, self._timezone)


async def date_in(connection: AsyncConnection, timezone: str) -> date:
    """
    The date on the wall in this zone, by the database's clock.
    """
    today: date = (await connection.execute(TODAY, {"timezone": timezone})).scalar_one()
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


def _page(after: _Place, today: date) -> dict[str, Any]:
    return {
        "today": today,
        "after_day": after.day,
        "after_mentor": after.mentor_id,
        "page": PAGE,
    }


async def _page_end(connection: AsyncConnection, after: _Place, today: date) -> _Place | None:
    """
    Where the page ends that begins here; None if nothing is on it.
    """
    row = (await connection.execute(PAGE_END, _page(after, today))).one_or_none()
    return _Place(*row) if row else None


@contextmanager
def _giving_way() -> Iterator[None]:
    """
    A page that somebody else is in the way of did not happen; what is on it is found again.
    """
    try:
        yield
    except _OvertakenError:
        pass
    except OperationalError as error:
        if not _has_waited(error):
            raise


@asynccontextmanager
async def _saying_that_it_is_held() -> AsyncIterator[None]:
    try:
        yield
    except OperationalError as error:
        if not _has_waited(error):
            raise
        raise HeldError(
            "Somebody else has held what has to be changed for more than "
            f"{RENEWAL_PATIENCE_SECONDS:g} s, so nothing was changed. Try again; if it stays so, "
            "a transaction was left open in the database."
        ) from None


def _has_waited(error: OperationalError) -> bool:
    """
    Whether a statement gave up because somebody else held a lock.
    """
    return getattr(error.orig, "sqlstate", None) == LOCK_NOT_AVAILABLE


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
