"""
Many values in one request, while workers are killed and Dynamics refuses batches.
"""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.scenarios.load import under_load
from tests.conftest import until
from worker.dynamics.sandbox import Hang, ResetAfter, ResetBefore, Status

if TYPE_CHECKING:
    from tests.chaos.scenarios.bout import Bout, Result
    from worker.dynamics.sandbox import Fault

BATCH = {"HLF_SYNC_BATCH": "20", "HLF_SYNC_CONCURRENCY": "2"}
ANSWERS: tuple[Fault | None, ...] = (
    None,
    Status(status=413, target="data"),
    Status(status=400, target="data"),
    Status(status=503, target="data"),
    Status(status=429, retry_after="1", target="data"),
    Hang(target="data"),
    ResetBefore(target="data"),
    ResetAfter(target="data"),
)


async def run(bout: Bout) -> Result:
    """
    Kill `count` workers with batches under way, each after another answer.
    """
    async with opened(bout.seed, binaries=bout.binaries, changes=BATCH) as ground:
        ground.sandbox.adjust(latency_seconds=0.05)
        load = await under_load(ground, workers=1, producers=3, pause_seconds=0.005)
        for number in range(bout.count):
            if fault := ANSWERS[number % len(ANSWERS)]:
                ground.sandbox.order(fault)
            victim = await ground.start("worker")
            await until(partial(ground.claims, victim.output.stem), seconds=60)
            await asyncio.sleep(ground.luck.uniform(0, 0.2))
            await ground.end(victim, signal.SIGKILL)
            bout.advance(1)
        result = await load.end(bout)
        values = [one.exchange for one in ground.sandbox.ledger.entries if one.kind == "data"]
        result.measured["values per request"] = len(values) / len(set(values))
        return result
