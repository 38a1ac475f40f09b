"""
Whether a claim costs the same whatever is waiting, whatever has been, and whoever looks on.

The first two ask one server the same question about two databases in turns. The third drains a
backlog twice, once beside a session that holds a snapshot from before: PostgreSQL then keeps
every dead row and index entry, and whoever reads them all gets slower and slower.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from statistics import median
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import psycopg

from outbox import Delivered, store
from outbox.store import Landed
from tests.bench.contenders.ours import Ours
from tests.bench.contenders.ours_worker import ORGANIZATION
from tests.bench.drain import LIMIT_SECONDS, arrived
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from tests.bench.processes import running
from worker import database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

OURS = Ours(name="ours")
BATCHES = Ours(name="ours:batch100", batch=100)

CLAIM = "ms per claim of 100"
SETTLE = "ms per settling of 100"
RATIO = "big ÷ small"
RATE = "events/s in the last fifth"
PINNED = "pinned ÷ not"

BATCH = 100
CLAIMS = 40
"""In each of the two databases, in turns."""

HISTORY = """
INSERT INTO outbox.settled (event_id, destination, key, organization_id, version, payload,
                            outcome, attempts, created_at, settled_at)
SELECT n, 'dynamics', gen_random_uuid()::text, %s, 1,
       '{"visible": false, "certification_id": null}', 'delivered', 1,
       now() - n * interval '1 second', now() - n * interval '1 second'
  FROM generate_series(1, %s) AS n
