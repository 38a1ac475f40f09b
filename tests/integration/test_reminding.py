"""
Reminders on their way: from the run to the webhook, and what becomes of those that fail.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs
from tenacity import wait_exponential, wait_none

from outbox import Relay, RetryPolicy, about_the_attempt
from outbox.gate import OPEN, Backoff
from tests.conftest import until
from tests.receiver import SECRET, Receiver, receiving
from worker import bootstrap, reminding
from worker.certifications import PauseManagementService
from worker.certifications.reminders import CertificationReminderService
from worker.coordinator import alerts
from worker.settings import Settings
from worker.webhook import message_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import date

    from outbox import Destination, Drained
    from tests.factories import Mentor, World

AT_ONCE = RetryPolicy(max_attempts=3, wait=wait_none(), window_seconds=600)


class Post:
    """
    HLF's reminders, and a receiver that can be told what to answer.
    """

    def __init__(self, world: World, receiver: Receiver) -> None:
        self.world = world
        self.receiver = receiver
        self.settings = Settings.load()

    async def today(self) -> date:
        """
        Of the organisation.
        """
        day: date = await self.world.value("SELECT CAST(now() AT TIME ZONE 'Europe/Oslo' AS date)")
        return day

    async def mentor(self, days_left: int = 5) -> Mentor:
        """
        A mentor whose certification runs out so soon.
        """
        return await self.world.mentor(expires_on=await self.today() + timedelta(days=days_left))

    async def remind(self, today: date | None = None) -> int:
        """
        A whole run; how many were enqueued.
        """
        service = CertificationReminderService(
            self.world.engine,
            organization_id=self.world.hlf,
            timezone="Europe/Oslo",
            thresholds=self.settings.reminder_days,
        )
        return sum([page.enqueued async for page in service.remind_all(today=today)])

    @asynccontextmanager
    async def destination(self) -> AsyncIterator[Destination]:
        """
        The webhook, patient as it is not in production.
        """
        async with bootstrap.open_webhook(self.settings) as webhook:
            yield replace(
                reminding.destination(self.world.engine, webhook, self.settings),
                policy=AT_ONCE,
                outage=Backoff(first_seconds=0.01, longest_seconds=0.01),
            )

    async def drain(self) -> Drained:
        """
        Deliver what is due.
        """
        async with self.destination() as destination:
            return await Relay(self.world.engine, destination).drain(seconds=30)

    async def history(self) -> list[tuple[str, str | None]]:
        """
        How each reminder ended, in order.
        """
        rows = await self.world.rows(
            "SELECT outcome, error_code FROM outbox.settled WHERE destination = 'reminders'"
            " ORDER BY id"
        )
        return [(row.outcome, row.error_code) for row in rows]

    async def state(self) -> alerts.Reminders:
        """
        As `status` has it.
        """
        async with self.world.engine.connect() as connection:
            return await alerts.reminders(connection, organization_id=self.world.hlf)


@pytest.fixture
async def post(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Post]:
    """
    Set up and in order.
    """
    async with receiving() as receiver:
        monkeypatch.setenv("HLF_ORGANIZATION_ID", str(world.hlf))
        monkeypatch.setenv("HLF_REMINDER_URL", receiver.url)
        monkeypatch.setenv("HLF_REMINDER_SECRET", SECRET)
        yield Post(world, receiver)


async def test_a_reminder_arrives_once_although_the_run_ran_twice(post: Post) -> None:
    """
    Before and after it was sent.
    """
    mentor = await post.mentor()
    assert [await post.remind(), await post.remind()] == [1, 0]
    await post.drain()
    assert await post.remind() == 0
    await post.drain()

    [message] = post.receiver.messages
    assert message.data["certification_id"] == str(mentor.certification_id)
    assert message.data["mentor_id"] == str(mentor.id)
    assert message.data["threshold_days"] == 7
    assert message.id == str(
        message_id(str(mentor.certification_id), 7, message.data["expires_on"])
    )
    assert await post.history() == [("delivered", None)]


@pytest.mark.parametrize("why", ["renewed", "expired", "paused", "run out", "moved", "gone"])
async def test_what_is_not_wanted_any_more_is_withdrawn(post: Post, why: str) -> None:
    """
    Between the run and its turn; no failure, nothing sent.
    """
    mentor = await post.mentor()
    assert await post.remind() == 1
    match why:
        case "renewed":
            await post.world.certifications.renew(
                mentor.certification_id, await post.today() + timedelta(days=365)
            )
        case "expired":
            await post.world.certifications.expire(
                mentor.certification_id, today=await post.today() + timedelta(days=6)
            )
        case "paused":
            await PauseManagementService(post.world.engine).pause(mentor.id)
        case "run out":
            await post.world.execute("UPDATE public.certifications SET expires_on = expires_on - 6")
            await post.world.execute(
                "UPDATE outbox.events SET payload = jsonb_set(payload, '{expires_on}',"
                " to_jsonb(CAST(payload ->> 'expires_on' AS date) - 6))"
            )
        case "moved":
            await post.world.execute(
                "UPDATE public.mentors SET organization_id = :other", other=post.world.other
            )
        case "gone":
            await post.world.execute("DELETE FROM public.certifications")

    drained = await post.drain()

    assert post.receiver.messages == []
    assert drained.tally["skipped"] == 1
    assert await post.history() == [("skipped", "withdrawn")]


async def test_a_renewed_mentor_is_reminded_again_next_year(post: Post) -> None:
    """
    With another id, so that the receiver does not take it for a repeat.
    """
    mentor = await post.mentor()
    await post.remind()
    await post.drain()
    until = await post.today() + timedelta(days=365)
    await post.world.certifications.renew(mentor.certification_id, until)
    assert await post.remind(until - timedelta(days=7)) == 1
    await post.drain()

    first, second = post.receiver.messages
    assert first.id != second.id
    assert second.data["expires_on"] == until.isoformat()


async def test_what_fails_for_a_while_is_tried_again_under_the_same_id(post: Post) -> None:
    """
    With a failure that may have been none.
    """
    await post.mentor()
    await post.remind()
    post.receiver.answer(503)
    post.receiver.answers.append(None)
    await post.drain()

    assert len(post.receiver.messages) == 3
    assert len({message.id for message in post.receiver.messages}) == 1
    assert await post.history() == [("delivered", None)]


async def test_what_is_refused_is_given_up_and_never_a_failure_of_the_portal(
    post: Post,
) -> None:
    """
    The history has it, status tells it, and nobody is asked to see to it in Dynamics.
    """
    await post.mentor()
    await post.remind()
    post.receiver.answer(422)
    await post.drain()

    assert await post.history() == [("dead", "webhook_refused")]
    now = await post.state()
    assert (now.waiting, now.given_up, now.last_error_code) == (0, 1, "webhook_refused")
    assert await post.world.value("SELECT count(*) FROM public.dynamics_sync_failures") == 0
    async with post.destination() as destination:
        assert await destination.redrive(None) == 0


async def test_a_wrong_set_up_closes_the_gate_of_reminders_alone(post: Post) -> None:
    """
    Nothing is burnt, and the portal goes on.
    """
    for _ in range(3):
        await post.mentor()
    await post.remind()
    post.receiver.answer(*[401] * 20)

    drained = await post.drain()

    assert drained.ended == "gate"
    now = await post.state()
    assert (now.waiting, now.given_up) == (3, 0)
    assert (now.gate.state, now.gate.reason) == ("closed", "configuration")
    async with post.world.engine.connect() as connection:
        status = await alerts.status(connection, organization_id=post.world.hlf)
    assert status.gate == OPEN
    assert await post.world.value("SELECT max(attempts) FROM outbox.events") == 0


async def test_a_429_closes_the_gate_for_as_long_as_it_says(post: Post) -> None:
    """
    Without burning an attempt.
    """
    await post.mentor()
    await post.remind()
    post.receiver.answer(429, Retry_After="300")
    assert (await post.drain()).ended == "gate"

    gate = (await post.state()).gate
    assert gate.reason == "throttled"
    assert 200 < gate.seconds <= 300


async def _die(post: Post, *, code: str = "webhook_unreachable", days: int = 0) -> None:
    """
    As if what waits had been given up so long ago.
    """
    await post.world.execute(
        "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version,"
        " payload, outcome, attempts, error_code, created_at, settled_at)"
        " SELECT id, destination, key, organization_id, version, payload, 'dead', 10, :code,"
        " created_at, now() - make_interval(days => :days) FROM outbox.events",
        code=code,
        days=days,
    )
    await post.world.execute("DELETE FROM outbox.events")


@pytest.mark.parametrize(
    ("code", "days", "redriven"),
    [
        ("webhook_unreachable", 0, 1),
        ("webhook_unavailable", 6, 1),
        ("webhook_unavailable", 8, 0),
        ("webhook_refused", 0, 0),
        ("abandoned", 0, 0),
    ],
)
async def test_what_died_lately_of_something_that_passes_is_sent_again(
    post: Post, code: str, days: int, redriven: int
) -> None:
    """
    Once, and it is not told as given up any more.
    """
    await post.mentor()
    await post.remind()
    await _die(post, code=code, days=days)
    async with post.destination() as destination:
        assert await destination.redrive(None) == redriven
        assert await destination.redrive(None) == 0
    assert (await post.state()).given_up == 1 - redriven
    await post.drain()

    assert len(post.receiver.messages) == redriven
    assert (await post.state()).given_up == 1 - redriven
    async with post.destination() as destination:
        assert await destination.redrive(None) == 0


async def test_what_died_and_is_not_wanted_any_more_is_not_sent_again(post: Post) -> None:
    """
    Renewed meanwhile.
    """
    mentor = await post.mentor()
    await post.remind()
    await _die(post)
    await post.world.certifications.renew(
        mentor.certification_id, await post.today() + timedelta(days=365)
    )
    async with post.destination() as destination:
        assert await destination.redrive(None) == 0


async def test_a_redrive_goes_in_pages_and_stops_at_its_limit(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One for a probe, all after an outage.
    """
    monkeypatch.setattr(reminding, "REDRIVE_PAGE", 2)
    for _ in range(5):
        await post.mentor()
    await post.remind()
    await _die(post)
    async with post.destination() as destination:
        assert [await destination.redrive(1), await destination.redrive(None)] == [1, 4]


