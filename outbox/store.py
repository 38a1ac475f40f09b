"""
All SQL about events, in the order of an event's life: enqueue, claim, settle, prune.

Nothing here commits or rolls back: every function takes the caller's connection.
Times are the database's, delays are passed in seconds. Statements are plain text with
bound parameters and one JSON document for a batch, so that what is read here is what runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from outbox import driver
from outbox.event import Event, NewEvent
from outbox.gate import STATE
from outbox.outcome import Dead, Deferred, Delivered, Ending, Outcome, Retry, Settlement, Skipped

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox.gate import GateState


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """
    A claimed event and what its attempt led to.
    """

    event: Event
    outcome: Outcome

    @property
    def token(self) -> UUID:
        """
        Of the claim: a process that stood still may land two flights of one event.
        """
        return self.event.claim_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """
    What a call of `settle` did with its attempts.

    Args:
        written: one per attempt that was still ours.
        busy: ours, but a business transaction holds the row; settle these again.
        lost: the lease ended and somebody else holds them; nothing was written.
    """

    written: list[Settlement] = field(default_factory=list)
    busy: list[Landed] = field(default_factory=list)
    lost: list[Landed] = field(default_factory=list)


# ------------------------------------------------------------------------------- enqueue

# Most transactions have one event, of a key that has none. What there is to do about an event
# that is there already costs more to parse and plan than the new row costs to write.
ENQUEUE_NEW = text("""
INSERT INTO outbox.events
       (destination, key, organization_id, version, payload, priority, traceparent)
VALUES (:destination, :key, :organization_id, :version, CAST(:payload AS jsonb),
        :priority, :traceparent)
    ON CONFLICT (destination, key) DO NOTHING
RETURNING true
""")

ENQUEUE = text("""
INSERT INTO outbox.events AS live
       (destination, key, organization_id, version, payload, priority, traceparent)
SELECT destination, key, organization_id, version, payload, priority, traceparent
  FROM jsonb_to_recordset(CAST(:events AS jsonb))
       AS new (destination text, key text, organization_id uuid, version bigint,
               payload jsonb, priority smallint, traceparent text)
 ORDER BY destination, key
    ON CONFLICT (destination, key) DO UPDATE
   SET organization_id = excluded.organization_id,
       version = excluded.version,
       payload = excluded.payload,
       priority = excluded.priority,
       traceparent = excluded.traceparent,
       created_at = excluded.created_at,
       replaced = live.replaced + 1,
       -- An event in flight keeps its lease and its count; settling finds the new version.
       available_at = CASE WHEN live.claim_token IS NULL
                           THEN excluded.available_at ELSE live.available_at END,
       attempts = CASE WHEN live.claim_token IS NULL THEN 0 ELSE live.attempts END,
       first_attempt_at = CASE WHEN live.claim_token IS NULL
                               THEN NULL ELSE live.first_attempt_at END,
       last_error_code = CASE WHEN live.claim_token IS NULL
                              THEN NULL ELSE live.last_error_code END
 WHERE live.version < excluded.version
