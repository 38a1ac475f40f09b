"""
Everything Dynamics may answer, once each, while others go on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING

from tests.chaos.ground import opened
from tests.chaos.invariants import CLOCK_SLACK_SECONDS
from tests.chaos.producer import AFTERWARDS
from tests.chaos.scenarios.load import under_load
from tests.conftest import until
from worker.dynamics.sandbox import (
    Drip,
    ExpireToken,
    Fault,
    Garbage,
    Hang,
    Html,
    Late,
    Oversized,
    Redirect,
    ResetAfter,
    ResetBefore,
    Slow,
    Status,
    Truncated,
)

if TYPE_CHECKING:
    from tests.chaos.ground import Ground
    from tests.chaos.scenarios.bout import Bout, Result
    from tests.factories import Mentor


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """
    An answer, and what is to become of the event that meets it.

    Args:
        dies: it is given up at once; else it is delivered in the end, by itself.
        lasts: it closes the gate for so long that the harness makes time pass.
    """

    name: str
    fault: Fault
    dies: bool = False
    lasts: bool = False


def _throttled(retry_after: str | None) -> Status:
    return Status(status=429, retry_after=retry_after, target="data")


def cases() -> list[Case]:
    """
    All of them, with dates of now.
    """
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    return [
        Case(name="429, 1 s", fault=_throttled("1")),
        Case(name="429, a date", fault=_throttled(soon)),
        Case(name="429, a date that is past", fault=_throttled(past)),
        Case(name="429, 0", fault=_throttled("0")),
        Case(name="429, below nothing", fault=_throttled("-1"), lasts=True),
        Case(name="429, a fraction", fault=_throttled("1.5")),
        Case(name="429, 300 s", fault=_throttled("300"), lasts=True),
        Case(name="429, ten years", fault=_throttled("315360000"), lasts=True),
        Case(name="429, no number", fault=_throttled("soon"), lasts=True),
        Case(name="429, no header", fault=_throttled(None), lasts=True),
        Case(name="400", fault=Status(status=400, target="data"), dies=True),
        Case(name="404", fault=Status(status=404, target="data"), dies=True),
        Case(name="408", fault=Status(status=408, target="data")),
        Case(name="412", fault=Status(status=412, target="data"), dies=True),
        Case(name="500", fault=Status(status=500, target="data", times=2)),
        Case(name="502", fault=Status(status=502, target="data")),
        Case(name="503", fault=Status(status=503, target="data", times=2)),
        Case(name="504", fault=Status(status=504, target="data")),
        Case(name="503, though it was done", fault=Status(status=503, applied=True, target="data")),
        Case(name="401, token revoked", fault=ExpireToken()),
        Case(name="slow", fault=Slow(seconds=0.5, target="data")),
        Case(name="drip", fault=Drip(seconds=0.05, target="data")),
        Case(name="no answer", fault=Hang(target="data")),
        Case(name="late", fault=Late(seconds=1.5, target="data")),
        Case(name="reset before", fault=ResetBefore(target="data")),
        Case(name="reset after", fault=ResetAfter(target="data")),
        Case(name="cut short", fault=Truncated(target="data")),
        Case(name="no HTTP", fault=Garbage(target="data")),
        Case(name="a web page", fault=Html(target="data")),
        Case(name="ten megabytes", fault=Oversized(target="data")),
        Case(name="go there", fault=Redirect(location="https://elsewhere.invalid/", target="data")),
    ]


CASES = len(cases())
DECIDED_SECONDS = 30.0
KEPT_CLOSED_SECONDS = 1.0

CLOSED_FOR_LONG = """
SELECT count(*) FROM outbox.gates WHERE closed_until > now() + interval '10 seconds'
"""
CLAIMS = "SELECT count(*) FROM chaos.journal WHERE what = 'claimed'"


async def run(bout: Bout) -> Result:
    """
    Each answer once; `count` is how many there are.
    """
    async with opened(bout.seed, binaries=bout.binaries) as ground:
        load = await under_load(ground)
        wrong: list[str] = []
        for case in cases():
            [mentor] = await ground.mentors(1)
            ground.sandbox.order(case.fault.model_copy(update={"key": str(mentor.dynamics_id)}))
            await ground.world.certifications.expire(mentor.certification_id, today=AFTERWARDS)
            if case.lasts and (claimed := await _let_time_pass(ground)):
                wrong.append(f"{case.name}: {claimed} claims while the gate was closed")
            if (decided := await _decided(ground, mentor)) != (
                "dead" if case.dies else "delivered"
            ):
                wrong.append(f"{case.name}: {decided}")
            bout.advance(1)
        result = await load.end(bout)
        for one in wrong:
            result.violate("each answer means what it says", one)
        return result


async def _let_time_pass(ground: Ground) -> int:
    """
    Wait until the gate is closed for long, count who claims nevertheless, and end the wait.
    """
    await until(lambda: ground.world.value(CLOSED_FOR_LONG), seconds=DECIDED_SECONDS)
    await asyncio.sleep(CLOCK_SLACK_SECONDS)
    before = await ground.world.value(CLAIMS)
    await asyncio.sleep(KEPT_CLOSED_SECONDS)
    claimed = int(await ground.world.value(CLAIMS) - before)
    await ground.world.execute("UPDATE outbox.gates SET closed_until = now()")
    await ground.world.execute(
        "UPDATE outbox.events SET available_at = now()"
        " WHERE claim_token IS NULL AND available_at > now() + interval '10 seconds'"
    )
    return claimed


async def _decided(ground: Ground, mentor: Mentor) -> str:
    """
    How the event ended, or "nothing" if it did not.
    """
    with suppress(TimeoutError):
        await until(lambda: _outcomes(ground, mentor), seconds=DECIDED_SECONDS)
    return (await _outcomes(ground, mentor) or ["nothing"])[0]


async def _outcomes(ground: Ground, mentor: Mentor) -> list[str]:
    rows = await ground.world.rows(
        "SELECT outcome FROM outbox.settled WHERE key = :key ORDER BY id DESC", key=str(mentor.id)
    )
    return [str(row.outcome) for row in rows]
