"""
Workers whose clocks are wrong, beside one whose clock is right: only the database's counts.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from tests.chaos.ground import opened
from tests.chaos.scenarios.bout import Bout, Result
from tests.chaos.scenarios.load import under_load
from tests.conftest import until

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
SKEWS = ("+1h", "-1h", "+1d", "-1d", "+400d", "-400d")
WORKING_SECONDS = 2.0


async def run(bout: Bout) -> Result:
    """
    `count` workers, each wrong by another amount.
    """
    if LIBRARY is None:
        return Result(skipped="libfaketime is not installed (Debian's package faketime)")
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        ground.sandbox.adjust(latency_seconds=0.02)
        load = await under_load(ground, workers=1, pause_seconds=0.01)
        for number in range(bout.count):
            skew = SKEWS[number % len(SKEWS)]
            skewed = await ground.start(
                "worker",
                cold=True,
                LD_PRELOAD=str(LIBRARY),
                FAKETIME=skew,
                FAKETIME_DONT_FAKE_MONOTONIC="1",
                DONT_FAKE_MONOTONIC="1",
            )
            await until(partial(ground.claims, skewed.output.stem), seconds=60)
            await asyncio.sleep(WORKING_SECONDS)
            await load.marker.delivered(f"clock {skew}")
            await ground.end(skewed)
            bout.advance(1)
        return await load.end(bout)
