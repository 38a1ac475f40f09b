"""
What a mutant showed to be held by no other test.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from outbox import Relay, store
from outbox.outcome import Retry
from tests.conftest import until, wakeups_told
from tests.factories import NEXT_YEAR, TODAY, YESTERDAY
from tests.integration.outbox_builders import Outbox, Remote, running
from worker import portal
from worker.settings import Settings
from worker.wakeup import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from tests.factories import World


@pytest.fixture
def outbox(engine: AsyncEngine) -> Outbox:
    """
    An empty outbox.
    """
    return Outbox(engine)


@pytest.fixture
def remote() -> Remote:
    """
    A destination that takes everything.
    """
    return Remote()


class Witness:
    """
    A portal that looks, whenever it is asked for something, who is in a transaction.
    """

    takes_mentor_id = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = 0
        self.open: list[Row[tuple[str, str]]] = []

    async def set_visibility(self, _row: UUID | str, **_request: object) -> None:
        """
        Confirm, and remember what was open meanwhile.
        """
        self.asked += 1
        self.open += await self._others()

    async def _others(self) -> Sequence[Row[tuple[str, str]]]:
        return await self.world.rows(
            "SELECT state, query FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            "   AND xact_start IS NOT NULL"
        )


async def test_no_transaction_is_open_while_dynamics_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Neither that of the claim nor that of the mentor's link: a slow portal holds no lock and
    no connection.
    """
    monkeypatch.setenv("HLF_ORGANIZATION_ID", str(world.hlf))
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id)
    await wakeups_told()
    witness = Witness(world)
    destination = portal.destination(world.engine, witness, Settings.load())  # type: ignore[arg-type]

    drained = await Relay(world.engine, destination, poll_seconds=0.02).drain()

    assert drained.tally["delivered"] == 1
    assert (witness.asked, witness.open) == (1, [])


async def test_the_later_of_two_transitions_decides_on_what_both_changed(world: World) -> None:
    """
    Two certifications of one mentor are renewed at once: whoever has the higher version has
    seen both renewals, so what is sent last is right.
    """
    mentor = await world.mentor()
    second = await world.certification(mentor.id, expires_on=YESTERDAY)
    service = world.certifications
    await service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
    await world.execute("UPDATE public.certifications SET expires_on = :day", day=YESTERDAY)

    async def both_wait() -> bool:
        return bool(
            await world.value(
                "SELECT count(*) = 2 FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )

    async with world.engine.begin() as holding:
        await holding.execute(text("SELECT FROM public.portal_visibility FOR UPDATE"))
        renewals = [
            asyncio.create_task(service.renew(one, NEXT_YEAR, today=TODAY))
            for one in (mentor.certification_id, second)
        ]
        await until(both_wait)
    done = await asyncio.gather(*renewals)

    assert sorted((one.version, one.visible) for one in done) == [(2, False), (3, True)]
    event = await world.row("SELECT version, payload ->> 'visible' AS visible FROM outbox.events")
    assert (event.version, event.visible) == (3, "true")


async def test_the_night_run_wakes_the_worker_after_each_page(
    world: World, database_url: str
) -> None:
    """
    Whoever expired at midnight is hidden then, not at the next poll.
    """
    await world.mentor()
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        async with aclosing(world.certifications) as service:
            pages = [page async for page in service.expire_all(today=TODAY)]
        await world.execute("SELECT pg_notify(:channel, 'marker')", channel=CHANNEL)
        heard = []
        async for one in connection.notifies(timeout=10):
            heard.append(one.payload)
            if one.payload == "marker":
                break

    assert (len(pages), heard) == (1, ["", "marker"])


async def test_of_equal_priority_what_has_been_due_longest_goes_first(outbox: Outbox) -> None:
    """
    And not what was enqueued first: an old event that fails each time would always go before
    the others.
    """
    await outbox.enqueue("failing")
    await outbox.enqueue("patient")
    [failing] = await outbox.claim(1)
    await outbox.settle(failing, Retry(after_seconds=0, code="busy"))

    [first] = await outbox.claim(1)

    assert (failing.key, first.key) == ("failing", "patient")


async def test_a_half_open_gate_is_not_probed_before_earlier_flights_have_landed(
    outbox: Outbox, remote: Remote
) -> None:
    """
    They were sent before the outage; with the probe there would be more than one request under
    way.
    """
    hold = remote.holds("earlier")
    await outbox.enqueue("earlier")
    relay = outbox.relay(remote.deliver)
    looks = 0
    turn = relay._turn

    async def counted() -> bool:
        nonlocal looks
        looks += 1
        return await turn()

    relay._turn = counted  # type: ignore[method-assign]
    async with running(relay):
        await hold.arrived.wait()
        await outbox.half_open_gate()
        await outbox.enqueue("probe")
        seen = looks
        await until(lambda: looks > seen + 3)
        assert remote.about() == ["earlier"]
        hold.let_go.set()
        await until(lambda: "probe" in remote.values)


async def test_time_lost_while_claiming_counts_towards_the_lease(
    outbox: Outbox, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The lease runs from when the database wrote it: a process that stands still before it hears
    of its claim does not send, but gives the event back.
    """
    clock, lost = time.monotonic, 0.0
    claim = store.claim

    async def slow(connection: AsyncConnection, **details: object) -> store.Claimed:
        nonlocal lost
        claimed = await claim(connection, **details)  # type: ignore[arg-type]
        lost = 7.0
        return claimed

    monkeypatch.setattr(time, "monotonic", lambda: clock() + lost)
    monkeypatch.setattr(store, "claim", slow)
    await outbox.enqueue()
    relay = outbox.relay(remote.deliver, lease_seconds=12)
    drained = await relay.drain()

    assert drained.tally["deferred"] == 1
    assert [call.attempts for call in remote.calls] == [1]
    assert await outbox.history() == [(1, "delivered")]
