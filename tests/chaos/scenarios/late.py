"""
Late writers: "hide" gets no answer, "show" is delivered, then "hide" lands after all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.producer import AFTERWARDS, FAR
from tests.chaos.scenarios.bout import Bout, Result, result_of
from tests.conftest import until
from worker.dynamics.sandbox import Late

if TYPE_CHECKING:
    from tests.chaos.ground import Ground
    from tests.factories import Mentor

LATE_SECONDS = 2.5
"""Less than the doubt lasts here, as in life."""

AT_ONCE = 4
"""Fewer than what the breaker takes for an outage."""


async def run(bout: Bout) -> Result:
    """
    `count` mentors for whom an old request wins for a while, and must not for good.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        await ground.start("worker", HLF_SYNC_CONCURRENCY="10")
        overtaken = 0
        left = bout.count
        while left:
            mentors = await ground.mentors(min(left, AT_ONCE))
            overtaken += sum(await asyncio.gather(*[_overtaken(ground, one) for one in mentors]))
            left -= len(mentors)
            bout.advance(len(mentors))
        await ground.nothing_alive()
        result = result_of(ground, await ground.check(), done=overtaken)
        if overtaken < bout.count:
            result.violate("the fault was real", f"{bout.count - overtaken} were never overtaken")
        return result


async def _overtaken(ground: Ground, mentor: Mentor) -> bool:
    """
    Whether the portal showed the newer state, and then the older one.
    """
    key = str(mentor.dynamics_id)
    ground.sandbox.order(Late(target="data", key=key, seconds=LATE_SECONDS))
    service = ground.world.certifications
    await service.expire(mentor.certification_id, today=AFTERWARDS)
    await until(lambda: any(one.key == key for one in ground.sandbox.ledger.in_progress))
    renewed = await service.renew(mentor.certification_id, FAR)

    async def confirmed() -> bool:
        return bool(
            await ground.world.value(
                "SELECT count(*) FROM public.portal_confirmations"
                " WHERE mentor_id = :mentor AND version = :version",
                mentor=mentor.id,
                version=renewed.version,
            )
        )

    await until(confirmed, seconds=30)
    async with asyncio.timeout(30):
        await ground.sandbox.ledger.wait_finished(
            lambda entry: entry.key == key and entry.fault == "late"
        )
    return ground.sandbox.rows["contacts"][key]["hlf_portalvisible"] is False
