"""
What waits and what failed, for one organisation, and what that means in plain words.

Reminders are counted by themselves: that one was given up is nothing about the portal.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from sqlalchemy import text

from outbox.gate import Gate, look
from worker.certifications import reminders as reminding
from worker.certifications.visibility import DESTINATION
from worker.coordinator.wording import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import RowMapping
    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.coordinator.wording import Words

CAUSES = {
    "throttled": "busy",
    "token_throttled": "busy",
    "unavailable": "no_answer",
    "server_error": "no_answer",
    "server_timeout": "no_answer",
    "bad_gateway": "no_answer",
    "unreachable": "no_answer",
    "timeout": "no_answer",
    "connection_lost": "no_answer",
    "token_unavailable": "no_answer",
    "token_unusable": "no_answer",
    "interrupted": "interrupted",
    "late": "late",
    "database": "database",
    "abandoned": "abandoned",
    "unexpected_answer": "unexpected_answer",
    "incomplete_answer": "unexpected_answer",
    "record_not_found": "not_found",
    "mentor_unknown": "unknown",
    "mentor_not_linked": "not_linked",
    "record_access_denied": "not_ours",
    "duplicate": "refused",
    "precondition_failed": "refused",
    "invalid_value": "refused",
    "bad_request": "refused",
    "forbidden": "no_access",
    "not_a_user": "no_access",
    "unauthorized": "no_access",
    "token_refused": "no_access",
    "secret_missing": "no_access",
    "secret_unreadable": "no_access",
    "wrong_address": "set_up",
    "key_not_defined": "set_up",
    "payload_refused": "set_up",
    "method_not_allowed": "set_up",
    "redirect_refused": "set_up",
    "certificate": "set_up",
    "invalid_address": "set_up",
    "other_host": "set_up",
    "edge_throttled": "between_busy",
    "edge_unavailable": "between_no_answer",
    "edge_unreachable": "between_no_answer",
    "edge_timeout": "between_no_answer",
    "edge_connection_lost": "between_no_answer",
    "edge_incomplete_answer": "between_unexpected",
    "edge_unexpected_answer": "between_unexpected",
    "edge_failed": "between_unexpected",
    "edge_stopped": "between_unexpected",
    "edge_restricted": "set_up",
    "edge_key_unusable": "set_up",
    "edge_key_refused": "set_up",
    "edge_missing": "set_up",
    "edge_refused": "set_up",
    "edge_not_set_up": "set_up",
    "edge_other_organization": "set_up",
    "edge_other_target": "set_up",
    "webhook_throttled": "reminders_away",
    "webhook_unavailable": "reminders_away",
    "webhook_unreachable": "reminders_away",
    "webhook_timeout": "reminders_away",
    "webhook_connection_lost": "reminders_away",
    "webhook_refused": "reminders_refused",
    "webhook_unauthorized": "reminders_set_up",
    "webhook_wrong_address": "reminders_set_up",
    "webhook_certificate": "reminders_set_up",
    "webhook_secret_missing": "reminders_set_up",
}
"""Why a mentor's state did not get through, by error code; each has words in `wording`."""

MOST_FAILURES = 1000
"""That one list shows."""


def cause(error_code: str | None) -> str:
    """
    What an error code comes to for people, as the last part of the key of its words.
    """
    if error_code is None:
        return "not_tried"
    if error_code.startswith("http_"):
        return "unexpected_answer"
    return CAUSES.get(error_code, "unforeseen")