async def test_after_an_outage_all_reminders_arrive_once(post: Post) -> None:
    """
    The breaker closes the gate, the probe opens it, and what had died goes again.
    """
    mentors = [await post.mentor() for _ in range(30)]
    await post.remind()
    post.receiver.answer(*[503] * 60)

    async def all_sent() -> bool:
        await post.drain()
        now = await post.state()
        return now.waiting == 0 and now.given_up == 0

    await until(all_sent, seconds=60)
    taken = [message.id for message in post.receiver.messages[60:]]
    assert len(taken) == len(set(taken)) == len(mentors)


def test_a_reminder_is_tried_for_more_than_an_hour() -> None:
    """
    Ten times, ever further apart, never more than an hour.
    """
    policy = reminding.REMINDER_POLICY
    delays: list[float] = []
    while (
        delay := policy.next_delay(attempt=len(delays) + 1, elapsed_seconds=sum(delays))
    ) is not None:
        delays.append(delay)

    assert delays == [10, 20, 40, 80, 160, 320, 640, 1280, 2560]


async def test_a_drain_does_not_wait_for_a_retry_of_later(post: Post) -> None:
    """
    It says that nothing more is due, and the next one goes on.
    """
    await post.mentor()
    await post.remind()
    post.receiver.answer(503)
    async with post.destination() as destination:
        slow = replace(
            destination,
            policy=replace(reminding.REMINDER_POLICY, wait=wait_exponential(3600)),
        )
        drained = await Relay(post.world.engine, slow).drain(seconds=60)

    assert (drained.ended, drained.tally["retry"]) == ("done", 1)
    assert (await post.state()).waiting == 1


