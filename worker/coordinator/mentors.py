"""
One mentor: where the portal stands, and what happened, for the page that tells it in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import text

if TYPE_CHECKING:
    from datetime import date, datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

State = Literal["ok", "pending", "failed", "handled", "untouched"]
"""Of a mentor: `untouched` if nothing was ever to be sent, so nobody knows better."""

HISTORY = 50
"""Entries of one kind that the time line goes back."""

FOUND = 20
"""Mentors that one search shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """
    A mentor of whom there is something to say in one line.
    """

    mentor_id: UUID
    mentor_name: str
    state: State
    visible: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Certification:
    """
    A certification as it stands.
    """

    id: UUID
    expires_on: date
    status: str
    expired_at: datetime | None
    renewed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """
    Something that happened, for the time line.

    Args:
        what: the key of its words; see `wording`.
        facts: what the words need to know.
    """

    at: datetime
    what: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mentor:
    """
    All about one mentor.

    Args:
        visible: what the portal has to show; None if that was never decided.
        confirmed: the portal confirmed just that.
        in_register: False if only an open failure still names this mentor.
        failure_id: of the open failure.
        handled_by: who saw to the portal by hand, if that is how things stand.
    """

    id: UUID
    name: str
    in_register: bool
    visible: bool | None
    confirmed: bool
    confirmed_at: datetime | None
    live: bool
    trying_now: bool
    attempts: int
    next_try_at: datetime | None
    since: datetime | None
    error_code: str | None
    failure_id: UUID | None
    failure_message: str | None
    recoverable: bool
    handled_by: str | None
    handled_at: datetime | None
    certifications: list[Certification]
    history: list[Entry]

    @property
    def state(self) -> State:
        """
        One of the states of the page.
        """
        return _state(
            decided=self.visible is not None,
            confirmed=self.confirmed,
            live=self.live,
            failed=self.failure_id is not None,
            handled=self.handled_at is not None,
        )


def _state(*, decided: bool, confirmed: bool, live: bool, failed: bool, handled: bool) -> State:
    if confirmed:
        return "ok"
    if live:
        return "pending"
    if failed:
        return "failed"
    if handled:
        return "handled"
    return "pending" if decided else "untouched"


# OFFSET 0 is a fence: under row-level security a join by a cast key cannot use an index.
#
# A failure that was closed by hand speaks for its version and those before it.
_STANDING = """
SELECT mentor.id AS mentor_id, mentor.full_name AS mentor_name, mentor.in_register,
       desired.visible, desired.changed_at, confirmed.confirmed_at,
       coalesce(confirmed.version >= desired.version, false) AS confirmed,
       event.id IS NOT NULL AS live,
       event.claim_token IS NOT NULL AS trying_now,
       coalesce(event.attempts, 0) AS attempts,
       event.available_at AS next_try_at,
       event.created_at AS sent_at,
       event.last_error_code AS event_error_code,
       failure.id AS failure_id, failure.error_code, failure.error_message,
       failure.created_at AS failed_at,
       coalesce(failure.recoverable, false) AS recoverable,
       handled.resolved_by AS handled_by, handled.resolved_at AS handled_at
  FROM {mentors} AS mentor
  LEFT JOIN public.portal_visibility AS desired ON desired.mentor_id = mentor.id
  LEFT JOIN public.portal_confirmations AS confirmed ON confirmed.mentor_id = mentor.id
  LEFT JOIN LATERAL (
       SELECT * FROM outbox.events AS live
        WHERE live.destination = 'dynamics' AND live.key = CAST(mentor.id AS text)
       OFFSET 0) AS event ON true
  LEFT JOIN public.dynamics_sync_failures AS failure
    ON failure.mentor_id = mentor.id AND failure.resolved_at IS NULL
  LEFT JOIN LATERAL (
       SELECT resolved_by, resolved_at
         FROM public.dynamics_sync_failures AS closed
        WHERE closed.mentor_id = mentor.id AND closed.resolution = 'manual'
          AND closed.version >= desired.version
        ORDER BY resolved_at DESC
        LIMIT 1) AS handled ON true
 {order}
"""

# LIKE with an escape of its own: what is typed is looked for as it stands.
SEARCH = text(
    _STANDING.format(
        mentors="""(
    SELECT id, full_name, true AS in_register
      FROM public.mentors
     WHERE organization_id = :organization_id AND full_name ILIKE :pattern ESCAPE '!'
     ORDER BY full_name, id
     LIMIT :limit)""",
        order="ORDER BY mentor.full_name, mentor.id",
    )
)


async def search(
    connection: AsyncConnection, words: str, *, organization_id: UUID, limit: int = FOUND
) -> tuple[list[Found], bool]:
    """
    Mentors whose name has these words in it, and whether there are more.
    """
    harmless = words.replace("!", "!!").replace("%", "!%").replace("_", "!_")
    rows = await connection.execute(
        SEARCH,
        {
            "organization_id": organization_id,
            "pattern": "%" + "%".join(harmless.split()) + "%",
            "limit": limit + 1,
        },
    )
    found = [
        Found(
            mentor_id=row["mentor_id"],
            mentor_name=row["mentor_name"],
            visible=row["visible"],
            state=_state(
                decided=row["visible"] is not None,
                confirmed=row["confirmed"],
                live=row["live"],
                failed=row["failure_id"] is not None,
                handled=row["handled_at"] is not None,
            ),
        )
        for row in rows.mappings()
    ]
    return found[:limit], len(found) > limit