""")


async def enqueue(connection: AsyncConnection, events: Iterable[NewEvent]) -> None:
    """
    Make these the states to deliver, in the caller's transaction.

    Of several versions of one key the highest wins, whether they come in one call, in one
    transaction or from different ones. That an older one does not come after a newer one has
    ended is the caller's part: draw versions under a lock of what the key stands for. Keys
    are locked in ascending order. Raises nothing that an older or repeated version could
    cause.
    """
    newest: dict[tuple[str, str], NewEvent] = {}
    for event in events:
        identity = (event.destination, event.key)
        if identity not in newest or newest[identity].version < event.version:
            newest[identity] = event
    rows = [_new_event_as_json(event) for event in newest.values()]
    if len(rows) == 1 and await _insert_if_new(connection, rows[0]):
        return
    if rows:
        await connection.execute(ENQUEUE, {"events": json.dumps(rows, separators=(",", ":"))})


async def _insert_if_new(connection: AsyncConnection, row: dict[str, Any]) -> bool:
    """
    Whether there was no event of this key; now there is.
    """
    parameters = row | {"payload": json.dumps(row["payload"])}
    return bool(await driver.execute(connection, ENQUEUE_NEW, parameters))


def _new_event_as_json(event: NewEvent) -> dict[str, Any]:
    return {
        "destination": event.destination,
        "key": event.key,
        "organization_id": str(event.organization_id),
        "version": event.version,
        "payload": event.payload,
        "priority": event.priority,
        "traceparent": event.traceparent,
    }


# --------------------------------------------------------------------------------- claim


class Position(NamedTuple):
    """
    Of a waiting event, in the order in which events are claimed.
    """

    priority: int
    available_at: datetime
    id: int


START = Position(priority=-(2**15), available_at=datetime(1, 1, 1, tzinfo=UTC), id=0)
"""Before every event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """
    What a claim found.

    Args:
        gate: how the destination's gate stood; unless it is open, there are no events.
        events: in the order in which they should go.
        last: where the last of them was, or START if there is none.
        due: how many were found; what changed meanwhile is left to the next claim.
    """

    gate: GateState
    events: list[Event]
    last: Position
    due: int

    @property
    def is_overtaken(self) -> bool:
        """
        Whether some that are due were left.
        """
        return len(self.events) < self.due


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """
    What a delivery needs from the application's tables, read by the claim itself.

    Args:
        sql: one value about the row `claimed`, a live event; NULL if there is none.
        parameters: bound in it, beside those of a claim.
    """

    sql: str
    parameters: Mapping[str, object] = field(default_factory=dict)


NOTHING = LookUp(sql="NULL")
"""For deliveries that need the event alone."""

_CLAIM = """
WITH gate AS MATERIALIZED (
    SELECT closed_until, {state} AS state
      FROM outbox.gates
     WHERE destination = :destination AND organization_id = :organization_id
),
-- MATERIALIZED is a fence: without it the planner may run the LIMIT more than once.
due AS MATERIALIZED (
    SELECT ctid AS place, destination, key, claimed_version, available_at AS due_at,
           claim_token IS NOT NULL AS abandoned,
           -- The gate closed since the first attempt: an outage burns no attempts.
           claim_token IS NULL
           AND coalesce(first_attempt_at < (SELECT closed_until FROM gate), false) AS held_back,
           -- Nobody came in time: a series that was interrupted gets a new window.
           available_at < now() - make_interval(secs => :slack_seconds) AS overdue
      FROM outbox.events
     WHERE destination = :destination
       AND organization_id = :organization_id
       AND (priority, available_at, id) > (:after_priority, :after_available_at, :after_id)
       AND available_at <= now()
       AND {admitted}
     ORDER BY {order}
     LIMIT :limit
       FOR NO KEY UPDATE SKIP LOCKED
),
-- Whoever held an abandoned claim may have sent its version; it may yet arrive.
doubted AS (
    INSERT INTO outbox.doubts AS doubt (destination, key, version, until)
    SELECT destination, key, claimed_version, now() + make_interval(secs => :doubt_seconds)
      FROM due
     WHERE abandoned
        ON CONFLICT (destination, key, version) DO UPDATE SET until = excluded.until
),
claimed AS (
    UPDATE outbox.events AS event
       SET claim_token = gen_random_uuid(),
           claimed_version = event.version,
           claimed_by = :worker_id,
           available_at = now() + make_interval(secs => :lease_seconds),
           -- What workers did to an older version does not count against a newer one.
           attempts = CASE WHEN due.held_back OR event.version > due.claimed_version THEN 1
                           ELSE event.attempts + 1 END,
           first_attempt_at = CASE WHEN event.first_attempt_at IS NULL
                                     OR due.held_back OR due.abandoned OR due.overdue
                                   THEN now() ELSE event.first_attempt_at END
      FROM due
     -- By its place, which no statistics make a bad plan of. What was updated since this statement
     -- began has moved, and is the next one's: the look-up would be too old for it.
     WHERE event.ctid = due.place
    RETURNING due.due_at,
              event.id, event.destination, event.key, event.organization_id, event.version,
              event.payload, event.priority, event.created_at, event.attempts,
              CAST(extract(epoch FROM now() - event.first_attempt_at) AS double precision)
              AS elapsed_seconds,
              event.claim_token, event.last_error_code, event.traceparent
)
SELECT coalesce((SELECT state FROM gate), 'open') AS gate, (SELECT count(*) FROM due) AS due,
       claimed.*, ({look_up}) AS found
  FROM (VALUES (true)) AS always LEFT JOIN claimed ON true
"""