def reason(error_code: str | None, words: Words = ENGLISH) -> str:
    """
    An error code in words for a coordinator, as part of a sentence.
    """
    return words(f"reason.{cause(error_code)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """
    How far the portal is from what it has to show, in mentors.

    Args:
        in_order: the portal confirmed what it has to show.
        waiting_to_hide: may still be visible; on their way.
        waiting_to_show: may not be visible yet; on their way.
        failed_to_hide, failed_to_show: nothing more happens before a person acts, or
            before Dynamics recovers.
        by_hand: a person said that it was done in Dynamics by hand; the night run says it
            once more.
        unaccounted: the portal did not confirm, and nothing is on its way; the night run
            or `resync` mends it.
        asserting_again: confirmed, and to be said once more, because an older request may
            still arrive.
        oldest_waiting_seconds: since the oldest state on its way was put there; 0 if none is.
    """

    in_order: int
    waiting_to_hide: int
    waiting_to_show: int
    failed_to_hide: int
    failed_to_show: int
    by_hand: int
    unaccounted: int
    asserting_again: int
    oldest_waiting_seconds: float
    next_try_at: datetime | None
    last_confirmed_at: datetime | None
    gate: Gate

    @property
    def waiting(self) -> int:
        """
        Mentors whose state is on its way.
        """
        return self.waiting_to_hide + self.waiting_to_show

    @property
    def failed(self) -> int:
        """
        Mentors for whom a person is needed.
        """
        return self.failed_to_hide + self.failed_to_show

    @property
    def maybe_wrongly_visible(self) -> int:
        """
        Mentors who may still be visible and must not be.
        """
        return self.waiting_to_hide + self.failed_to_hide


# FULL, though most of what it adds is left out again: no such join compares all with all, however
# few events or failures the planner believes there are.
STATUS = text("""
WITH desired AS (
    SELECT mentor_id, visible, version
      FROM public.portal_visibility
     WHERE organization_id = :organization_id
),
event AS (
    SELECT key, created_at, available_at
      FROM outbox.events
     WHERE destination = 'dynamics'
),
failure AS (
    SELECT mentor_id, organization_id, visible
      FROM public.dynamics_sync_failures
     WHERE resolved_at IS NULL
),
handled AS (
    SELECT mentor_id, max(version) AS version
      FROM public.dynamics_sync_failures
     WHERE resolution = 'manual'
     GROUP BY mentor_id
),
mentor AS (
    SELECT coalesce(desired.visible, failure.visible) AS visible,
           coalesce(confirmation.version >= desired.version, false) AS confirmed,
           confirmation.confirmed_at,
           event.key IS NOT NULL AS live,
           event.created_at, event.available_at,
           failure.mentor_id IS NOT NULL AS failed,
           coalesce(handled.version >= desired.version, false) AS handled
      FROM desired
      FULL JOIN public.portal_confirmations AS confirmation
        ON confirmation.mentor_id = desired.mentor_id
      FULL JOIN event ON event.key = CAST(desired.mentor_id AS text)
      FULL JOIN failure ON failure.mentor_id = desired.mentor_id
      FULL JOIN handled ON handled.mentor_id = desired.mentor_id
     -- Also mentors who are not ours any more, and whom the portal may still show.
     WHERE desired.mentor_id IS NOT NULL OR failure.organization_id = :organization_id
)
SELECT count(*) FILTER (WHERE confirmed) AS in_order,
       count(*) FILTER (WHERE NOT confirmed AND live AND NOT visible) AS waiting_to_hide,
       count(*) FILTER (WHERE NOT confirmed AND live AND visible) AS waiting_to_show,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND failed AND NOT visible)
           AS failed_to_hide,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND failed AND visible)
           AS failed_to_show,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND NOT failed AND handled) AS by_hand,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND NOT failed AND NOT handled)
           AS unaccounted,
       count(*) FILTER (WHERE confirmed AND live) AS asserting_again,
       greatest(0, coalesce(CAST(extract(epoch FROM clock_timestamp() - min(created_at)
           FILTER (WHERE NOT confirmed)) AS double precision), 0)) AS oldest_waiting_seconds,
       min(available_at) AS next_try_at,
       max(confirmed_at) AS last_confirmed_at
  FROM mentor
