"""
PostgreSQL crashes again and again under load, and no worker may end because of it.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.scenarios.bout import Bout, Marker, Result, percentile, result_of
from tests.conftest import until

if TYPE_CHECKING:
    from tests.chaos.ground import Ground
    from tests.chaos.processes import Process

EVENTS_PER_RESTART = 50
MENTORS = 300
WORKING_SECONDS = (0.2, 0.8)
DOWN_SECONDS = (0.0, 1.0)
BACK_SECONDS = 5.0
"""After PostgreSQL lets people in again, for 99 of 100 times."""
GROWTH = 0.05
"""Of a worker's memory, from the second fifth of a long bout to the last."""


async def run(bout: Bout) -> Result:
    """
    Crash it `count` times: mostly an immediate shutdown, now and then SIGKILL.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        return await crash_under_load(ground, bout)


async def crash_under_load(ground: Ground, bout: Bout) -> Result:
    """
    Crash `count` times on this ground, come to rest, check.
    """
    mentors = await ground.mentors(MENTORS)
    marker = Marker(ground, (await ground.mentors(1))[0])
    workers = [await ground.start_worker() for _ in range(2)]
    producers = [await ground.produce(mentors, pause_seconds=0.02) for _ in range(2)]
    memory: list[int] = []
    for number in range(1, bout.count + 1):
        await asyncio.sleep(ground.luck.uniform(*WORKING_SECONDS))
        await (ground.server.kill() if number % 5 == 0 else ground.server.crash())
        await asyncio.sleep(ground.luck.uniform(*DOWN_SECONDS))
        await ground.server.start()
        await ground.engine.dispose()
        await marker.delivered("PostgreSQL is back")
        memory.append(sum(worker.memory for worker in workers))
        bout.advance(1)
    await until(lambda: _enough(ground, bout.count), seconds=300)
    ended_early = [process for process in await ground.reap() if process in workers]
    for producer in producers:
        await ground.end(producer, signal.SIGTERM)
    await ground.come_to_rest()
    result = result_of(ground, await ground.check(), done=bout.count)
    _judge(result, ended_early, memory)
    return result


def _judge(result: Result, ended_early: list[Process], memory: list[int]) -> None:
    for process in ended_early:
        result.violate("no worker ends", f"{process.output.name} with {process.code}")
    if percentile(result.recoveries["PostgreSQL is back"], 0.99) > BACK_SECONDS:
        slowest = max(result.recoveries["PostgreSQL is back"])
        result.violate("L5", f"the slowest took {slowest:.1f} s")
    fifth = len(memory) // 5
    if fifth < 10:
        return
    before, after = sum(memory[fifth : 2 * fifth]), sum(memory[-fifth:])
    result.measured["memory growth"] = after / before - 1
    if after / before - 1 > GROWTH:
        result.violate("memory stays flat", f"it grew by {after / before - 1:.1%}")


async def _enough(ground: Ground, restarts: int) -> bool:
    events = await ground.world.value("SELECT count(*) FROM chaos.journal WHERE what = 'enqueued'")
    return bool(events >= EVENTS_PER_RESTART * restarts)