_ADMITTED = "coalesce((SELECT state FROM gate), 'open') = 'open'"


@cache
def claim_statement(look_up: str = NOTHING.sql, *, probing: bool = False) -> TextClause:
    """
    Its text is made once for each look-up.
    """
    return text(
        _CLAIM.format(
            state=STATE,
            look_up=look_up,
            admitted="true" if probing else _ADMITTED,
            # Probes take turns: an urgent event that fails each time must not keep the gate shut.
            order="available_at, id" if probing else "priority, available_at, id",
        )
    )


async def claim(
    connection: AsyncConnection,
    *,
    destination: str,
    organization_id: UUID,
    worker_id: UUID,
    limit: int,
    lease_seconds: float,
    slack_seconds: float,
    doubt_seconds: float,
    look_up: LookUp = NOTHING,
    after: Position = START,
    probing: bool = False,
) -> Claimed:
    """
    Take up to `limit` due events, urgent and old ones first; commit before delivering.

    Nothing comes through a gate that is not open, save a probe. The attempt is counted here,
    so that an event which kills its worker runs out of attempts too. An event whose lease
    ended is due again by itself.

    Args:
        worker_id: new for each process, never a host name: those come back.
        lease_seconds: how long the events are ours.
        slack_seconds: of the retry policy; what is later than that begins a new window.
        doubt_seconds: how long an abandoned claim's request may still take effect.
        look_up: what each event is to have as `found`.
        after: leave out what stands before. What is gone leaves its entry in the index as
            long as some other session's snapshot is old, and all of them would be read.
        probing: take what has waited longest, whatever its priority, from a half-open gate.
    """
    rows = await driver.execute(
        connection,
        claim_statement(look_up.sql, probing=probing),
        {
            "destination": destination,
            "organization_id": organization_id,
            "worker_id": worker_id,
            "limit": limit,
            "lease_seconds": lease_seconds,
            "slack_seconds": slack_seconds,
            "doubt_seconds": doubt_seconds,
            "after_priority": after.priority,
            "after_available_at": after.available_at,
            "after_id": after.id,
            **look_up.parameters,
        },
    )
    state, due, *_ = rows[0]
    events, last = [], START
    for _, _, due_at, *values in rows:
        if due_at is not None:
            event = Event(**dict(zip(_EVENT, values, strict=True)))
            events.append(event)
            last = max(last, Position(event.priority, due_at, event.id))
    # RETURNING has no order.
    events.sort(key=lambda event: (event.priority, event.created_at, event.id))
    return Claimed(gate=state, events=events, last=last, due=due)


_EVENT = [one.name for one in fields(Event)]


# -------------------------------------------------------------------------------- settle

