"""
SIGKILL at every failpoint, whatever Dynamics was about to answer.

Each kill has a mentor of its own: the failpoint is armed for them, and so is the answer that
the request about them meets. Workers hold one claim each, so a kill costs one claim.
"""

from __future__ import annotations

import asyncio
from itertools import cycle, islice, product
from typing import TYPE_CHECKING

from tests.chaos.failpoints import TRANSITION_POINTS, WORKER_POINTS, Arming
from tests.chaos.ground import opened
from tests.chaos.producer import AFTERWARDS
from tests.chaos.scenarios.bout import Bout, Result, result_of
from worker.dynamics.sandbox import (
    Drip,
    ExpireToken,
    Fault,
    Garbage,
    Hang,
    Html,
    ResetAfter,
    ResetBefore,
    Slow,
    Status,
    Truncated,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.failpoints import Point
    from tests.chaos.ground import Ground
    from tests.factories import Mentor

    Cell = tuple[Point, str]

OUTCOMES: Mapping[str, Fault | None] = {
    "204": None,
    "404": Status(status=404, target="data"),
    "429": Status(status=429, retry_after="1", target="data"),
    "503": Status(status=503, target="data"),
    "401": ExpireToken(),
    "slow": Slow(seconds=0.3, target="data"),
    "drip": Drip(seconds=0.02, target="data"),
    "no answer": Hang(target="data"),
    "reset before": ResetBefore(target="data"),
    "reset after": ResetAfter(target="data"),
    "cut short": Truncated(target="data"),
    "a web page": Html(target="data"),
    "no HTTP": Garbage(target="data"),
}

UNANSWERED = {"drip", "reset after", "cut short"}
"""Applied without an answer that we could take for one: another attempt is due in any case."""

WORKERS = 4
AHEAD = 8
"""So many armed mentors wait at a time; more would be killed together."""


async def run(bout: Bout) -> Result:
    """
    Kill `count` times.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        return await kill_everywhere(ground, bout)


async def kill_everywhere(ground: Ground, bout: Bout) -> Result:
    """
    Kill `count` times on this ground, come to rest, check.
    """
    cells = _cells(ground, bout.count)
    mentors = await ground.mentors(bout.count)
    plan = dict(zip((str(one.id) for one in mentors), cells, strict=True))
    ground.armed = {key: Arming(point=point) for key, (point, _) in plan.items()}
    waiting = list(mentors)
    fired: set[str] = set()
    while len(fired) < bout.count:
        await _keep_working(ground)
        while waiting and len(mentors) - len(waiting) - len(fired) < AHEAD:
            await _begin(ground, waiting.pop(), plan)
        now = {note.key for note in ground.fired()}
        bout.advance(len(now - fired))
        fired = now
        await asyncio.sleep(0.02)
    # A transition that died before its COMMIT did not happen; it is asked for once more.
    await ground.reap()
    rest = [one for one in mentors if plan[str(one.id)][0] in TRANSITION_POINTS]
    ground.armed = {}
    for one in rest:
        await ground.world.certifications.expire(one.certification_id, today=AFTERWARDS)
    await ground.come_to_rest()
    findings = await ground.check()
    result = result_of(ground, findings, done=len(fired))
    _compare_with_plan(result, plan, findings.extra)
    return result


def _cells(ground: Ground, count: int) -> list[Cell]:
    """
    Each failpoint with each answer, in random order; then over again.
    """
    cells: list[Cell] = list(product(WORKER_POINTS, OUTCOMES))
    cells += [(point, "204") for point in TRANSITION_POINTS] * 4
    ground.luck.shuffle(cells)
    return list(islice(cycle(cells), count))


async def _keep_working(ground: Ground) -> None:
    await ground.reap()
    workers = [one for one in ground.running if one.output.name.startswith("worker")]
    for _ in range(WORKERS - len(workers)):
        await ground.start("worker", HLF_SYNC_CONCURRENCY="1")


async def _begin(ground: Ground, mentor: Mentor, plan: Mapping[str, Cell]) -> None:
    point, outcome = plan[str(mentor.id)]
    if fault := OUTCOMES[outcome]:
        ground.sandbox.order(fault.model_copy(update={"key": str(mentor.dynamics_id)}))
    if point in TRANSITION_POINTS:
        await ground.produce([mentor], how="once")
    else:
        await ground.world.certifications.expire(mentor.certification_id, today=AFTERWARDS)


def _compare_with_plan(result: Result, plan: Mapping[str, Cell], extra: Mapping[str, int]) -> None:
    """
    A kill costs one more PATCH at most, and an answer that was lost another one.
    """
    for key, (point, outcome) in plan.items():
        name = f"{point} × {outcome}"
        result.tally[name] = result.tally.get(name, 0) + 1
        if extra.get(key, 0) > 1 + (outcome in UNANSWERED):
            result.violate("at most one more PATCH", f"{name}: {extra[key]} more")
    result.measured["extra PATCHes per kill"] = result.duplicated / max(1, result.done)