"""


# --------------------------------------------------------------------------- two databases


async def backlog(ground: Ground) -> list[Figure]:
    """
    A thousand events waiting, and half a million.
    """
    many = 20_000 if ground.scale.quick else 500_000
    what = f"a backlog of {many:,} beside one of 1,000"
    async with filled(ground, 1_000) as small, filled(ground, many) as big:
        return await side_by_side(ground, what, small, big)


async def history(ground: Ground) -> list[Figure]:
    """
    No history, and that of years.
    """
    rows = 100_000 if ground.scale.quick else 5_000_000
    what = f"a history of {rows:,} beside none"
    async with filled(ground, 10_000) as small, filled(ground, 10_000, history=rows) as big:
        return await side_by_side(ground, what, small, big)


@asynccontextmanager
async def filled(ground: Ground, events: int, *, history: int = 0) -> AsyncIterator[AsyncEngine]:
    """
    A database with so much in it, in the state in which autovacuum keeps it.
    """
    async with ground.databases.fresh(OURS) as url:
        OURS.fill(url, [str(uuid4()) for _ in range(events)])
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            if history:
                await connection.execute(HISTORY, [ORGANIZATION, history])
            await connection.execute("VACUUM ANALYZE outbox.events, outbox.settled")
            await connection.execute("CHECKPOINT")
        engine = database.connect(url, application_name="bench")
        yield engine
        await engine.dispose()


async def side_by_side(
    ground: Ground, what: str, small: AsyncEngine, big: AsyncEngine
) -> list[Figure]:
    """
    Claims, and settlings, in both in turns.
    """
    claims: list[list[float]] = [[], []]
    settles: list[list[float]] = [[], []]
    for _ in range(ground.scale.rounds):
        taken = [[await claim_and_settle(one) for one in (small, big)] for _ in range(CLAIMS)]
        for place in (0, 1):
            claims[place].append(median(both[place][0] for both in taken))
            settles[place].append(median(both[place][1] for both in taken))
        ground.advance(what)
    return [
        *_compared(f"claim, {what}", CLAIM, claims),
        *_compared(f"settle, {what}", SETTLE, settles),
    ]


def _compared(what: str, unit: str, values: Sequence[Sequence[float]]) -> list[Figure]:
    small, big = values
    ratios = [one / other for one, other in zip(big, small, strict=True)]
    return [
        Figure(what=what, who="small", unit=unit, rounds=small),
        Figure(what=what, who="ours", unit=unit, rounds=big),
        Figure(what=what, who="ours", unit=RATIO, rounds=ratios),
    ]


async def claim_and_settle(engine: AsyncEngine) -> tuple[float, float]:
    """
    Milliseconds of a claim, and of settling what it claimed; all of it is undone.
    """
    async with engine.connect() as connection:
        began = time.perf_counter()
        claimed = await _claim(connection)
        between = time.perf_counter()
        landed = [Landed(event=event, outcome=Delivered()) for event in claimed.events]
        await store.settle(connection, landed, doubt_seconds=150)
        ended = time.perf_counter()
        await connection.rollback()
    assert len(landed) == BATCH
    return (between - began) * 1000, (ended - between) * 1000


async def _claim(connection: AsyncConnection) -> store.Claimed:
    return await store.claim(
        connection,
        destination="dynamics",
        organization_id=UUID(ORGANIZATION),
        worker_id=uuid4(),
        limit=BATCH,
        lease_seconds=60,
        slack_seconds=1,
        doubt_seconds=150,
    )


# ------------------------------------------------------------------------ an old snapshot


async def snapshot(ground: Ground) -> list[Figure]:
    """
    The end of a long backlog, without and with an old snapshot.
    """
    events = 10_000 if ground.scale.quick else 100_000
    what = f"an old snapshot, {events:,} events in batches of 100"
    free: list[float] = []
    pinned: list[float] = []
    for _ in range(min(3, ground.scale.rounds)):
        free.append(await last_fifth(ground, events, pinned=False))
        pinned.append(await last_fifth(ground, events, pinned=True))
        ground.advance(what)
    ratios = [one / other for one, other in zip(pinned, free, strict=True)]
    return [
        Figure(what=what, who="ours, without", unit=RATE, rounds=free),
        Figure(what=what, who="ours", unit=RATE, rounds=pinned),
        Figure(what=what, who="ours", unit=PINNED, rounds=ratios),
    ]


async def last_fifth(ground: Ground, events: int, *, pinned: bool) -> float:
    """
    Events per second in the last fifth of a backlog.
    """
    async with (
        ground.databases.fresh(BATCHES) as url,
        await psycopg.AsyncConnection.connect(url) as session,
    ):
        BATCHES.fill(url, [str(uuid4()) for _ in range(events)])
        if pinned:
            await session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await session.execute("SELECT count(*) FROM outbox.events")
        ground.far_side.reset()
        environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": ground.far_side.url}
        async with running(BATCHES.worker(concurrency=4), environment, quiet=True) as worker:
            first = await arrived(ground, worker, events * 4 // 5, 30 * LIMIT_SECONDS)
            last = await arrived(ground, worker, events, 30 * LIMIT_SECONDS)
    return (last.arrived - first.arrived) / (last.seconds - first.seconds)


def _at_most(what: str) -> Goal:
    return Goal(what=what, unit=RATIO, most=True, bounds=[Bound(factor=1.2, called="1")])


MEASURES = (
    Measure(
        name="backlog",
        question="Does a claim take longer when more is waiting?",
        run=backlog,
        goals=(_at_most("claim, a backlog of 500,000 beside one of 1,000"),),
        turns=lambda ground: ground.scale.rounds,
    ),
    Measure(
        name="history",
        question="Does a claim take longer when more has been?",
        run=history,
        goals=(_at_most("claim, a history of 5,000,000 beside none"),),
        turns=lambda ground: ground.scale.rounds,
    ),
    Measure(
        name="snapshot",
        question="Does a long backlog get slower while some session holds an old snapshot?",
        run=snapshot,
        goals=(
            Goal(
                what="an old snapshot, 100,000 events in batches of 100",
                unit=PINNED,
                bounds=[Bound(factor=0.95, called="1")],
            ),
        ),
        turns=lambda ground: min(3, ground.scale.rounds),
    ),
)