SETTLE = text("""
-- What a business transaction holds is left for the next flush: the worker never waits. Rows are
-- found one by one and written by their places, whatever the statistics say of a table that is
-- empty most of the time. What was updated since this statement began has moved, and is the next
-- flush's, too.
WITH held AS MATERIALIZED (
    SELECT event.place, report.id, event.destination, event.key, event.organization_id,
           event.first_attempt_at, report.token, event.version > report.version AS moved_on,
           report.version, report.payload, report.created_at, report.attempts,
           report.outcome, report.after_seconds, report.code
      FROM jsonb_to_recordset(CAST(:attempts AS jsonb))
           AS report (id bigint, token uuid, version bigint, payload jsonb,
                      created_at timestamptz, attempts integer, outcome text,
                      after_seconds double precision, code text)
     CROSS JOIN LATERAL (
           SELECT ctid AS place, destination, key, organization_id, first_attempt_at, version
             FROM outbox.events
            WHERE id = report.id AND claim_token = report.token
              FOR UPDATE SKIP LOCKED) AS event
),
verdict AS MATERIALIZED (
    SELECT held.*,
           CASE WHEN outcome IN ('delivered', 'skipped') THEN outcome
                WHEN moved_on THEN 'superseded'
                WHEN outcome = 'dead' THEN 'dead'
           END AS ending,
           -- A slow request of an older version may have landed since this one was sent, or
           -- may land yet: say it again then. Sent after the first attempt began, that is sure.
           CASE WHEN outcome = 'delivered' AND NOT moved_on THEN (
                    SELECT max(doubt.until) FILTER (WHERE doubt.until > held.first_attempt_at)
                      FROM outbox.doubts AS doubt
                     WHERE doubt.destination = held.destination AND doubt.key = held.key
                       AND doubt.version < held.version)
           END AS assert_again_at
      FROM held
),
removed AS (
    DELETE FROM outbox.events AS event
     USING verdict
     WHERE event.ctid = verdict.place
       AND verdict.ending IS NOT NULL
       AND NOT verdict.moved_on
       AND verdict.assert_again_at IS NULL
    RETURNING verdict.*
),
kept AS (
    UPDATE outbox.events AS event
       SET claim_token = NULL,
           claimed_version = NULL,
           claimed_by = NULL,
           available_at = CASE
               WHEN verdict.moved_on THEN now()
               ELSE coalesce(verdict.assert_again_at,
                             now() + make_interval(secs => verdict.after_seconds)) END,
           attempts = CASE
               WHEN verdict.ending IS NOT NULL THEN 0
               WHEN verdict.outcome = 'deferred' THEN event.attempts - 1
               ELSE event.attempts END,
           first_attempt_at = CASE
               WHEN verdict.ending IS NOT NULL THEN NULL
               WHEN verdict.outcome = 'deferred' AND event.attempts = 1 THEN NULL
               ELSE event.first_attempt_at END,
           last_error_code = CASE WHEN verdict.ending IS NULL THEN verdict.code END
      FROM verdict
     WHERE event.ctid = verdict.place
       AND (verdict.ending IS NULL OR verdict.moved_on OR verdict.assert_again_at IS NOT NULL)
    RETURNING verdict.*
),
written AS (
    TABLE removed UNION ALL TABLE kept
),
logged AS (
    INSERT INTO outbox.settled (event_id, destination, key, organization_id, version, payload,
                                outcome, attempts, error_code, created_at)
    SELECT id, destination, key, organization_id, version, payload,
           ending, attempts, code, created_at
      FROM written
     WHERE ending IS NOT NULL
     ORDER BY id
)
SELECT token, ending FROM written
""")

# Apart, because it is rare and its plan is a seventh of what settling costs a single event.
DOUBT = text("""
INSERT INTO outbox.doubts AS doubt (destination, key, version, until)
SELECT destination, key, version, now() + make_interval(secs => :doubt_seconds)
  FROM jsonb_to_recordset(CAST(:doubts AS jsonb))
       AS new (destination text, key text, version bigint)
    ON CONFLICT (destination, key, version) DO UPDATE SET until = excluded.until
""")

STILL_HELD = text("""
SELECT attempt.token
  FROM jsonb_to_recordset(CAST(:attempts AS jsonb)) AS attempt (id bigint, token uuid)
 WHERE attempt.token = (SELECT claim_token FROM outbox.events WHERE id = attempt.id)
""")


