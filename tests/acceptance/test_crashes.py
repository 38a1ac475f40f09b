"""
Whatever breaks, nothing is lost: killed workers, overlapping drains, a long outage.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from tenacity import wait_exponential

from outbox import Relay, RetryPolicy
from outbox.gate import Backoff
from tests.acceptance.site import NEXT_YEAR
from tests.conftest import until
from worker import bootstrap
from worker.dynamics.sandbox import Hang, Late, Status, overlaps
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from tests.acceptance.site import Site
    from tests.factories import Mentor

QUICK_LEASE = {"HLF_SYNC_REQUEST_SECONDS": "1", "HLF_SYNC_LEASE_SECONDS": "3"}
"""So that the claims of a dead worker come back soon."""


async def _expire_and_renew(site: Site, mentors: Sequence[Mentor]) -> None:
    """
    Everybody expires, every other one is renewed again, in single transitions.
    """
    for number, mentor in enumerate(mentors):
        await site.world.certifications.expire(mentor.certification_id)
        if number % 2:
            await site.world.certifications.renew(mentor.certification_id, NEXT_YEAR)


async def test_a_worker_killed_in_mid_flight_loses_nothing(site: Site) -> None:
    """
    200 mentors expire and renew while the worker is killed; the next one makes all right.
    """
    mentors = await site.world.mentors(200)
    site.link(mentors)
    site.sandbox.adjust(latency_seconds=0.05)
    worker = await site.start_worker(**QUICK_LEASE)

    async with asyncio.TaskGroup() as producers:
        producers.create_task(_expire_and_renew(site, mentors[:100]))
        producers.create_task(_expire_and_renew(site, mentors[100:]))
        await until(lambda: len(site.requests()) > 20)
        await until(site.in_flight)
        await site.kill(worker)
    assert await site.in_flight() > 0  # it did take claims with it

    await site.start_worker(**QUICK_LEASE)
    await site.confirmed(seconds=60)

    assert await site.wrongs() == []
    assert await site.world.rows("SELECT * FROM public.dynamics_sync_failures") == []
    for number, mentor in enumerate(mentors):
        assert site.shows(mentor) is bool(number % 2)
    assert overlaps(site.sandbox.ledger.entries) == []


async def test_two_drains_and_a_worker_at_once_deliver_2000_events_without_overlap(
    site: Site,
) -> None:
    """
    Whoever claims, each mentor ends right, and no two requests for one overlap.
    """
    mentors = await site.world.mentors(2000)
    site.link(mentors)
    site.sandbox.adjust(latency_seconds=0.02)
    await site.run("expire")

    await site.start_worker()
    drains = await asyncio.gather(
        site.run("drain", "--json", seconds=100), site.run("drain", "--json", seconds=100)
    )
    await site.confirmed(seconds=60)

    assert [drain.code for drain in drains] == [0, 0]
    assert all(drain.document["delivered"] > 0 for drain in drains)
    assert await site.wrongs() == []
    assert overlaps(site.sandbox.ledger.entries) == []
    assert len(site.requests()) == 2000


async def test_an_hour_of_503_burns_next_to_nothing_and_heals_by_itself(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    An hour's worth of probes, time compressed 360-fold: then everything arrives.
    """
    mentors = await site.world.mentors(150)
    site.link(mentors)
    site.sandbox.order(Status(status=503, times=None, target="data"))
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(bootstrap.open_database())
        destination = replace(
            await stack.enter_async_context(bootstrap.open_portal(engine, Settings.load())),
            policy=RetryPolicy(
                max_attempts=4, wait=wait_exponential(multiplier=1 / 360), window_seconds=1
            ),
            outage=Backoff(first_seconds=5 / 360, longest_seconds=60 / 360),
        )
        relay = Relay(engine, destination, poll_seconds=0.01)
        running = asyncio.create_task(relay.run(grace_seconds=5))
        for mentor in mentors[:100]:
            await site.world.certifications.expire(mentor.certification_id)

        await until(lambda: len(site.requests()) >= 60 + 20, seconds=60)
        for mentor in mentors[100:]:
            await site.world.certifications.expire(mentor.certification_id)
        during = len(site.requests())
        dead = await site.world.value("SELECT count(*) FROM outbox.settled WHERE outcome = 'dead'")
        site.sandbox.call_off()
        await site.confirmed(seconds=60)

        relay.stop()
        await running

    assert during < 160  # about one a minute, for an hour, and the first few
    assert dead <= 2
    assert await site.wrongs() == []
    assert (
        await site.world.rows(
            "SELECT 1 FROM public.dynamics_sync_failures WHERE resolved_at IS NULL"
        )
        == []
    )


async def test_sigterm_lets_flights_land_and_gives_the_rest_back(site: Site) -> None:
    """
    A stopped worker leaves no claim behind, burns no attempt, and says goodbye.
    """
    quick, hanging = await site.world.mentor(), await site.world.mentor()
    site.link([quick, hanging])
    site.sandbox.order(Hang(target="data", key=str(hanging.dynamics_id), seconds=60))
    await site.run("expire")
    worker = await site.start_worker(HLF_SYNC_GRACE_SECONDS="0.5", HLF_SYNC_REQUEST_SECONDS="20")
    await site.confirmed(quick)
    await until(site.in_flight)

    worker.send_signal(signal.SIGTERM)
    async with asyncio.timeout(10):
        await worker.communicate()

    assert worker.returncode == 0
    event = await site.world.row("SELECT key, attempts, claim_token FROM outbox.events")
    assert (event.key, event.attempts, event.claim_token) == (str(hanging.id), 0, None)


async def test_an_old_request_that_lands_late_is_put_right(site: Site) -> None:
    """
    The answer to "hide" never comes, "show" is delivered, then "hide" lands: it does not last.
    """
    mentor = await site.world.mentor()
    site.link([mentor])
    site.sandbox.order(Late(target="data", key=str(mentor.dynamics_id), seconds=2.5))
    await site.start_worker(**QUICK_LEASE)
    await site.world.certifications.expire(mentor.certification_id)
    await until(lambda: site.sandbox.ledger.in_progress)
    await site.world.certifications.renew(mentor.certification_id, NEXT_YEAR)
    await site.confirmed(mentor)
    await until(lambda: site.shows(mentor) is False, seconds=10)  # the old one landed

    event = await site.world.row("SELECT version, available_at > now() AS later FROM outbox.events")
    assert event.later  # it is to be said again when no old request can be on its way
    await site.world.execute("UPDATE outbox.events SET available_at = now()")
    await until(lambda: site.shows(mentor) is True, seconds=10)


async def test_a_drain_out_of_time_leaves_the_rest_and_says_so(site: Site) -> None:
    """
    Cron's time limit is no failure: exit 75, no claim is left, the next run does the rest.
    """
    mentors = await site.world.mentors(50)
    site.link(mentors)
    site.sandbox.adjust(latency_seconds=0.2)
    await site.run("expire")

    drained = await site.run("drain", "--json", "--max-seconds", "0.5")

    assert drained.code == 75
    assert drained.document["ended"] == "time"
    assert 0 < drained.document["delivered"] < 50
    assert await site.in_flight() == 0
    site.sandbox.adjust(latency_seconds=0)
    assert (await site.run("drain")).code == 0
    assert await site.wrongs() == []
