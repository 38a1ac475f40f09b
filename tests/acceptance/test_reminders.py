"""
Reminders as their users meet them: real processes, a real webhook, sentences and exit codes.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest

from tests.conftest import until
from tests.receiver import SECRET, Receiver, receiving
from worker.dynamics.sandbox import Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import date

    from tests.acceptance.site import Site
    from tests.factories import Mentor


@pytest.fixture
async def receiver(site: Site) -> AsyncIterator[Receiver]:
    """
    A webhook that the site's commands know.
    """
    async with receiving() as receiver:
        site.environment["HLF_REMINDER_URL"] = receiver.url
        site.environment["HLF_REMINDER_SECRET"] = SECRET
        yield receiver
        await site.end()
        site.workers.clear()


def _today() -> date:
    return datetime.now(UTC).astimezone(ZoneInfo("Europe/Oslo")).date()


async def _due(site: Site, number: int, days_left: int = 5) -> list[Mentor]:
    return [
        await site.world.mentor(expires_on=_today() + timedelta(days=days_left))
        for _ in range(number)
    ]


async def test_remind_and_drain_send_each_reminder_once(site: Site, receiver: Receiver) -> None:
    """
    The counts are in the document, what Dynamics got has its own keys, and no secret is shown.
    """
    await _due(site, 3)
    await _due(site, 2, days_left=20)
    await site.world.mentor(organization_id=site.world.other, expires_on=_today())
    expired = await site.world.mentor()
    site.link([expired])
    await site.run("expire")

    reminded = await site.run("remind", "--json")
    again = await site.run("remind")
    drained = await site.run("drain", "--json")

    assert reminded.code == 0
    assert reminded.document == {
        "enqueued": 5,
        "by_threshold": {"60": 0, "30": 2, "7": 3},
        "skipped": 1,
    }
    assert "Enqueued 0 reminders." in again.stdout
    assert drained.code == 0, drained.stderr
    assert (drained.document["ended"], drained.document["delivered"]) == ("done", 1)
    reminders = drained.document["reminders"]
    assert (reminders["ended"], reminders["delivered"], reminders["waiting"]) == ("done", 5, 0)
    assert len({message.id for message in receiver.messages}) == len(receiver.messages) == 5
    assert "whsec" not in "".join(run.stdout + run.stderr for run in (reminded, again, drained))


async def test_without_an_address_reminders_wait_and_status_says_so(site: Site) -> None:
    """
    Everything else works.
    """
    await _due(site, 2)

    assert "HLF_REMINDER_URL is not set" in (await site.run("remind")).stdout
    drained = await site.run("drain", "--json")
    status = await site.run("status")

    assert (drained.code, drained.document["reminders"]["ended"]) == (0, None)
    assert drained.document["reminders"]["waiting"] == 2
    assert status.code == 0
    assert "2 reminders wait to be sent." in status.stdout
    assert "HLF_REMINDER_URL is not set" in status.stdout
    document = (await site.run("status", "--json")).document
    assert document["reminders"]["waiting"] == 2
    assert document["failed"] == document["waiting"] == 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HLF_REMINDER_SECRET", "", "HLF_REMINDER_SECRET is not set"),
        ("HLF_REMINDER_SECRET", "canary-no-base64", "HLF_REMINDER_SECRET must be"),
        ("HLF_REMINDER_URL", "http://hooks.example/canary", "HLF_REMINDER_URL must start with"),
        ("HLF_REMINDER_DAYS", "60,canary", "HLF_REMINDER_DAYS"),
    ],
)
async def test_a_wrong_setting_of_reminders_is_one_sentence_and_78(
    site: Site, receiver: Receiver, name: str, value: str, words: str
) -> None:
    """
    At the start, before anything is claimed; what was wrong is not repeated.
    """
    for command in ("drain", "worker"):
        site.environment[name] = value
        run = await site.run(command)
        assert run.code == 78
        [sentence] = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
        assert words in sentence
        assert "canary" not in run.stderr


async def test_a_webhook_that_refuses_us_does_not_stop_the_portal(
    site: Site, receiver: Receiver
) -> None:
    """
    The drain exits as for a wrong set-up, with every mentor's state delivered.
    """
    receiver.answer(*[401] * 20)
    await _due(site, 3)
    mentors = await site.world.mentors(5)
    site.link(mentors)
    await site.run("expire")
    await site.run("remind")

    drained = await site.run("drain", "--json")
    status = await site.run("status")

    assert drained.code == 78
    assert (drained.document["ended"], drained.document["delivered"]) == ("done", 5)
    assert drained.document["reminders"]["ended"] == "gate"
    assert await site.wrongs() == []
    assert "The webhook of reminders does not take them." in status.stdout
    assert "check HLF_REMINDER_SECRET" in status.stdout


async def test_a_portal_that_is_down_does_not_stop_reminders(
    site: Site, receiver: Receiver
) -> None:
    """
    Each has its own gate.
    """
    site.sandbox.order(Status(status=503, times=None, target="data"))
    mentors = await site.world.mentors(8)
    site.link(mentors)
    await _due(site, 3)
    await site.run("expire")
    await site.run("remind")

    drained = await site.run("drain", "--json")

    assert drained.code == 69
    assert drained.document["reminders"]["delivered"] == 3
    assert len(receiver.messages) == 3


async def test_a_worker_delivers_reminders_too_and_lands_them_on_sigterm(
    site: Site, receiver: Receiver
) -> None:
    """
    Woken by the run, not by its own slow polls.
    """
    await site.start_worker()
    await _due(site, 4)
    await site.run("remind")
    await until(lambda: len(receiver.messages) == 4)
    [run] = await site.end()
    site.workers.clear()

    assert run.code == 0
    assert await site.world.value("SELECT count(*) FROM outbox.events") == 0


async def test_what_was_given_up_is_in_status_and_not_among_the_failures(
    site: Site, receiver: Receiver
) -> None:
    """
    Nobody has to act; the exit code says so.
    """
    receiver.answer(422)
    await _due(site, 1)
    await site.run("remind")
    drained = await site.run("drain", "--json")
    status, failures = await asyncio.gather(site.run("status"), site.run("failures"))

    assert (drained.code, drained.document["reminders"]["dead"]) == (0, 1)
    assert status.code == failures.code == 0
    assert "1 reminder was given up" in status.stdout
    assert "did not accept this one" in status.stdout
    assert failures.stdout == "No failures.\n"


async def test_eight_runs_and_drains_at_once_send_each_reminder_once(
    site: Site, receiver: Receiver
) -> None:
    """
    Whoever gets there first.
    """
    await _due(site, 100)
    reminded = await asyncio.gather(*(site.run("remind", "--json") for _ in range(8)))
    await asyncio.gather(*(site.run("drain") for _ in range(3)))

    assert sum(run.document["enqueued"] for run in reminded) == 100
    assert len({message.id for message in receiver.messages}) == len(receiver.messages) == 100
