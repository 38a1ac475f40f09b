"""
A night of expiries: certifications per second by `expire_all` and by bare SQL.

Bare SQL writes the same rows with one plain statement: a page to a transaction, with pages as
large as ours, or all at once, in a transaction that nobody could run beside people. It looks
out for nobody: not for other runs, other transitions, earlier pauses or live events.

    python -m tests.bench.expire [CERTIFICATIONS [ROUNDS]]
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass
from datetime import date
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, LiteralString
from uuid import UUID

import psycopg
from sqlalchemy import event

from tests.bench import postgres
from tests.bench.contenders.ours import Ours
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from worker import database
from worker.certifications import CertificationManagementService, transitions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

HLF = UUID("00000000-0000-4000-8000-000000000001")
TODAY = date(2026, 11, 24)

TABLES = """
public.organizations, public.mentors, public.certifications, public.mentor_pauses,
public.portal_visibility, outbox.events, outbox.commits
"""

FILL = (
    f"TRUNCATE {TABLES}",
    "INSERT INTO public.organizations (id, name) VALUES (%(organization_id)s, 'HLF')",
    """
    INSERT INTO public.mentors (organization_id, full_name)
    SELECT %(organization_id)s, 'A mentor' FROM generate_series(1, %(certifications)s)
    """,
    # In the order of their issue, as they come about in life.
    """
    INSERT INTO public.certifications (mentor_id, expires_on)
    SELECT id, CAST(%(today)s AS date) - 31 + CAST(30 * number / %(certifications)s AS integer)
      FROM (SELECT id, row_number() OVER (ORDER BY ctid) AS number FROM public.mentors) AS mentor
     ORDER BY number
    """,
    # Every other mentor was renewed before, and is shown.
    """
    INSERT INTO public.portal_visibility (mentor_id, organization_id, visible, version)
    SELECT id, organization_id, true, 2 FROM public.mentors
     WHERE hashtext(CAST(id AS text)) & 64 = 0
    """,
    f"VACUUM (ANALYZE) {TABLES}",
    "CHECKPOINT",
)

BARE = """
WITH run_out AS MATERIALIZED (
    SELECT id
      FROM public.certifications
     WHERE status = 'valid' AND expires_on < %(today)s
     ORDER BY expires_on, mentor_id
     LIMIT %(page)s
),
expired AS (
    UPDATE public.certifications
       SET status = 'expired', expired_at = now()
     WHERE id IN (SELECT id FROM run_out)
    RETURNING id, mentor_id
),
paused AS (
    INSERT INTO public.mentor_pauses (mentor_id, certification_id, reason)
    SELECT mentor_id, id, 'certification_expired' FROM expired
),
hidden AS (
    INSERT INTO public.portal_visibility AS desired (mentor_id, organization_id, visible)
    SELECT id, organization_id, false
      FROM public.mentors
     WHERE id IN (SELECT mentor_id FROM expired)
        ON CONFLICT (mentor_id) DO UPDATE
       SET version = desired.version + 1, visible = false, changed_at = now()
    RETURNING mentor_id, organization_id, version
)
INSERT INTO outbox.events (destination, key, organization_id, version, payload)
SELECT 'dynamics', CAST(mentor_id AS text), organization_id, version,
       jsonb_build_object('visible', false, 'certification_id', expired.id)
  FROM hidden
  JOIN expired USING (mentor_id)
"""

WRITTEN = """
SELECT (SELECT count(*) FROM public.certifications WHERE status = 'expired'),
       (SELECT count(*) FROM public.mentor_pauses),
       (SELECT count(*) FROM public.portal_visibility WHERE NOT visible),
       (SELECT count(*) FROM outbox.events)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """
    What a night takes.

    Args:
        ours, bare, at_once: certifications per second, one value for each round.
        longest_transaction_seconds: of ours, in all rounds; no lock is held longer.
    """

    ours: Sequence[float]
    bare: Sequence[float]
    at_once: Sequence[float]
    longest_transaction_seconds: float

    def ratio(self, to: Sequence[float]) -> float:
        """
        The median, over rounds, of ours ÷ theirs.
        """
        return median(ours / theirs for ours, theirs in zip(self.ours, to, strict=True))