""")


async def status(connection: AsyncConnection, *, organization_id: UUID) -> Status:
    """
    Count the organisation's mentors by how far the portal is.
    """
    row = (await connection.execute(STATUS, {"organization_id": organization_id})).mappings().one()
    gate = await look(connection, destination=DESTINATION, organization_id=organization_id)
    return Status(**row, gate=gate)


GIVEN_UP_DAYS = 30
"""So long a reminder that was given up is told of; after that it does not matter any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reminders:
    """
    How the organisation's reminders stand.

    Args:
        waiting: to be sent.
        given_up: in the last 30 days, and not sent since.
        last_error_code: why the last of those was given up.
        oldest_waiting_seconds: since the oldest that waits was put there; 0 if none does.
    """

    waiting: int
    given_up: int
    last_error_code: str | None
    oldest_waiting_seconds: float
    next_try_at: datetime | None
    gate: Gate


# OFFSET is a fence: looked up for one after the other, however few seem to be given up.
REMINDERS = text("""
WITH given_up AS MATERIALIZED (
    SELECT dead.settled_at, dead.error_code
      FROM outbox.settled AS dead
     WHERE dead.outcome = 'dead'
       AND dead.settled_at > now() - make_interval(days => :days)
       AND dead.destination = 'reminders'
       AND dead.organization_id = :organization_id
       AND NOT EXISTS (SELECT FROM outbox.settled AS later
                        WHERE later.destination = dead.destination
                          AND later.key = dead.key
                          AND later.version >= dead.version
                          AND later.id > dead.id
                       OFFSET 0)
       AND NOT EXISTS (SELECT FROM outbox.events AS live
                        WHERE live.destination = dead.destination AND live.key = dead.key
                       OFFSET 0)
)
SELECT count(*) AS waiting,
       (SELECT count(*) FROM given_up) AS given_up,
       (SELECT error_code FROM given_up ORDER BY settled_at DESC LIMIT 1) AS last_error_code,
       greatest(0, coalesce(CAST(extract(epoch FROM clock_timestamp() - min(created_at))
                                 AS double precision), 0)) AS oldest_waiting_seconds,
       min(available_at) AS next_try_at
  FROM outbox.events
 WHERE destination = 'reminders' AND organization_id = :organization_id
""")


