"""
An hour without Dynamics, in ten seconds: nothing may be given up, and all be right afterwards.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.chaos.failpoints import Scale
from tests.chaos.ground import SECRET, opened
from tests.chaos.producer import AFTERWARDS
from tests.chaos.scenarios.bout import Bout, Result, result_of
from worker.dynamics.sandbox import DEFAULT_CLIENT_ID, DEFAULT_TENANT, Status

if TYPE_CHECKING:
    from tests.chaos.ground import Ground

KINDS = ("wrong secret", "403", "401", "503", "no tokens")

CONFIGURATION = {"wrong secret", "403", "401"}
"""Of these nothing dies; of an outage the one or two that found out do, to be re-driven."""

HOUR = 3600.0
FACTOR = 1 / 360
MENTORS = 150
FOUND_OUT = 2


async def run(bout: Bout) -> Result:
    """
    `count` such hours, one after the other.
    """
    scale = Scale(policy_factor=FACTOR, gate_factor=FACTOR)
    poll = {"HLF_SYNC_POLL_SECONDS": "0.02"}
    async with opened(bout.seed, binaries=bout.binaries, scale=scale, changes=poll) as ground:
        wrong: list[str] = []
        for number in range(bout.count):
            kind = KINDS[number % len(KINDS)]
            wrong += await _hour(ground, kind)
            bout.advance(1)
        findings = await ground.check()
        result = result_of(ground, findings, done=bout.count)
        for one in wrong:
            result.violate("an outage burns nothing", one)
        return result


async def _hour(ground: Ground, kind: str) -> list[str]:
    mentors = await ground.mentors(MENTORS)
    dead_before = await _dead(ground)
    await _break(ground, kind)
    worker = await ground.start("worker")
    for mentor in mentors:
        await ground.world.certifications.expire(mentor.certification_id, today=AFTERWARDS)
    await asyncio.sleep(HOUR * FACTOR)
    dead = await _dead(ground) - dead_before
    ground.heal()
    _mend(ground)
    await ground.nothing_alive()
    await ground.end(worker)
    failed = await ground.world.value(
        "SELECT count(*) FROM public.dynamics_sync_failures WHERE resolved_at IS NULL"
    )
    wrong = []
    if dead > (0 if kind in CONFIGURATION else FOUND_OUT):
        wrong.append(f"{kind}: {dead} were given up")
    if failed:
        wrong.append(f"{kind}: {failed} failures are still open")
    return wrong


async def _dead(ground: Ground) -> int:
    return int(
        await ground.world.value("SELECT count(*) FROM outbox.settled WHERE outcome = 'dead'")
    )


async def _break(ground: Ground, kind: str) -> None:
    match kind:
        case "wrong secret":
            _register(ground, "another secret")
        case "no tokens":
            ground.sandbox.order(Status(status=503, target="token", times=None))
        case status:
            ground.sandbox.order(Status(status=int(status), target="data", times=None))


def _mend(ground: Ground) -> None:
    _register(ground, SECRET)


def _register(ground: Ground, secret: str) -> None:
    ground.sandbox.register(
        {"tenant": DEFAULT_TENANT, "client_id": DEFAULT_CLIENT_ID, "client_secret": secret}
    )
