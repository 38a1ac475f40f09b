"""
The gate of a destination: while it is closed, no process sends anything through it.

One row per destination and organisation, made when the gate first closes:

    no row, or past and no trips    open
    closed_until in the future      closed; events wait, nothing is burnt
    past, and it tripped by itself  half-open: one event may probe, for all processes

A probe pushes `closed_until` forward by its lease, so one column serves both waits, and
the probe of a process that died is free again by itself. Like a claim it has a token: when
somebody else closes the gate meanwhile, the probe's outcome changes nothing. The
breaker of each process decides when failures add up to an outage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox.outcome import AutomaticReason, GateReason


class Where(TypedDict):
    """
    Which gate.
    """

    destination: str
    organization_id: UUID


GateState = Literal["open", "half-open", "closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """
    How long a gate that closes by itself stays closed: doubled each time in a row.
    """

    first_seconds: float
    longest_seconds: float


OUTAGE = Backoff(first_seconds=5, longest_seconds=60)
"""A mentor may be wrongly visible meanwhile, so look again at least once a minute."""

CONFIGURATION = Backoff(first_seconds=30, longest_seconds=300)
"""People are slower than networks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """
    A gate as it stands.

    Args:
        seconds: until it opens or may be probed; infinite if a person closed it.
    """

    state: GateState
    reason: GateReason | None = None
    message: str = ""
    closed_by: str = ""
    closed_until: datetime | None = None
    seconds: float = 0.0


OPEN = Gate(state="open")
ALL_REASONS: Sequence[GateReason] = ("throttled", "outage", "configuration", "operator")

STATE = """
CASE WHEN closed_until > now() THEN 'closed' WHEN trips > 0 THEN 'half-open' ELSE 'open' END
"""
"""In SQL, of a row of `outbox.gates`; no row is an open gate."""

LOOK = text(f"""
SELECT {STATE} AS state,
       reason, message, closed_by,
       CASE WHEN isfinite(closed_until) THEN closed_until END AS closed_until,
       CASE WHEN isfinite(closed_until)
            THEN greatest(0, CAST(extract(epoch FROM closed_until - now()) AS double precision))
            ELSE 'infinity' END AS seconds
  FROM outbox.gates
 WHERE destination = :destination AND organization_id = :organization_id
""")  # noqa: S608 (a constant)

PROBE = text("""
UPDATE outbox.gates
   SET closed_until = now() + make_interval(secs => :seconds),
       probe = gen_random_uuid()
 WHERE destination = :destination AND organization_id = :organization_id
   AND closed_until <= now()
   AND trips > 0
RETURNING probe
""")

CLOSE = text("""
INSERT INTO outbox.gates AS gate
       (destination, organization_id, closed_until, reason, message, closed_by, trips)
VALUES (:destination, :organization_id, now() + make_interval(secs => :seconds),
        :reason, :message, :closed_by, :tripping)
    ON CONFLICT (destination, organization_id) DO UPDATE
   SET closed_until = greatest(
           CASE WHEN gate.probe = CAST(:probe AS uuid) THEN now() ELSE gate.closed_until END,
           now() + make_interval(secs => least(
               :longest_seconds, :seconds * power(2, least(gate.trips * :tripping, 20))))),
       reason = excluded.reason,
       message = excluded.message,
       closed_by = excluded.closed_by,
       trips = gate.trips + excluded.trips,
       probe = NULL
 -- A person's word stands, and one outage seen by many is one closing.
 WHERE gate.closed_until <= now() OR gate.probe = CAST(:probe AS uuid)
    OR (excluded.reason = 'throttled' AND gate.reason <> 'operator')
RETURNING true
""")

CLOSE_BY_HAND = text("""
INSERT INTO outbox.gates AS gate
       (destination, organization_id, closed_until, reason, message, closed_by)
VALUES (:destination, :organization_id, 'infinity', 'operator', :message, :closed_by)
    ON CONFLICT (destination, organization_id) DO UPDATE
   SET closed_until = excluded.closed_until,
       reason = excluded.reason,
       message = excluded.message,
       closed_by = excluded.closed_by,
       trips = 0,
       probe = NULL
""")

