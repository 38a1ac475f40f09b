"""
What a worker costs when there is nothing to do, and whether it grows when there was a lot.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg

from tests.bench.contenders.ours import Ours
from tests.bench.drain import LIMIT_SECONDS, arrived
from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure
from tests.bench.processes import cpu_seconds, running

if TYPE_CHECKING:
    from tests.bench.processes import Process

OURS = Ours(name="ours")
BATCHES = Ours(name="ours:batch100", batch=100)

LOOKS = "transactions/s"
CPU = "% of a core"
MEBIBYTES = "MiB"
GROWTH = "MiB at the end ÷ after a fifth"

IDLE = "an idle worker"

WARM_SECONDS = 3.0
"""For a worker to start, and for its last statements to reach the statistics."""

COUNT = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"

FILL_AT_ONCE = 50_000


async def idle(ground: Ground) -> list[Figure]:
    """
    A worker that has nothing to deliver. Each of its looks is one statement in a transaction:
    `tests/integration/test_statements.py` sees to that.
    """
    seconds = 3.0 if ground.scale.quick else 20.0
    looks: list[float] = []
    cpu: list[float] = []
    for _ in range(ground.scale.rounds):
        async with ground.databases.fresh(OURS) as url:
            environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": ground.far_side.url}
            async with running(OURS.worker(concurrency=8), environment, quiet=True) as worker:
                await asyncio.sleep(WARM_SECONDS)
                before = await _transactions(ground, url), cpu_seconds(worker.pid)
                await asyncio.sleep(seconds)
                after = await _transactions(ground, url), cpu_seconds(worker.pid)
                worker.must_run()
        looks.append((after[0] - before[0]) / seconds)
        used = round(after[1] - before[1], 2)  # it is counted in hundredths
        cpu.append(used / seconds * 100)
        ground.advance(IDLE)
    return [
        Figure(what=IDLE, who="ours", unit=LOOKS, rounds=looks),
        Figure(what=IDLE, who="ours", unit=CPU, rounds=cpu),
    ]


async def _transactions(ground: Ground, url: str) -> int:
    """
    In this database so far, asked from another one.
    """
    async with await psycopg.AsyncConnection.connect(ground.databases.server.url()) as connection:
        cursor = await connection.execute(COUNT, [url.rpartition("/")[2]])
        [count] = await cursor.fetchone() or [0]
    return int(count)


async def memory(ground: Ground) -> list[Figure]:
    """
    A worker's memory after a fifth of many events, and after all.
    """
    events = 20_000 if ground.scale.quick else 1_000_000
    what = f"{events:,} events through one worker"
    async with ground.databases.fresh(BATCHES) as url:
        for begin in range(0, events, FILL_AT_ONCE):
            number = min(FILL_AT_ONCE, events - begin)
            await asyncio.to_thread(BATCHES.fill, url, [str(uuid4()) for _ in range(number)])
        ground.far_side.reset()
        environment = {"BENCH_DATABASE_URL": url, "BENCH_API_URL": ground.far_side.url}
        async with running(BATCHES.worker(concurrency=4), environment, quiet=True) as worker:
            await arrived(ground, worker, events // 5, 100 * LIMIT_SECONDS)
            early = resident_mebibytes(worker)
            await arrived(ground, worker, events, 100 * LIMIT_SECONDS)
            late = resident_mebibytes(worker)
    ground.advance(what)
    return [
        Figure(what=what, who="ours", unit=MEBIBYTES, rounds=[late]),
        Figure(what=what, who="ours", unit=GROWTH, rounds=[late / early]),
    ]


def resident_mebibytes(process: Process) -> float:
    """
    What a process has in memory now.
    """
    status = Path(f"/proc/{process.pid}/status").read_text()
    [kibibytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(kibibytes) / 1024


def _at_most(what: str, unit: str, factor: float) -> Goal:
    return Goal(what=what, unit=unit, most=True, bounds=[Bound(factor=factor, called="1")])


MEASURES = (
    Measure(
        name="idle",
        question="What does a worker cost that has nothing to do?",
        run=idle,
        goals=(_at_most(IDLE, LOOKS, 2), _at_most(IDLE, CPU, 0.5)),
        turns=lambda ground: ground.scale.rounds,
    ),
    Measure(
        name="memory",
        question="Does a worker grow with what it has delivered?",
        run=memory,
        goals=(_at_most("1,000,000 events through one worker", GROWTH, 1.05),),
    ),
)
