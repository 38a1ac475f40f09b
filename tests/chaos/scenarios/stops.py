"""
SIGSTOP for longer than a lease, at every failpoint: whoever wakes up must change nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from itertools import cycle, islice
from typing import TYPE_CHECKING

from tests.chaos.failpoints import WORKER_POINTS, Arming
from tests.chaos.ground import LEASE_SECONDS, opened
from tests.chaos.producer import AFTERWARDS, FAR
from tests.chaos.scenarios.bout import Bout, Result, result_of

if TYPE_CHECKING:
    from tests.chaos.failpoints import Fired
    from tests.chaos.ground import Ground
    from tests.factories import Mentor

WORKERS = 10
AHEAD = 8
STOPPED_SECONDS = 1.5 * LEASE_SECONDS


async def run(bout: Bout) -> Result:
    """
    Stop `count` processes in mid-work, one of eight a producer with its locks.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        mentors = await ground.mentors(bout.count)
        points = [*WORKER_POINTS, "before-commit"]
        ground.luck.shuffle(points)
        places = islice(cycle(points), bout.count)
        ground.armed = {
            str(one.id): Arming(point=point, action="stop")  # type: ignore[arg-type]
            for one, point in zip(mentors, places, strict=True)
        }
        for _ in range(WORKERS):
            await ground.start("worker", HLF_SYNC_CONCURRENCY="2")
        waiting = list(mentors)
        asleep: dict[str, Fired] = {}
        woken: set[str] = set()
        overtaking: dict[str, asyncio.Task[None]] = {}
        while len(woken) < bout.count:
            while waiting and len(mentors) - len(waiting) - len(woken) < AHEAD:
                mentor = waiting.pop()
                if ground.armed[str(mentor.id)].point == "before-commit":
                    await ground.produce([mentor], how="once")
                else:
                    await ground.world.certifications.expire(
                        mentor.certification_id, today=AFTERWARDS
                    )
            asleep = {one.key: one for one in ground.fired() if one.key not in woken}
            for mentor in mentors[::2]:
                if (key := str(mentor.id)) in asleep.keys() - overtaking.keys():
                    overtaking[key] = asyncio.create_task(_overtake(ground, mentor))
            for stopped in asleep.values():
                if time.monotonic() - stopped.at > STOPPED_SECONDS:
                    with suppress(ProcessLookupError):
                        os.kill(stopped.pid, signal.SIGCONT)
                    woken.add(stopped.key)
                    bout.advance(1)
            await asyncio.sleep(0.02)
        await asyncio.gather(*overtaking.values())
        await _producers_done(ground)
        await ground.come_to_rest()
        findings = await ground.check()
        result = result_of(ground, findings, done=len(woken))
        result.measured["stale writes accepted"] = len(findings.violations.get("S7", []))
        if not findings.figures["claims_lost"]:
            result.violate("the fault was real", "nobody lost a claim while it stood still")
        return result


async def _overtake(ground: Ground, mentor: Mentor) -> None:
    """
    Change the mentor's state while somebody sleeps with the old one in hand, or, if it is a
    lock that they hold, as soon as they wake.
    """
    await ground.world.certifications.renew(mentor.certification_id, FAR)


async def _producers_done(ground: Ground) -> None:
    for process in list(ground.running):
        if process.output.name.startswith("produce"):
            await process.wait()
    await ground.reap()