# Also a mentor who left the register, as long as a failure is open: the portal may still show
# them.
ONE = text(
    _STANDING.format(
        mentors="""(
    SELECT id, full_name, true AS in_register
      FROM public.mentors
     WHERE id = :mentor_id AND organization_id = :organization_id
     UNION ALL
    SELECT mentor_id, '', false
      FROM public.dynamics_sync_failures AS open
     WHERE mentor_id = :mentor_id AND organization_id = :organization_id
       AND resolved_at IS NULL
       AND NOT EXISTS (SELECT FROM public.mentors
                        WHERE id = :mentor_id AND organization_id = :organization_id))""",
        order="",
    )
)

CERTIFICATIONS = text("""
SELECT id, expires_on, status, expired_at, renewed_at
  FROM public.certifications
 WHERE mentor_id = :mentor_id
 ORDER BY expires_on, id
""")

PAUSES = text("""
SELECT reason, paused_at, resumed_at
  FROM public.mentor_pauses
 WHERE mentor_id = :mentor_id
 ORDER BY paused_at DESC
 LIMIT :limit
""")

SETTLED = text("""
SELECT CAST(payload ->> 'visible' AS boolean) AS visible, outcome, attempts, error_code, settled_at
  FROM outbox.settled
 WHERE destination = 'dynamics' AND key = :key AND organization_id = :organization_id
 ORDER BY version DESC
 LIMIT :limit
""")

DEEDS = text("""
SELECT at, name, action, note
  FROM outbox.audit
 WHERE organization_id = :organization_id AND mentor_id = :mentor_id
   AND (outcome IN ('started', 'handled') OR outcome LIKE 'until %')
 ORDER BY at DESC
 LIMIT :limit
""")


async def mentor(
    connection: AsyncConnection, mentor_id: UUID, *, organization_id: UUID
) -> Mentor | None:
    """
    All about one mentor; None if there is no such mentor in this organisation.
    """
    parameters = {
        "mentor_id": mentor_id,
        "key": str(mentor_id),
        "organization_id": organization_id,
        "limit": HISTORY,
    }
    row = (await connection.execute(ONE, parameters)).mappings().one_or_none()
    if row is None:
        return None
    rows = await connection.execute(CERTIFICATIONS, parameters)
    certifications = [Certification(**one) for one in rows.mappings()]
    pauses = (await connection.execute(PAUSES, parameters)).mappings().all()
    settled = (await connection.execute(SETTLED, parameters)).mappings().all()
    deeds = (await connection.execute(DEEDS, parameters)).mappings().all()
    history = [
        *(entry for one in certifications for entry in _of_certification(one)),
        *(entry for one in pauses for entry in _of_pause(one)),
        *(_of_settled(one) for one in settled),
        *(
            Entry(
                at=one["at"],
                what=one["action"],
                facts={"name": one["name"], "note": one["note"]},
            )
            for one in deeds
        ),
    ]
    history.sort(key=lambda entry: entry.at)
    history.reverse()  # what came of something stands above it, also at the same moment
    return Mentor(
        id=mentor_id,
        name=row["mentor_name"],
        in_register=row["in_register"],
        visible=row["visible"],
        confirmed=row["confirmed"],
        confirmed_at=row["confirmed_at"],
        live=row["live"],
        trying_now=row["trying_now"],
        attempts=row["attempts"],
        next_try_at=row["next_try_at"],
        since=row["failed_at"] or row["sent_at"] or row["changed_at"],
        error_code=row["event_error_code"] or row["error_code"],
        failure_id=row["failure_id"],
        failure_message=row["error_message"],
        recoverable=row["recoverable"],
        handled_by=row["handled_by"],
        handled_at=row["handled_at"],
        certifications=certifications,
        history=history,
    )


def _of_certification(one: Certification) -> list[Entry]:
    entries = []
    if one.expired_at:
        entries.append(Entry(at=one.expired_at, what="expired", facts={"day": one.expires_on}))
    if one.renewed_at:
        entries.append(Entry(at=one.renewed_at, what="renewed", facts={"day": one.expires_on}))
    return entries


def _of_pause(row: Any) -> list[Entry]:  # noqa: ANN401 (a row of PAUSES)
    by_hand = "" if row["reason"] == "certification_expired" else "_by_hand"
    entries = [Entry(at=row["paused_at"], what=f"paused{by_hand}", facts={})]
    if row["resumed_at"]:
        entries.append(Entry(at=row["resumed_at"], what=f"resumed{by_hand}", facts={}))
    return entries


def _of_settled(row: Any) -> Entry:  # noqa: ANN401 (a row of SETTLED)
    what: str = row["outcome"]
    if what in {"delivered", "dead"}:
        what += "_shown" if row["visible"] else "_hidden"
    return Entry(
        at=row["settled_at"],
        what=what,
        facts={"attempts": row["attempts"], "error_code": row["error_code"]},
    )
