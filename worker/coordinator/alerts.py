"""
What waits and what failed, for one organisation, and what that means in plain words.

Reminders are counted by themselves: that one was given up is nothing about the portal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

from outbox.gate import Gate, look
from worker.certifications import reminders as reminding
from worker.certifications.visibility import DESTINATION

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

REASONS = {
    "throttled": "Dynamics is busy",
    "token_throttled": "Dynamics is busy",
    "unavailable": "Dynamics did not answer",
    "server_error": "Dynamics did not answer",
    "server_timeout": "Dynamics did not answer",
    "bad_gateway": "Dynamics did not answer",
    "unreachable": "Dynamics did not answer",
    "timeout": "Dynamics did not answer",
    "connection_lost": "Dynamics did not answer",
    "token_unavailable": "Dynamics did not answer",
    "token_unusable": "Dynamics did not answer",
    "interrupted": "it was interrupted; the answer is not known",
    "late": "our own computer was too slow",
    "database": "our own database did not answer",
    "abandoned": "our own program broke off each time; tell IT",
    "unexpected_answer": "Dynamics gave an unexpected answer; tell IT",
    "incomplete_answer": "Dynamics gave an unexpected answer; tell IT",
    "record_not_found": "the mentor was not found in Dynamics",
    "mentor_unknown": "the mentor is not in our own register any more",
    "mentor_not_linked": "the mentor is not linked to Dynamics",
    "record_access_denied": "we may not change this mentor in Dynamics; tell IT",
    "duplicate": "Dynamics did not accept the change for this mentor; tell IT",
    "precondition_failed": "Dynamics did not accept the change for this mentor; tell IT",
    "invalid_value": "Dynamics did not accept the change for this mentor; tell IT",
    "bad_request": "Dynamics did not accept the change for this mentor; tell IT",
    "forbidden": "we have no access to Dynamics; tell IT",
    "not_a_user": "we have no access to Dynamics; tell IT",
    "unauthorized": "we have no access to Dynamics; tell IT",
    "token_refused": "we have no access to Dynamics; tell IT",
    "secret_missing": "we have no access to Dynamics; tell IT",
    "secret_unreadable": "we have no access to Dynamics; tell IT",
    "wrong_address": "our connection to Dynamics is set up wrongly; tell IT",
    "key_not_defined": "our connection to Dynamics is set up wrongly; tell IT",
    "payload_refused": "our connection to Dynamics is set up wrongly; tell IT",
    "method_not_allowed": "our connection to Dynamics is set up wrongly; tell IT",
    "redirect_refused": "our connection to Dynamics is set up wrongly; tell IT",
    "certificate": "our connection to Dynamics is set up wrongly; tell IT",
    "invalid_address": "our connection to Dynamics is set up wrongly; tell IT",
    "webhook_throttled": "the service that sends reminders is busy",
    "webhook_unavailable": "the service that sends reminders did not answer",
    "webhook_unreachable": "the service that sends reminders did not answer",
    "webhook_timeout": "the service that sends reminders did not answer",
    "webhook_connection_lost": "the service that sends reminders did not answer",
    "webhook_refused": "the service that sends reminders did not accept this one; tell IT",
    "webhook_unauthorized": "our connection to the reminders is set up wrongly; tell IT",
    "webhook_wrong_address": "our connection to the reminders is set up wrongly; tell IT",
    "webhook_certificate": "our connection to the reminders is set up wrongly; tell IT",
    "webhook_secret_missing": "our connection to the reminders is set up wrongly; tell IT",
    "other_host": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_throttled": "Supabase is busy",
    "edge_unavailable": "Supabase did not answer",
    "edge_unreachable": "Supabase did not answer",
    "edge_timeout": "Supabase did not answer",
    "edge_connection_lost": "Supabase did not answer",
    "edge_incomplete_answer": "Supabase gave an unexpected answer; tell IT",
    "edge_unexpected_answer": "Supabase gave an unexpected answer; tell IT",
    "edge_failed": "our own program broke off at Supabase; tell IT",
    "edge_stopped": "our own program broke off at Supabase; tell IT",
    "edge_restricted": "our Supabase project is restricted; tell IT",
    "edge_key_unusable": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_key_refused": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_missing": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_refused": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_not_set_up": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_other_organization": "our connection to Dynamics is set up wrongly; tell IT",
    "edge_other_target": "our connection to Dynamics is set up wrongly; tell IT",
}
"""Why a mentor's state did not get through, by error code; see `reason`."""

MOST_FAILURES = 1000
"""That one list shows."""


def reason(error_code: str | None) -> str:
    """
    An error code in words for a coordinator.
    """
    if error_code is None:
        return "not tried yet"
    if error_code.startswith("http_"):
        return "Dynamics gave an unexpected answer; tell IT"
    return REASONS.get(error_code, "something unexpected happened; tell IT")


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


STATUS = text("""
SELECT count(*) FILTER (WHERE confirmed) AS in_order,
       count(*) FILTER (WHERE NOT confirmed AND live AND NOT visible) AS waiting_to_hide,
       count(*) FILTER (WHERE NOT confirmed AND live AND visible) AS waiting_to_show,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND failed AND NOT visible)
           AS failed_to_hide,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND failed AND visible)
           AS failed_to_show,
       count(*) FILTER (WHERE NOT confirmed AND NOT live AND NOT failed) AS unaccounted,
       count(*) FILTER (WHERE confirmed AND live) AS asserting_again,
       greatest(0, coalesce(CAST(extract(epoch FROM clock_timestamp() - min(created_at)
           FILTER (WHERE NOT confirmed)) AS double precision), 0)) AS oldest_waiting_seconds,
       min(available_at) AS next_try_at,
       max(confirmed_at) AS last_confirmed_at
  FROM (SELECT desired.visible, confirmation.confirmed_at,
               coalesce(confirmation.version >= desired.version, false) AS confirmed,
               event.id IS NOT NULL AS live,
               event.created_at, event.available_at,
               failure.id IS NOT NULL AS failed
          FROM public.portal_visibility AS desired
          LEFT JOIN public.portal_confirmations AS confirmation USING (mentor_id)
          LEFT JOIN outbox.events AS event
            ON event.destination = 'dynamics' AND event.key = CAST(desired.mentor_id AS text)
          LEFT JOIN public.dynamics_sync_failures AS failure
            ON failure.mentor_id = desired.mentor_id AND failure.resolved_at IS NULL
         WHERE desired.organization_id = :organization_id
         UNION ALL
        -- Mentors who are not ours any more, and whom the portal may still show.
        SELECT failure.visible, NULL, false, false, NULL, NULL, true
          FROM public.dynamics_sync_failures AS failure
         WHERE failure.organization_id = :organization_id AND failure.resolved_at IS NULL
           AND NOT EXISTS (SELECT FROM public.portal_visibility AS desired
                            WHERE desired.mentor_id = failure.mentor_id
                              AND desired.organization_id = :organization_id)) AS mentor
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
                          AND later.id > dead.id)
       AND NOT EXISTS (SELECT FROM outbox.events AS live
                        WHERE live.destination = dead.destination AND live.key = dead.key)
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
