"""
A night of reminders: per second by `remind_all` and by bare SQL that writes the same rows.

Bare SQL notes and enqueues with one plain statement, a page to a transaction. It looks out for
nobody: not for pauses, earlier reminders or live events.
"""

from __future__ import annotations

import os
import time
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from tests.bench.contenders.ours import Ours
from tests.bench.expire import HLF, TODAY, Stopwatch, counted, fill
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from worker import database
from worker.certifications.reminders import PAGE, CertificationReminderService

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

THRESHOLDS = (60, 30, 7)

TABLES = """
public.organizations, public.mentors, public.certifications, public.mentor_pauses,
public.portal_visibility, public.cert_notification_log, outbox.events, outbox.commits
"""

FILL = (
    f"TRUNCATE {TABLES}",
    "INSERT INTO public.organizations (id, name) VALUES (%(organization_id)s, 'HLF')",
    """
    INSERT INTO public.mentors (organization_id, full_name)
    SELECT %(organization_id)s, 'A mentor' FROM generate_series(1, %(certifications)s)
    """,
    # The nearest threshold of all of them is 30 days.
    """
    INSERT INTO public.certifications (mentor_id, expires_on)
    SELECT id, CAST(%(today)s AS date) + 8 + CAST(22 * number / %(certifications)s AS integer)
      FROM (SELECT id, row_number() OVER (ORDER BY ctid) AS number FROM public.mentors) AS mentor
     ORDER BY number
    """,
    f"VACUUM (ANALYZE) {TABLES}",
    "CHECKPOINT",
)

BARE = """
WITH due AS MATERIALIZED (
    SELECT id, mentor_id, expires_on
      FROM public.certifications
     WHERE status = 'valid' AND expires_on > %(today)s
     ORDER BY expires_on, mentor_id, id
     LIMIT %(page)s OFFSET %(done)s
),
noted AS (
    INSERT INTO public.cert_notification_log (mentor_id, threshold_days, cert_id, expires_on)
    SELECT mentor_id, days, id, expires_on FROM due, (VALUES (30), (60)) AS threshold (days)
)
INSERT INTO outbox.events (destination, key, organization_id, version, payload)
SELECT 'reminders', CAST(id AS text), %(organization_id)s, 1,
       jsonb_build_object('certification_id', id, 'mentor_id', mentor_id,
                          'expires_on', expires_on, 'threshold_days', 30)
  FROM due
"""

WRITTEN = """
SELECT (SELECT count(*) FROM public.cert_notification_log) / 2, (SELECT count(*) FROM outbox.events)
"""

CERTIFICATIONS = 100_000
QUICK_CERTIFICATIONS = 10_000

WHAT = "reminding everybody whose certification runs out soon"
BARE_SQL = "bare SQL, pages"
RATE = "reminders/s"
LONGEST = "s, longest transaction"
GROWTH = "MiB at the end ÷ after a fifth"


@dataclass(slots=True, kw_only=True)
class Taken:
    """
    What a night takes.

    Attributes:
        ours, bare: reminders per second, one value for each round.
        growth: of our process, one value for each round.
        longest_transaction_seconds: of ours, in all rounds; no lock is held longer.
    """

    ours: list[float]
    bare: list[float]
    growth: list[float]
    longest_transaction_seconds: float = 0.0


async def measure(database_url: str, *, certifications: int, rounds: int) -> Taken:
    """
    Remind so many in both ways, in turns.

    Args:
        database_url: of a migrated database; whatever is in it is deleted.
    """
    engine = database.connect(database_url, application_name="bench")
    stopwatch = Stopwatch(engine)
    taken = Taken(ours=[], bare=[], growth=[])
    ways: Sequence[tuple[list[float], Callable[[], Awaitable[None]]]] = (
        (taken.ours, partial(_ours, engine, certifications, taken.growth)),
        (taken.bare, partial(_bare, database_url, certifications)),
    )
    try:
        for number in range(rounds):
            for rates, way in ways[:: -1 if number % 2 else 1]:
                await fill(database_url, FILL, certifications)
                began = time.monotonic()
                await way()
                rates.append(certifications / (time.monotonic() - began))
                assert await counted(database_url, WRITTEN) == (certifications,) * 2
    finally:
        await engine.dispose()
    taken.longest_transaction_seconds = stopwatch.longest_seconds
    return taken


async def _ours(engine: AsyncEngine, certifications: int, growth: list[float]) -> None:
    service = CertificationReminderService(
        engine, organization_id=HLF, timezone="UTC", thresholds=THRESHOLDS
    )
    reminded, after_a_fifth = 0, 0.0
    async with aclosing(service):
        async for page in service.remind_all(today=TODAY):
            reminded += page.enqueued
            if not after_a_fifth and reminded >= certifications / 5:
                after_a_fifth = _mebibytes()
    growth.append(_mebibytes() / after_a_fifth)


def _mebibytes() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def _bare(database_url: str, certifications: int) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        for done in range(0, certifications, PAGE):
            parameters = {"today": TODAY, "organization_id": HLF, "page": PAGE, "done": done}
            await connection.execute(BARE, parameters)
            await connection.commit()


async def remind(ground: Ground) -> list[Figure]:
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
        Figure(what=WHAT, who="ours", unit=LONGEST, rounds=longest),
        Figure(what=WHAT, who="ours", unit=GROWTH, rounds=taken.growth),
    ]


MEASURES = (
    Measure(
        name="remind",
        question="How fast does a night's reminding go, beside bare SQL that writes the same rows?",
        run=remind,
        goals=(
            Goal(what=WHAT, unit=LONGEST, most=True, bounds=[Bound(factor=1, called="1 s")]),
            Goal(what=WHAT, unit=GROWTH, most=True, bounds=[Bound(factor=1.05, called="1")]),
        ),
    ),
)
