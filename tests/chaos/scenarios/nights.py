"""
Eight night runs at once, over and over, each killed at any moment: together they equal one.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from tests.chaos.ground import opened
from tests.chaos.producer import AFTERWARDS
from tests.chaos.scenarios.bout import result_of
from tests.receiver import SECRET, receiving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.chaos.ground import Ground
    from tests.chaos.scenarios.bout import Bout, Result
    from tests.receiver import Message

AT_ONCE = 8

MENTORS = 20
"""So many run out for each kill, and as many are to be reminded: in 50 kills, 2,000."""

SOON = AFTERWARDS + timedelta(days=10)
"""The last valid day of those who are to be reminded: the nearest threshold is 30 days."""

# Reminders are judged here; what is left is for the checker, which knows of mentors alone.
FORGET_REMINDERS = (
    "DELETE FROM outbox.settled WHERE destination = 'reminders'",
    "DELETE FROM chaos.journal WHERE key IN"
    " (SELECT CAST(id AS text) FROM public.certifications WHERE expires_on = :soon)",
)

EXPECTED = {0, 3, 69, 75, -signal.SIGKILL}
"""Eight at once on a small machine may find Dynamics too slow; anything else is a surprise."""

DUE = "SELECT id FROM public.certifications WHERE expires_on = :soon"

NOT_ONCE = """
SELECT certification.id AS certification_id, count(journal.seq) AS times
  FROM public.certifications AS certification
  LEFT JOIN chaos.journal AS journal
    ON journal.what = 'expired' AND journal.detail = CAST(certification.id AS text)
 WHERE certification.status = 'expired' OR certification.expires_on < :afterwards
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
    async with receiving() as receiver:
        changes = {"HLF_REMINDER_URL": receiver.url, "HLF_REMINDER_SECRET": SECRET}
        async with opened(bout.seed, binaries=bout.binaries, changes=changes) as ground:
            return await _nights(bout, ground, receiver.messages)


async def _nights(bout: Bout, ground: Ground, messages: list[Message]) -> Result:
    """
    Kill them, and look at both far sides.
    """
    ground.sandbox.adjust(latency_seconds=0.02)
    killed = certifications = 0
    while killed < bout.count:
        certifications += len(await ground.mentors(MENTORS))
        certifications += len(await ground.mentors(MENTORS, expires_on=SOON))
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
    due = await ground.world.rows(DUE, soon=SOON)
    reminded = list(_not_reminded_once({row.id for row in due}, messages))
    for statement in FORGET_REMINDERS:
        await ground.world.execute(statement, soon=SOON)
    twice = await ground.world.rows(NOT_ONCE, afterwards=AFTERWARDS)
    chains = await ground.world.rows(TOO_MANY_VERSIONS)
    result = result_of(ground, await ground.check(), done=killed)
    result.checked.append("S18")
    for row in twice:
        result.violate("S18", f"certification {row.certification_id} expired {row.times} times")
    for row in chains:
        result.violate("S18", f"mentor {row.mentor_id} has {row.versions} versions")
    for evidence in reminded:
        result.violate("S18", evidence)
    for night in ground.ended:
        if night.output.name.startswith("nightly") and night.code not in EXPECTED:
            result.violate("S18", f"{night.output.stem} exited with {night.code}")
    result.measured["certifications"] = certifications
    result.measured["reminders that came twice"] = len(messages) - len({m.id for m in messages})
    return result


def _not_reminded_once(due: set[UUID], messages: list[Message]) -> Iterator[str]:
    """
    What contradicts it at a receiver that drops what it knows by its id.
    """
    arrived = {message.id: message.data for message in messages}
    times = Counter(data["certification_id"] for data in arrived.values())
    for certification in due:
        if times[str(certification)] != 1:
            yield f"certification {certification}: {times[str(certification)]} reminders"
    for data in arrived.values():
        if data["threshold_days"] != 30 or UUID(data["certification_id"]) not in due:
            yield f"nobody should have been told {data}"


async def _keep_running(ground: Ground) -> None:
    await ground.reap()
    for _ in range(AT_ONCE - len(ground.running)):
        await ground.start("nightly", "--today", str(AFTERWARDS))
