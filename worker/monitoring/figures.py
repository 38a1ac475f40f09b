"""
What the database says about the outbox, whoever asks and however often.

One query answers everything, and its answer is good for some seconds: many who ask cost one
query, and a database that does not answer keeps nobody waiting. No name and no id of a mentor
is read.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from outbox.gate import STATE
from worker.database import single_statements

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

log = structlog.get_logger(__name__)

GOOD_SECONDS = 5.0
"""How long an answer is good, a failure too."""

REST = 10
"""And so many times as long as it took: it takes with what is live, and a backlog can be long."""

PATIENCE_SECONDS = 2.0
"""How long anybody waits for an answer."""

# Since when a mentor may be wrongly visible is since the last change of mind: events and failures
# are made anew when the same state is said once more. Whom the portal has confirmed since that it
# hides, and is only asked to hide once more, has been in question since it was asked.
FIGURES = text(f"""
WITH live AS MATERIALIZED (
    SELECT destination, key, created_at, priority, claim_token IS NOT NULL AS claimed
      FROM outbox.events
     WHERE organization_id = :organization_id AND destination = ANY (:destinations)
),
open_failures AS MATERIALIZED (
    SELECT mentor_id, visible, recoverable, created_at
      FROM public.dynamics_sync_failures
     WHERE organization_id = :organization_id AND resolved_at IS NULL
),
hiding AS (
    SELECT CAST(key AS uuid) AS mentor_id, created_at
      FROM live WHERE destination = 'dynamics' AND priority = 0
     UNION
    SELECT mentor_id, created_at FROM open_failures WHERE NOT visible
),
night AS MATERIALIZED (
    SELECT finished_at, ok, summary
      FROM outbox.nightly_runs
     WHERE organization_id = :organization_id AND finished_at IS NOT NULL
)
SELECT (SELECT max(version_num) FROM outbox.alembic_version) AS revision,
       (SELECT coalesce(json_agg(one), '[]')
          FROM (SELECT destination,
                       count(*) FILTER (WHERE NOT claimed) AS waiting,
                       count(*) FILTER (WHERE claimed) AS in_flight,
                       greatest(0, extract(epoch FROM clock_timestamp() - min(created_at)))
                           AS oldest_seconds
                  FROM live GROUP BY destination) AS one) AS queues,
       (SELECT coalesce(json_agg(one), '[]')
          FROM (SELECT CASE WHEN visible THEN 'show' ELSE 'hide' END AS wanted, recoverable,
                       count(*) AS mentors
                  FROM open_failures GROUP BY visible, recoverable) AS one) AS failures,
       (SELECT CAST(greatest(0, extract(epoch FROM clock_timestamp() - min(
                    CASE WHEN NOT confirmed.visible AND confirmed.confirmed_at >= desired.changed_at
                         THEN hiding.created_at ELSE desired.changed_at END)))
                    AS double precision)
          FROM hiding
          JOIN public.portal_visibility AS desired USING (mentor_id)
          LEFT JOIN public.portal_confirmations AS confirmed USING (mentor_id)
         WHERE NOT desired.visible
           AND (confirmed.version IS NULL OR confirmed.version < desired.version))
           AS wrongly_visible_seconds,
       (SELECT coalesce(json_agg(one), '[]')
          FROM (SELECT destination, {STATE} AS state, reason,
                       CASE WHEN isfinite(closed_until) THEN extract(epoch FROM closed_until) END
                           AS closed_until
                  FROM outbox.gates
                 WHERE organization_id = :organization_id
                   AND destination = ANY (:destinations)) AS one) AS gates,
       (SELECT coalesce(json_object_agg(job, succeeded_at), '{{}}')
          FROM (SELECT job, extract(epoch FROM max(finished_at)) AS succeeded_at
                  FROM (SELECT 'nightly' AS job, finished_at FROM night WHERE ok
                         UNION ALL
                        SELECT 'nightly_' || part, finished_at
                          FROM night, jsonb_to_recordset(summary -> 'parts')
                                          AS parts (part text, verdict text)
                         WHERE verdict IN ('done', 'needs_a_person')) AS success
                 GROUP BY job) AS one) AS jobs
""")  # noqa: S608 (a constant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """
    An answer of the database.

    Args:
        revision: the migration it is at.
        queues: by destination: waiting, in_flight, oldest_seconds.
        failures: how many mentors' failures are open, by what was wanted and whether a recovery
            tries them again.
        wrongly_visible_seconds: for how long the one who has been so longest may have been
            visible and must not be; 0 if nobody is.
        gates: that were ever closed: state, reason, closed_until; None there is for ever.
        jobs: when each last succeeded, in seconds since 1970.
    """

    revision: str | None
    queues: Sequence[Mapping[str, Any]]
    failures: Sequence[Mapping[str, Any]]
    wrongly_visible_seconds: float
    gates: Sequence[Mapping[str, Any]]
    jobs: Mapping[str, float]


class Reader:
    """
    Asks the database, for everybody at once.

    Attributes:
        latest: the answer that was last got; None if it failed, or there was none yet.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        organization_id: UUID,
        destinations: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.latest: Figures | None = None
        self._engine = engine
        self._where = {"organization_id": organization_id, "destinations": list(destinations)}
        self._clock = clock
        self._good_until: float | None = None
        self._asking: asyncio.Task[None] | None = None

    async def figures(self) -> Figures | None:
        """
        Figures that are still good; None if the database does not answer soon.
        """
        asking = self.ask()
        if asking is None:
            return self.latest
        await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
        if not asking.done():
            return None
        asking.result()
        return self.latest

    def ask(self) -> asyncio.Task[None] | None:
        """
        Begin to ask, unless the latest answer is still good; returns what is under way.
        """
        if self._asking is not None:
            return self._asking
        if self._good_until is not None and self._clock() < self._good_until:
            return None
        self._asking = asyncio.create_task(self._ask(), name="figures")
        return self._asking

    async def aclose(self) -> None:
        """
        Give up what is under way.
        """
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _ask(self) -> None:
        began = self._clock()
        try:
            async with (
                asyncio.timeout(PATIENCE_SECONDS),
                single_statements(self._engine) as connection,
            ):
                row = (await connection.execute(FIGURES, self._where)).mappings().one()
            self.latest = Figures(**row)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            self.latest = None
            log.warning("monitoring.database_failed", error=type(error).__name__)
        finally:
            now = self._clock()
            self._good_until = now + max(GOOD_SECONDS, REST * (now - began))
            self._asking = None