class Stopwatch:
    """
    How long connections are out of their pool: a little longer than a transaction takes.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.longest_seconds = 0.0
        self._out: dict[Any, float] = {}
        event.listen(engine.sync_engine.pool, "checkout", self._start)
        event.listen(engine.sync_engine.pool, "checkin", self._stop)

    def _start(self, _connection: object, record: object, _proxy: object) -> None:
        self._out[record] = time.monotonic()

    def _stop(self, _connection: object, record: object) -> None:
        taken = time.monotonic() - self._out.pop(record)
        self.longest_seconds = max(self.longest_seconds, taken)


async def measure(database_url: str, *, certifications: int, rounds: int) -> Expiry:
    """
    Expire so many certifications in each way, in turns.

    Args:
        database_url: of a migrated database; whatever is in it is deleted.
    """
    engine = database.connect(database_url, application_name="bench")
    stopwatch = Stopwatch(engine)
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "ours": partial(_ours, engine),
        "bare": partial(_bare, database_url, page=transitions.PAGE),
        "at_once": partial(_bare, database_url, page=None),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for number in range(rounds):
            for name in sorted(ways, reverse=bool(number % 2)):
                await fill(database_url, FILL, certifications)
                began = time.monotonic()
                await ways[name]()
                rates[name].append(certifications / (time.monotonic() - began))
                assert await counted(database_url, WRITTEN) == (certifications,) * 4
    finally:
        await engine.dispose()
    return Expiry(**rates, longest_transaction_seconds=stopwatch.longest_seconds)


async def _ours(engine: AsyncEngine) -> None:
    service = CertificationManagementService(engine, organization_id=HLF, timezone="UTC")
    async with aclosing(service):
        async for _page in service.expire_all(today=TODAY):
            pass


async def _bare(database_url: str, *, page: int | None) -> None:
    parameters = {"today": TODAY, "page": page}
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        while (await connection.execute(BARE, parameters)).rowcount:
            await connection.commit()


async def fill(database_url: str, statements: Sequence[LiteralString], certifications: int) -> None:
    """
    Empty the database, and put so many certifications into it.
    """
    parameters = {"organization_id": HLF, "today": TODAY, "certifications": certifications}
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        for statement in statements:
            await connection.execute(statement, parameters)


async def counted(database_url: str, query: LiteralString) -> tuple[int, ...] | None:
    """
    The one row of a query.
    """
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        return await (await connection.execute(query)).fetchone()


CERTIFICATIONS = 100_000
QUICK_CERTIFICATIONS = 10_000

WHAT = "expiring everything that has run out"
BARE_SQL = "bare SQL, pages"
RATE = "certifications/s"
LONGEST = "s, longest transaction"


async def expire(ground: Ground) -> list[Figure]:
    """
    Ours beside bare SQL.
    """
    certifications = QUICK_CERTIFICATIONS if ground.scale.quick else CERTIFICATIONS
    async with ground.databases.fresh(Ours(name="ours")) as url:
        taken = await measure(url, certifications=certifications, rounds=ground.scale.rounds)
    ground.advance(WHAT)
    longest = [taken.longest_transaction_seconds]
    return [
        Figure(what=WHAT, who="ours", unit=RATE, rounds=taken.ours),
        Figure(what=WHAT, who=BARE_SQL, unit=RATE, rounds=taken.bare),
        Figure(what=WHAT, who="bare SQL, at once", unit=RATE, rounds=taken.at_once),
        Figure(what=WHAT, who="ours", unit=LONGEST, rounds=longest),
    ]


MEASURES = (
    Measure(
        name="expire",
        question="How fast does a night's expiry go, beside bare SQL that writes the same rows?",
        run=expire,
        goals=(
            Goal(
                what=WHAT,
                unit=RATE,
                bounds=[Bound(factor=0.7, whom=(BARE_SQL,), called=BARE_SQL)],
            ),
            Goal(what=WHAT, unit=LONGEST, most=True, bounds=[Bound(factor=1, called="1 s")]),
        ),
    ),
)


async def _main(certifications: int = CERTIFICATIONS, rounds: int = 5) -> None:
    async with postgres.running() as databases, databases.fresh(Ours(name="ours")) as url:
        taken = await measure(url, certifications=certifications, rounds=rounds)
    sys.stdout.write(
        f"ours {median(taken.ours):,.0f}/s"
        f" = {taken.ratio(taken.bare):.2f} x bare SQL, {taken.ratio(taken.at_once):.2f} x at once;"
        f" longest transaction {taken.longest_transaction_seconds:.3f} s\n"
    )


if __name__ == "__main__":
    asyncio.run(_main(*map(int, sys.argv[1:])))
