"""
Workers and producers that run while something else is broken.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from tests.chaos.scenarios.bout import Bout, Marker, Result, result_of

if TYPE_CHECKING:
    from tests.chaos.ground import Ground
    from tests.chaos.processes import Process

MENTORS = 100


class Load:
    """
    What goes on meanwhile.

    Attributes:
        workers: none of them may end by itself.
        marker: with whom the harness asks whether work goes on.
        taken_over: after the end, seconds from the end of a dead claim's lease to the next.
    """

    def __init__(self, ground: Ground, marker: Marker) -> None:
        self.ground = ground
        self.marker = marker
        self.workers: list[Process] = []
        self.producers: list[Process] = []
        self.taken_over: list[float] = []

    async def end(self, bout: Bout) -> Result:
        """
        End the producers, come to rest, check.
        """
        ended_early = [one for one in await self.ground.reap() if one in self.workers]
        for producer in self.producers:
            if producer in self.ground.running:
                await self.ground.end(producer, signal.SIGTERM)
        await self.ground.come_to_rest()
        findings = await self.ground.check()
        result = result_of(self.ground, findings, done=bout.count)
        self.taken_over = findings.taken_over
        for process in ended_early:
            result.violate("no worker ends", f"{process.output.name} with {process.code}")
        return result


async def under_load(
    ground: Ground, *, workers: int = 2, producers: int = 1, pause_seconds: float = 0.05
) -> Load:
    """
    Have so many workers and producers run, and a marker delivered once if it can be.
    """
    mentors = await ground.mentors(MENTORS)
    load = Load(ground, Marker(ground, (await ground.mentors(1))[0]))
    load.workers = [await ground.start_worker() for _ in range(workers)]
    load.producers = [
        await ground.produce(mentors, pause_seconds=pause_seconds) for _ in range(producers)
    ]
    if workers:
        await load.marker.delivered("nothing")
    return load
