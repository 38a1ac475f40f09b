"""
Workers and drains that are told to stop, once, twice, at any moment; and cold ones that are
killed without a word.
"""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.scenarios.bout import percentile
from tests.chaos.scenarios.load import under_load
from tests.conftest import until

if TYPE_CHECKING:
    from tests.chaos.ground import Ground
    from tests.chaos.scenarios.bout import Bout, Result

WAYS = ("TERM", "TERM, then TERM", "INT", "TERM to a drain")
EXIT_SECONDS = 5.0 + 3.0
"""Grace, and the way out."""


HEARD_SECONDS = 1.0
"""How long a signal takes to be heard on a machine that has other things to do."""

TAKEN_OVER_SECONDS = 2.0
"""After the lease of a dead process's claim, for 99 of 100."""


async def run(bout: Bout) -> Result:
    """
    Stop `count` processes, kindly.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        ground.sandbox.adjust(latency_seconds=0.05)
        load = await under_load(ground, producers=3, pause_seconds=0.01)
        wrong: list[str] = []
        for number in range(bout.count):
            wrong += await _stopped(ground, WAYS[number % len(WAYS)])
            bout.advance(1)
        result = await load.end(bout)
        for one in wrong:
            result.violate("L6", one)
        return result


async def _stopped(ground: Ground, way: str) -> list[str]:
    """
    What went wrong while one process was stopped this way.
    """
    # A process that the fork server has not finished yet ignores SIGINT, as the server does.
    process = await (
        ground.start("drain", "--max-seconds", "60") if "drain" in way else ground.start_worker()
    )
    who = process.output.stem
    await asyncio.sleep(ground.luck.uniform(0.2, 1.0))
    at = await ground.world.value("SELECT clock_timestamp()")
    began = time.monotonic()
    process.send(signal.SIGINT if way == "INT" else signal.SIGTERM)
    if "then" in way:
        await asyncio.sleep(ground.luck.uniform(0, 0.1))
        process.send(signal.SIGTERM)
    code = await process.wait()
    await ground.reap()
    took = time.monotonic() - began
    ground.recoveries.setdefault(f"exit after {way}", []).append(took)
    wrong = []
    # Before its handlers are installed a signal simply ends a process, and nothing is held.
    if code not in {0, 3, 75, -signal.SIGTERM, 130}:
        wrong.append(f"{way}: {who} exited with {code}")
    if took > EXIT_SECONDS:
        wrong.append(f"{way}: {who} took {took:.1f} s")
    late = await ground.world.value(
        "SELECT count(*) FROM chaos.journal WHERE what = 'claimed' AND who = :who"
        " AND began > :at + make_interval(secs => :seconds)",
        who=who,
        at=at,
        seconds=HEARD_SECONDS,
    )
    held = await ground.world.value(
        "SELECT count(*) FROM outbox.events AS live JOIN chaos.journal AS claim"
        "    ON claim.what = 'claimed' AND claim.token = live.claim_token"
        " WHERE claim.who = :who",
        who=who,
    )
    if late:
        wrong.append(f"{way}: {who} claimed {late} afterwards")
    if held:
        wrong.append(f"{way}: {who} kept {held} claims")
    return wrong


async def run_cold(bout: Bout) -> Result:
    """
    Kill `count` processes that imported everything themselves, at any moment, in mid-work,
    beside one that lives on and takes over.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        ground.sandbox.adjust(latency_seconds=0.05)
        load = await under_load(ground, workers=1, producers=2, pause_seconds=0.01)
        killed = 0
        victims = [await ground.start("worker", cold=True) for _ in range(2)]
        while killed < bout.count:
            victim = victims.pop(0)
            await until(partial(ground.claims, victim.output.stem), seconds=60)
            await asyncio.sleep(ground.luck.uniform(0, 0.3))
            await ground.end(victim, signal.SIGKILL)
            killed += 1
            bout.advance(1)
            victims.append(await ground.start("worker", cold=True))
        result = await load.end(bout)
        result.recoveries["SIGKILL, after the lease"] = load.taken_over
        result.measured["claims that died"] = result.tally["claims_died"]
        if load.taken_over and percentile(load.taken_over, 0.99) > TAKEN_OVER_SECONDS:
            result.violate("L2", f"taken over after {max(load.taken_over):.1f} s")
        return result
