"""
Eight night runs at once, over and over, each killed at any moment: together they equal one.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.producer import AFTERWARDS
from tests.chaos.scenarios.bout import result_of

if TYPE_CHECKING:
    from tests.chaos.ground import Ground
    from tests.chaos.scenarios.bout import Bout, Result

AT_ONCE = 8

MENTORS = 20
"""So many run out for each kill: in 100 kills, 2,000 certifications."""

EXPECTED = {0, 3, 69, 75, -signal.SIGKILL}
"""Eight at once on a small machine may find Dynamics too slow; anything else is a surprise."""

NOT_ONCE = """
SELECT certification.id AS certification_id, count(journal.seq) AS times
  FROM public.certifications AS certification
  LEFT JOIN chaos.journal AS journal
    ON journal.what = 'expired' AND journal.detail = CAST(certification.id AS text)
 GROUP BY certification.id
HAVING count(journal.seq) <> 1
"""

# Whoever failed is tried again, with a version of its own.
TOO_MANY_VERSIONS = """
SELECT enqueued.key AS mentor_id, count(DISTINCT enqueued.version) AS versions
  FROM chaos.journal AS enqueued
 WHERE enqueued.what = 'enqueued'
 GROUP BY enqueued.key
HAVING count(DISTINCT enqueued.version) > 1 + (
       SELECT count(*) FROM chaos.journal AS failed
        WHERE failed.what = 'failed' AND failed.key = enqueued.key)
"""


async def run(bout: Bout) -> Result:
    """
    Kill `count` night runs.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        ground.sandbox.adjust(latency_seconds=0.02)
        killed = certifications = 0
        while killed < bout.count:
            certifications += len(await ground.mentors(MENTORS))
            await _keep_running(ground)
            await asyncio.sleep(ground.luck.uniform(0, 1))
            victim = ground.luck.choice(ground.running)
            if await ground.end(victim, signal.SIGKILL) == -signal.SIGKILL:
                killed += 1
                bout.advance(1)
        for night in list(ground.running):
            await night.wait()
        await ground.start("nightly", "--today", str(AFTERWARDS))
        await ground.running[-1].wait()
        await ground.come_to_rest()
        twice = await ground.world.rows(NOT_ONCE)
        chains = await ground.world.rows(TOO_MANY_VERSIONS)
        result = result_of(ground, await ground.check(), done=killed)
        result.checked.append("S18")
        for row in twice:
            result.violate("S18", f"certification {row.certification_id} expired {row.times} times")
        for row in chains:
            result.violate("S18", f"mentor {row.mentor_id} has {row.versions} versions")
        for night in ground.ended:
            if night.output.name.startswith("nightly") and night.code not in EXPECTED:
                result.violate("S18", f"{night.output.stem} exited with {night.code}")
        result.measured["certifications"] = certifications
        return result


async def _keep_running(ground: Ground) -> None:
    await ground.reap()
    for _ in range(AT_ONCE - len(ground.running)):
        await ground.start("nightly", "--today", str(AFTERWARDS))