OPEN_AFTER_PROBE = text("""
UPDATE outbox.gates
   SET closed_until = now(), trips = 0, probe = NULL
 WHERE destination = :destination AND organization_id = :organization_id
   AND probe = :probe
RETURNING true
""")

OPEN_AGAIN = text("""
UPDATE outbox.gates
   SET closed_until = now(), trips = 0, probe = NULL
 WHERE destination = :destination AND organization_id = :organization_id
   AND (closed_until > now() OR trips > 0)
   AND reason = ANY (:reasons)
RETURNING true
""")


async def look(connection: AsyncConnection, *, destination: str, organization_id: UUID) -> Gate:
    """
    How the gate stands now.
    """
    result = await connection.execute(
        LOOK, {"destination": destination, "organization_id": organization_id}
    )
    row = result.mappings().one_or_none()
    return OPEN if row is None else Gate(**row)


async def probe(
    connection: AsyncConnection, *, destination: str, organization_id: UUID, seconds: float
) -> UUID | None:
    """
    Try to be the one who probes a half-open gate; closed for all others meanwhile.

    Args:
        seconds: after which somebody else may probe, should this process die.

    Returns:
        The token of the probe, or None if it is somebody else's.
    """
    token: UUID | None = await connection.scalar(
        PROBE,
        {"destination": destination, "organization_id": organization_id, "seconds": seconds},
    )
    return token


async def close(
    connection: AsyncConnection,
    *,
    destination: str,
    organization_id: UUID,
    reason: AutomaticReason,
    message: str,
    closed_by: str,
    backoff: Backoff,
    probe: UUID | None = None,
) -> bool:
    """
    Close the gate for everybody, unless it is closed already.

    A wait that the destination asked for only ever prolongs; the other closings last
    longer each time in a row.

    Args:
        backoff: for `throttled`, the wait that was asked for, as first and longest.
        probe: token of the probe that failed; the closing it stands for is replaced.

    Returns:
        Whether this call closed or prolonged it.
    """
    result = await connection.execute(
        CLOSE,
        {
            "destination": destination,
            "organization_id": organization_id,
            "reason": reason,
            "message": message,
            "closed_by": closed_by,
            "seconds": backoff.first_seconds,
            "longest_seconds": backoff.longest_seconds,
            "tripping": 0 if reason == "throttled" else 1,
            "probe": probe,
        },
    )
    return result.first() is not None


async def close_by_hand(
    connection: AsyncConnection,
    *,
    destination: str,
    organization_id: UUID,
    message: str,
    closed_by: str,
) -> None:
    """
    Close the gate until somebody calls `open_again`; nothing automatic changes that.
    """
    await connection.execute(
        CLOSE_BY_HAND,
        {
            "destination": destination,
            "organization_id": organization_id,
            "message": message,
            "closed_by": closed_by,
        },
    )


async def open_after_probe(
    connection: AsyncConnection, *, destination: str, organization_id: UUID, probe: UUID
) -> bool:
    """
    A probe came through: open the gate, unless somebody closed it meanwhile.
    """
    result = await connection.execute(
        OPEN_AFTER_PROBE,
        {"destination": destination, "organization_id": organization_id, "probe": probe},
    )
    return result.first() is not None


async def open_again(
    connection: AsyncConnection,
    *,
    destination: str,
    organization_id: UUID,
    reasons: Sequence[GateReason] = ALL_REASONS,
) -> bool:
    """
    Open the gate if it is closed or half-open for one of these reasons.

    Returns:
        Whether there was anything to open.
    """
    result = await connection.execute(
        OPEN_AGAIN,
        {
            "destination": destination,
            "organization_id": organization_id,
            "reasons": list(reasons),
        },
    )
    return result.first() is not None