async def reminders(connection: AsyncConnection, *, organization_id: UUID) -> Reminders:
    """
    Count the organisation's reminders that wait, and those that were given up lately.
    """
    row = await connection.execute(
        REMINDERS, {"organization_id": organization_id, "days": GIVEN_UP_DAYS}
    )
    gate = await look(
        connection, destination=reminding.DESTINATION, organization_id=organization_id
    )
    return Reminders(**row.mappings().one(), gate=gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """
    A mentor whose state did not get through.

    Args:
        visible: what the portal should have shown.
        recoverable: the cause may pass by itself, and then it is tried again.
        trying_again: the mentor's state is on its way again.
    """

    id: UUID
    mentor_id: UUID
    mentor_name: str
    certification_id: UUID | None
    visible: bool
    version: int
    attempted_at: datetime
    error_code: str
    error_message: str
    retry_count: int
    recoverable: bool
    created_at: datetime
    resolved_at: datetime | None
    resolution: str | None
    resolved_by: str | None
    trying_again: bool

    @property
    def consequence(self) -> str:
        """
        What may be wrong on the portal meanwhile.
        """
        if self.resolved_at:
            return "in order"
        return "may not be visible yet" if self.visible else "may still be visible"


FAILURES = text("""
SELECT failure.id, failure.mentor_id, failure.certification_id, failure.visible,
       failure.version, failure.attempted_at, failure.error_code, failure.error_message,
       failure.retry_count, failure.recoverable, failure.created_at, failure.resolved_at,
       failure.resolution,
       failure.resolved_by,
       coalesce(mentor.full_name, '') AS mentor_name,
       failure.resolved_at IS NULL
       AND EXISTS (SELECT FROM outbox.events AS live
                    WHERE live.destination = 'dynamics'
                      AND live.key = CAST(failure.mentor_id AS text)) AS trying_again
  FROM public.dynamics_sync_failures AS failure
  LEFT JOIN public.mentors AS mentor ON mentor.id = failure.mentor_id
 WHERE failure.organization_id = :organization_id
   AND (failure.resolved_at IS NULL OR :resolved_too)
 ORDER BY failure.resolved_at DESC NULLS FIRST, failure.created_at, failure.id
 LIMIT :limit
""")


async def failures(
    connection: AsyncConnection,
    *,
    organization_id: UUID,
    resolved_too: bool = False,
    limit: int = MOST_FAILURES,
) -> list[Failure]:
    """
    Open failures, the oldest first; with `resolved_too`, the resolved ones after them.
    """
    rows = await connection.execute(
        FAILURES,
        {"organization_id": organization_id, "resolved_too": resolved_too, "limit": limit},
    )
    return [Failure(**row) for row in rows.mappings()]


OPEN_FAILURES = text("""
SELECT count(*) FROM public.dynamics_sync_failures
 WHERE organization_id = :organization_id AND resolved_at IS NULL
""")


async def open_failures(connection: AsyncConnection, *, organization_id: UUID) -> int:
    """
    How many mentors a person has to look at.
    """
    count = await connection.scalar(OPEN_FAILURES, {"organization_id": organization_id})
    return int(count or 0)


# ------------------------------------------------------------------------------ the page

MOST_COUNTED = 10_000
"""Of one kind; what is more is said to be more."""

SHOWN = 50
"""Rows of a table, unless more are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Concern:
    """
    A mentor whom the portal may show wrongly now.

    Args:
        failure_id: of the open failure, if there is one.
        visible: what the portal has to show.
        since: when it should have.
        error_code: of the last attempt; None if there was none.
        attempts: of the state that is on its way.
        next_try_at: None if nothing is tried before somebody acts or Dynamics is back.
        trying_now: a request is under way.
        retried_by: who had it tried again, if anybody did.
    """

    mentor_id: UUID
    mentor_name: str
    failure_id: UUID | None
    visible: bool
    since: datetime
    error_code: str | None
    attempts: int
    next_try_at: datetime | None
    trying_now: bool
    retried_by: str | None = None
    retried_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Concerns:
    """
    The first of them, and how many there are in all, up to `MOST_COUNTED`.

    Args:
        to_hide: how many of them may still be visible.
    """

    first: list[Concern]
    number: int = 0
    to_hide: int = 0

    @property
    def more(self) -> bool:
        """
        Whether not all are here.
        """
        return self.number > len(self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """
    All that a coordinator has to know now, from a bounded look at the database.

    Args:
        needing: nothing more happens before somebody acts.
        waiting: on their way, or tried again when Dynamics is back.
        unaccounted: as in `Status`, up to `MOST_COUNTED`; without those handled by hand.
        looked_at: by the database's clock.
    """

    needing: Concerns
    waiting: Concerns
    unaccounted: int
    gate: Gate
    looked_at: datetime

    @property
    def maybe_visible(self) -> int:
        """
        Mentors who may still be visible and must not be.
        """
        return self.needing.to_hide + self.waiting.to_hide

    @property
    def maybe_hidden(self) -> int:
        """
        Mentors who may not be visible yet.
        """
        return self.needing.number + self.waiting.number - self.maybe_visible

    @property
    def in_order(self) -> bool:
        """
        Whether the portal shows what it has to show, as far as anybody knows.
        """
        return not (self.needing.number or self.waiting.number or self.unaccounted)


# One pass over what failed and what is on its way, put together by mentor. A look-up per mentor
# would do as well, were it not for the moment in which very many have just come, and the planner
# believes that there is one: it then compares all with all. OFFSET 0 keeps it from doing so where
# there is one index to look into.
BOARD = text("""
WITH change AS (
    (SELECT mentor_id, id AS failure_id, visible, created_at AS since, error_code, recoverable,
            CAST(NULL AS bigint) AS version, 0 AS attempts,
            CAST(NULL AS timestamptz) AS next_try_at, false AS trying_now
       FROM public.dynamics_sync_failures
      WHERE organization_id = :organization_id AND resolved_at IS NULL
      LIMIT :most)
     UNION ALL
    (SELECT CAST(key AS uuid), NULL, CAST(payload ->> 'visible' AS boolean), created_at,
            last_error_code, false, version, attempts, available_at, claim_token IS NOT NULL
       FROM outbox.events
      WHERE destination = 'dynamics' AND organization_id = :organization_id
      LIMIT :most)
),
mentor AS MATERIALIZED (
    SELECT mentor_id,
           (array_agg(failure_id) FILTER (WHERE failure_id IS NOT NULL))[1] AS failure_id,
           coalesce(bool_or(visible) FILTER (WHERE version IS NOT NULL),
                    bool_or(visible)) AS visible,
           min(since) AS since,
           coalesce(min(error_code) FILTER (WHERE version IS NOT NULL),
                    min(error_code)) AS error_code,
           bool_or(recoverable) AS recoverable,
           max(version) AS version,
           max(attempts) AS attempts,
           max(next_try_at) AS next_try_at,
           bool_or(trying_now) AS trying_now
      FROM change
     GROUP BY mentor_id
),
-- Whose state is on its way waits, also after a failure; so does whoever is tried again as soon
-- as Dynamics is back. What is only said once more, as an older request may still arrive, is
-- no concern.
concern AS MATERIALIZED (
    SELECT mentor.*, version IS NOT NULL OR (recoverable AND :shut) AS waits
      FROM mentor
     WHERE version IS NULL
        OR NOT EXISTS (SELECT FROM public.portal_confirmations AS confirmed
                        WHERE confirmed.mentor_id = mentor.mentor_id
                          AND confirmed.version >= mentor.version
                       OFFSET 0)
),
first AS (
    (SELECT * FROM concern WHERE NOT waits ORDER BY since, mentor_id LIMIT :shown)
     UNION ALL
    (SELECT * FROM concern WHERE waits ORDER BY visible, since, mentor_id LIMIT :shown)
)
SELECT first.mentor_id, first.failure_id, first.visible, first.since, first.error_code,
       first.attempts, first.next_try_at, first.trying_now, first.waits,
       coalesce(register.full_name, '') AS mentor_name,
       retried.name AS retried_by, retried.at AS retried_at,
       counted.*
  FROM first
  LEFT JOIN public.mentors AS register ON register.id = first.mentor_id
  LEFT JOIN LATERAL (
       SELECT name, at
         FROM outbox.audit
        WHERE target = first.failure_id AND action = 'retry' AND outcome = 'started'
        ORDER BY at DESC
        LIMIT 1) AS retried ON first.waits
 CROSS JOIN (
       SELECT count(*) FILTER (WHERE NOT waits) AS needing,
              count(*) FILTER (WHERE NOT waits AND NOT visible) AS needing_to_hide,
              count(*) FILTER (WHERE waits) AS waiting,
              count(*) FILTER (WHERE waits AND NOT visible) AS waiting_to_hide
         FROM concern) AS counted
 ORDER BY first.waits, CASE WHEN first.waits THEN first.visible END, first.since,
          first.mentor_id
""")

# EXCEPT is sorted or hashed, never all compared with all.
UNACCOUNTED = text("""
WITH unconfirmed AS MATERIALIZED (
    SELECT desired.mentor_id, desired.version
      FROM public.portal_visibility AS desired
      LEFT JOIN public.portal_confirmations AS confirmed USING (mentor_id)
     WHERE desired.organization_id = :organization_id
       AND (confirmed.version < desired.version OR confirmed.version IS NULL)
)
SELECT least(count(*), :most)
  FROM (SELECT mentor_id FROM unconfirmed
        EXCEPT
        SELECT CAST(key AS uuid) FROM outbox.events
         WHERE destination = 'dynamics' AND organization_id = :organization_id
        EXCEPT
        SELECT mentor_id FROM public.dynamics_sync_failures
         WHERE organization_id = :organization_id AND resolved_at IS NULL
        EXCEPT
        SELECT handled.mentor_id
          FROM public.dynamics_sync_failures AS handled
          JOIN unconfirmed USING (mentor_id)
         WHERE handled.organization_id = :organization_id AND handled.resolution = 'manual'
           AND handled.version >= unconfirmed.version) AS mentor
""")

CLOCK = text("SELECT clock_timestamp()")


async def unaccounted(connection: AsyncConnection, *, organization_id: UUID) -> int:
    """
    Mentors the portal did not confirm, and about whom nothing is on its way.

    Reads all of the organisation's mentors, so it is not for every second.
    """
    parameters = {"organization_id": organization_id, "most": MOST_COUNTED}
    return int(await connection.scalar(UNACCOUNTED, parameters) or 0)


async def board(
    connection: AsyncConnection,
    *,
    organization_id: UUID,
    unaccounted: int,
    shown: int = SHOWN,
) -> Board:
    """
    What the page shows now.

    Args:
        unaccounted: as counted lately.
        shown: rows of each table at most.
    """
    gate = await look(connection, destination=DESTINATION, organization_id=organization_id)
    result = await connection.execute(
        BOARD,
        {
            "organization_id": organization_id,
            "shut": gate.state != "open",
            "most": MOST_COUNTED,
            "shown": shown,
        },
    )
    rows = result.mappings().all()
    return Board(
        needing=_concerns(rows, "needing", waits=False),
        waiting=_concerns(rows, "waiting", waits=True),
        unaccounted=unaccounted,
        gate=gate,
        looked_at=(await connection.execute(CLOCK)).scalar_one(),
    )


def _concerns(rows: Sequence[RowMapping], name: str, *, waits: bool) -> Concerns:
    if not rows:
        return Concerns(first=[])
    return Concerns(
        first=[
            Concern(**{field: row[field] for field in _CONCERN})
            for row in rows
            if row["waits"] is waits
        ],
        number=min(MOST_COUNTED, rows[0][name]),
        to_hide=min(MOST_COUNTED, rows[0][f"{name}_to_hide"]),
    )


_CONCERN = [one.name for one in fields(Concern)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """
    A mentor who was put in order.

    Args:
        visible: what the portal shows since.
        by: who did it by hand; None if Dynamics confirmed it.
    """

    mentor_id: UUID
    mentor_name: str
    visible: bool
    settled_at: datetime
    by: str | None


LATELY_DAYS = 7

LATELY = text("""
WITH delivered AS MATERIALIZED (
    SELECT CAST(key AS uuid) AS mentor_id, CAST(payload ->> 'visible' AS boolean) AS visible,
           settled_at, CAST(NULL AS text) AS by
      FROM outbox.settled
     WHERE outcome = 'delivered' AND settled_at > now() - make_interval(days => :days)
       AND destination = 'dynamics' AND organization_id = :organization_id
     ORDER BY settled_at DESC
     LIMIT :shown
),
handled AS MATERIALIZED (
    SELECT mentor_id, visible, resolved_at, coalesce(resolved_by, '')
      FROM public.dynamics_sync_failures
     WHERE organization_id = :organization_id AND resolution = 'manual'
       AND resolved_at > now() - make_interval(days => :days)
     ORDER BY resolved_at DESC
     LIMIT :shown
),
lately AS (
    SELECT * FROM delivered UNION ALL SELECT * FROM handled
     ORDER BY settled_at DESC
     LIMIT :shown
)
SELECT lately.*, coalesce(mentor.full_name, '') AS mentor_name
  FROM lately LEFT JOIN public.mentors AS mentor ON mentor.id = lately.mentor_id
 ORDER BY lately.settled_at DESC, lately.mentor_id
""")


async def settled_lately(
    connection: AsyncConnection, *, organization_id: UUID, shown: int = SHOWN
) -> list[Settled]:
    """
    Who was put in order in the last `LATELY_DAYS` days, the latest first.
    """
    rows = await connection.execute(
        LATELY, {"organization_id": organization_id, "days": LATELY_DAYS, "shown": shown}
    )
    return [Settled(**row) for row in rows.mappings()]
