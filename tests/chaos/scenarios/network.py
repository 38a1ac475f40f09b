"""
The line to PostgreSQL and the line to Dynamics, broken in every way a line can be.

`lines` takes each fault once, for as long as it takes to be noticed; `mixes` takes random ones
on both lines at a time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.chaos.failpoints import Scale
from tests.chaos.ground import opened
from tests.chaos.proxy import (
    Blackhole,
    Fault,
    HalfOpen,
    Late,
    Latency,
    LoseReply,
    Partial,
    Refuse,
    Reset,
)
from tests.chaos.scenarios.load import under_load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.ground import Ground
    from tests.chaos.scenarios.bout import Bout, Result

PATCH = b"PATCH "

BOTH: dict[str, Fault] = {
    "latency": Latency(seconds=0.1, jitter=0.1),
    "black hole": Blackhole(),
    "answers lost": HalfOpen(lost="answers"),
    "requests lost": HalfOpen(lost="requests"),
    "refused": Refuse(),
    "reset": Reset(),
    "torn off": Partial(bytes=100),
}
DATABASE: dict[str, Fault] = {**BOTH, "COMMIT unanswered": LoseReply(after=b"outbox.", times=3)}
PORTAL: dict[str, Fault] = {
    **BOTH,
    "PATCH unanswered": LoseReply(after=PATCH, times=3),
    "PATCH late": Late(after=PATCH, seconds=1.5, times=2),
    "PATCH late, client waiting": Late(after=PATCH, seconds=1.5, client="silent", times=2),
}

NOTICED_SECONDS = 3.0
"""Longer than any deadline here."""

SCALE = Scale(gate_factor=0.05, database_seconds=2.0)


async def run_lines(bout: Bout) -> Result:
    """
    Each fault of each line once; `count` is how many there are.
    """
    async with opened(bout.seed, binaries=bout.binaries, scale=SCALE) as ground:
        load = await under_load(ground)
        for name, fault in DATABASE.items():
            ground.database_proxy.order(fault)
            await _stand(ground, f"database: {name}", NOTICED_SECONDS)
            await load.marker.delivered(f"database: {name}")
            bout.advance(1)
        for name, fault in PORTAL.items():
            ground.portal_proxy.order(fault)
            await _stand(ground, f"Dynamics: {name}", NOTICED_SECONDS / 2)
            await load.marker.delivered(f"Dynamics: {name}")
            bout.advance(1)
        result = await load.end(bout)
        for kind in {type(one) for one in [*DATABASE.values(), *PORTAL.values()]}:
            if not ground.database_proxy.used[kind] + ground.portal_proxy.used[kind]:
                result.violate("the fault was real", f"{kind.__name__} never acted")
        return result


async def run_mixes(bout: Bout) -> Result:
    """
    `count` times something on either line, or on both, for a moment.
    """
    async with opened(bout.seed, binaries=bout.binaries, scale=SCALE) as ground:
        load = await under_load(ground)
        for _ in range(bout.count):
            names = [
                *_order(ground, "database", DATABASE),
                *_order(ground, "Dynamics", PORTAL),
            ]
            await _stand(ground, "", ground.luck.uniform(0.1, 0.8))
            await load.marker.delivered("one line" if len(names) < 2 else "several at once")
            bout.advance(1)
        return await load.end(bout)


def _order(ground: Ground, line: str, faults: Mapping[str, Fault]) -> list[str]:
    proxy = ground.database_proxy if line == "database" else ground.portal_proxy
    names = ground.luck.sample(sorted(faults), ground.luck.choice([0, 1, 1, 2]))
    for name in names:
        proxy.order(faults[name])
    return names


async def _stand(ground: Ground, what: str, seconds: float) -> None:
    """
    Let the fault stand, then heal.
    """
    await asyncio.sleep(seconds)
    if what:
        ground.measured[what] = seconds
    ground.heal()


LINES = len(DATABASE) + len(PORTAL)