async def settle(
    connection: AsyncConnection, landed: Sequence[Landed], *, doubt_seconds: float
) -> Settled:
    """
    Write what became of these attempts, each only if its claim is still ours.

    In the caller's transaction: one statement for event and history, and one more if an answer
    stayed away. If a newer version came during the flight, the attempted one goes into the
    history and the event is due again at once, with no attempts counted.
    """
    document = json.dumps([_as_json(one) for one in landed], default=str)
    written = await driver.execute(connection, SETTLE, {"attempts": document})
    endings: dict[UUID, Ending | None] = dict(written)
    doubts = [_doubt(one.event) for one in landed if one.token in endings and _is_doubtful(one)]
    if doubts:
        parameters = {"doubts": json.dumps(doubts), "doubt_seconds": doubt_seconds}
        await connection.execute(DOUBT, parameters)
    missing = [one for one in landed if one.token not in endings]
    held: set[UUID] = set()
    if missing:
        rows = await connection.execute(STILL_HELD, {"attempts": document})
        held = {row.token for row in rows}
    return Settled(
        written=[_settlement(one, endings[one.token]) for one in landed if one.token in endings],
        busy=[one for one in missing if one.token in held],
        lost=[one for one in missing if one.token not in held],
    )


def _as_json(landed: Landed) -> dict[str, Any]:
    event, outcome = landed.event, landed.outcome
    row: dict[str, Any] = {
        "id": event.id,
        "token": event.claim_token,
        "version": event.version,
        "payload": event.payload,
        "created_at": event.created_at.isoformat(),
        "attempts": event.attempts,
        "outcome": type(outcome).__name__.lower(),
        "after_seconds": 0.0,
        "code": None,
    }
    match outcome:
        case Delivered():
            return row
        case Skipped(reason=reason):
            return row | {"code": reason}
        case Retry() | Deferred():
            return row | {"after_seconds": outcome.after_seconds, "code": outcome.code}
        case Dead():
            return row | {"code": outcome.code}


def _is_doubtful(landed: Landed) -> bool:
    match landed.outcome:
        case Delivered() | Skipped():
            return False
        case Retry() | Deferred() | Dead() as outcome:
            return outcome.doubtful


def _doubt(event: Event) -> dict[str, Any]:
    return {"destination": event.destination, "key": event.key, "version": event.version}


def _settlement(landed: Landed, ending: Ending | None) -> Settlement:
    event, outcome = landed.event, landed.outcome
    return Settlement(
        event_id=event.id,
        destination=event.destination,
        key=event.key,
        organization_id=event.organization_id,
        version=event.version,
        payload=event.payload,
        outcome=outcome,
        ending=ending,
        retries=max(0, event.attempts - 1),
    )


# --------------------------------------------------------------------------------- prune

PRUNE_SETTLED = text("""
WITH old AS MATERIALIZED (
    SELECT id FROM outbox.settled
     WHERE outcome = :outcome AND settled_at < now() - make_interval(days => :days)
     ORDER BY settled_at
     LIMIT :limit
       FOR UPDATE SKIP LOCKED
)
DELETE FROM outbox.settled AS settled USING old WHERE settled.id = old.id
""")

PRUNE_DOUBTS = text("""
WITH old AS MATERIALIZED (
    SELECT destination, key, version FROM outbox.doubts
     WHERE until < now() - make_interval(secs => :kept_seconds)
     ORDER BY until
     LIMIT :limit
       FOR UPDATE SKIP LOCKED
)
DELETE FROM outbox.doubts AS doubt USING old
 WHERE (doubt.destination, doubt.key, doubt.version) = (old.destination, old.key, old.version)
""")


KEEP_DOUBTS_SECONDS = 86_400.0
"""A doubt that is past still counts for what was sent before: results may be written late."""


async def prune(
    connection: AsyncConnection, *, keep_days: Mapping[str, int], limit: int = 1000
) -> int:
    """
    Forget history older than `keep_days` of its outcome, and doubts that are long past.

    Returns how many rows went; at most `limit` of each kind, so call again while it is high.
    """
    parameters = {"limit": limit, "kept_seconds": KEEP_DOUBTS_SECONDS}
    gone = (await connection.execute(PRUNE_DOUBTS, parameters)).rowcount
    for outcome, days in keep_days.items():
        result = await connection.execute(
            PRUNE_SETTLED, {"outcome": outcome, "days": days, "limit": limit}
        )
        gone += result.rowcount
    return gone