async def test_a_reminder_that_names_no_mentor_is_given_up_like_another(post: Post) -> None:
    """
    Also where each line of the log says whose it is.
    """
    await post.mentor()
    await post.remind()
    await post.world.execute("UPDATE outbox.events SET payload = payload - 'mentor_id'")
    post.receiver.answer(422)
    with capture_logs(processors=[about_the_attempt]) as lines:
        drained = await post.drain()

    assert drained.tally["dead"] == 1
    [failed] = [line for line in lines if line["event"] == "outbox.attempt_failed"]
    assert (failed["code"], failed["mentor_id"]) == ("webhook_refused", None)


@pytest.mark.parametrize("payload", ["{}", '{"certification_id": "x", "expires_on": "y"}', "[1]"])
async def test_what_is_no_reminder_is_in_nobodys_way(post: Post, payload: str) -> None:
    """
    Whoever may enqueue may enqueue nonsense: it is withdrawn, and the others go out.
    """
    await post.mentor()
    await post.remind()
    await post.world.execute(
        "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
        " VALUES ('reminders', 'nothing', :hlf, 1, CAST(:payload AS jsonb))",
        hlf=post.world.hlf,
        payload=payload,
    )
    async with post.destination() as destination:
        await Relay(post.world.engine, destination).drain(seconds=2)

    assert len(post.receiver.messages) == 1
    assert sorted(await post.history()) == [("delivered", None), ("skipped", "withdrawn")]
