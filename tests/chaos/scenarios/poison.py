"""
Events that kill whoever touches them: they run out of attempts, and hold up nobody else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.chaos.failpoints import Arming
from tests.chaos.ground import LEASE_SECONDS, opened
from tests.chaos.invariants import MAX_ATTEMPTS
from tests.chaos.producer import AFTERWARDS
from tests.chaos.scenarios.bout import Bout, Result, result_of

if TYPE_CHECKING:
    from tests.chaos.ground import Ground

WORKERS = 3


async def run(bout: Bout) -> Result:
    """
    `count` such events, among ten times as many harmless ones.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        poison = await ground.mentors(bout.count)
        harmless = await ground.mentors(10 * bout.count)
        ground.armed = {
            str(one.id): Arming(point="before-send", times=MAX_ATTEMPTS) for one in poison
        }
        everybody = [*poison, *harmless]
        ground.luck.shuffle(everybody)
        for one in everybody:
            await ground.world.certifications.expire(one.certification_id, today=AFTERWARDS)
        dead = 0
        async with asyncio.timeout(60 + MAX_ATTEMPTS * LEASE_SECONDS * 3):
            while dead < bout.count:
                await _keep_working(ground)
                now = int(
                    await ground.world.value(
                        "SELECT count(*) FROM public.dynamics_sync_failures"
                        " WHERE error_code = 'abandoned'"
                    )
                )
                bout.advance(now - dead)
                dead = now
                await asyncio.sleep(0.02)
        delayed = await ground.world.value(
            "SELECT count(*) FROM outbox.settled WHERE outcome = 'delivered'"
        )
        await ground.come_to_rest()
        result = result_of(ground, await ground.check(), done=dead)
        if delayed < len(harmless):
            result.violate("L4", f"{len(harmless) - delayed} harmless ones had to wait")
        if len(ground.fired()) != bout.count * MAX_ATTEMPTS:
            result.violate("S8", f"{len(ground.fired())} kills by {bout.count} events")
        return result


async def _keep_working(ground: Ground) -> None:
    await ground.reap()
    for _ in range(WORKERS - len(ground.running)):
        await ground.start("worker", HLF_SYNC_CONCURRENCY="1")
