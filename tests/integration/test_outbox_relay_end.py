"""
How a relay ends, and what it lives through: drains, stops, a failing database, lost claims.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from unittest.mock import Mock

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from structlog.testing import capture_logs
from tenacity import wait_fixed

from outbox import (
    Delivered,
    Event,
    Observer,
    RetryPolicy,
    ThrottledError,
    TransientError,
    enqueue,
    store,
)
from tests.conftest import until
from tests.integration.outbox_builders import Outbox, Remote, run_to_the_end, running
from worker import database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from tenacity import RetryCallState

    from outbox import Relay


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


@pytest.fixture
async def own_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """
    An engine for the relay alone, whose connections can be told from the test's own.
    """
    engine = database.connect(database_url, application_name="relay under test")
    yield engine
    await engine.dispose()


def busy() -> TransientError:
    """
    An error that passes.
    """
    return TransientError("busy", "Busy.")


# ---------------------------------------------------------------------------------- drain


async def test_a_drain_of_nothing_is_done(outbox: Outbox, remote: Remote) -> None:
    """
    With nothing to do it ends at once.
    """
    drained = await outbox.relay(remote.deliver).drain()

    assert drained.ended == "done"
    assert drained.tally.total() == 0


async def test_a_drain_does_not_wait_for_what_lies_in_the_future(
    outbox: Outbox, remote: Remote
) -> None:
    """
    It ends when only future rows and other workers' flights remain.
    """
    for key in ("future", "in flight elsewhere", "due"):
        await outbox.enqueue(key)
    await outbox.execute(
        "UPDATE outbox.events SET available_at = now() + interval '1 hour' WHERE key = 'future'"
    )
    await outbox.execute("UPDATE outbox.events SET priority = -1 WHERE key LIKE 'in flight%'")
    await outbox.claim(1)

    drained = await outbox.relay(remote.deliver).drain()

    assert drained.ended == "done"
    assert remote.about() == ["due"]


async def held_until_its_retry_seems_due(
    outbox: Outbox, relay: Relay, *, took_off: asyncio.Event
) -> None:
    """
    Hold the event's row while its failure lands, for longer than the delay of the retry.
    """
    await took_off.wait()
    async with outbox.engine.connect() as business:
        await business.execute(text("SELECT 1 FROM outbox.events FOR UPDATE"))
        took_off.clear()
        await until(lambda: relay._unsettled)
        await until(lambda: not relay._due)


async def test_a_drain_waits_for_its_retries_however_late_they_were_written(
    outbox: Outbox,
) -> None:
    """
    A retry is due a delay after it was *written*; a drain that counts from the failure gives
    up with the event still to be sent, and says that all is done.
    """
    took_off, calls = asyncio.Event(), 0

    async def deliver(_event: Event, _seconds: float) -> Delivered:
        nonlocal calls
        calls += 1
        if calls == 1:
            took_off.set()
            await until(lambda: not took_off.is_set())
            raise busy()
        return Delivered()

    await outbox.enqueue("a")
    policy = RetryPolicy(wait=lambda _: 0.1)  # type: ignore[arg-type]
    relay = outbox.relay(deliver, policy=policy)
    async with asyncio.TaskGroup() as group:
        group.create_task(held_until_its_retry_seems_due(outbox, relay, took_off=took_off))
        drained = await relay.drain()

    assert (drained.ended, calls) == ("done", 2)
    assert await outbox.live() is None


async def test_a_drain_that_says_done_leaves_nothing_of_its_own_behind(
    outbox: Outbox, remote: Remote
) -> None:
    """
    An event put off for a second because our own database failed its handler is waited for
    like a retry; else "done" would be said of an event that nobody has delivered.
    """
    await outbox.enqueue("a")
    remote.answers("a", OperationalError("SELECT", None, Exception("gone")))

    drained = await outbox.relay(remote.deliver).drain()

    assert drained.ended == "done"
    assert await outbox.live() is None


async def test_a_drain_ends_when_its_time_is_over(outbox: Outbox, remote: Remote) -> None:
    """
    Nothing more is claimed then; what is in flight lands, and the rest stays untouched.
    """
    for number in range(5):
        await outbox.enqueue(f"{number}")
    hold = remote.holds("0")
    relay = outbox.relay(remote.deliver, concurrency=1)
    landing = asyncio.Event()
    land = relay._land

    async def noticed(grace_seconds: float) -> None:
        landing.set()
        await land(grace_seconds)

    relay._land = noticed  # type: ignore[method-assign]
    drain = asyncio.create_task(relay.drain(seconds=0.1))
    await landing.wait()
    hold.let_go.set()

    drained = await drain

    assert drained.ended == "time"
    assert drained.tally["delivered"] == 1
    rows = await outbox.rows("SELECT attempts, claim_token FROM outbox.events")
    assert [tuple(row) for row in rows] == [(0, None)] * 4


async def test_a_drain_that_is_over_time_does_not_wait_for_a_hanging_flight(
    outbox: Outbox, remote: Remote
) -> None:
    """
    One attempt's time is the most it waits, and the flight costs the event no attempt.
    """
    await outbox.enqueue("a")
    remote.holds("a")
    started = time.monotonic()

    drained = await outbox.relay(
        remote.deliver, attempt_seconds=0.3, policy=RetryPolicy(max_attempts=1)
    ).drain(seconds=0)

    assert drained.ended == "time"
    assert time.monotonic() - started < 10
    assert remote.values == {}


async def test_a_drain_ends_at_a_closed_gate(outbox: Outbox, remote: Remote) -> None:
    """
    It does not wait for minutes in front of it.
    """
    await outbox.enqueue("a")
    await outbox.close_gate("outage", seconds=300)

    assert (await outbox.relay(remote.deliver).drain()).ended == "gate"


async def test_a_drain_that_is_stopped_has_run_out_of_time(outbox: Outbox, remote: Remote) -> None:
    """
    Work may be left, and it says so.
    """
    for key in "ab":
        await outbox.enqueue(key)
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, concurrency=1)
    drain = asyncio.create_task(relay.drain())
    await hold.arrived.wait()
    relay.stop()
    hold.let_go.set()

    assert (await drain).ended == "time"
    assert remote.about() == ["a"]


async def test_drains_and_relays_at_the_same_time_send_everything_once(
    outbox: Outbox,
) -> None:
    """
    The nightly drain overlaps with another one and with the worker: no event goes out twice,
    and each drain ends although the worker goes on.
    """
    remotes = [Remote() for _ in range(3)]
    worker, *drains = [outbox.relay(remote.deliver, concurrency=4) for remote in remotes]
    for number in range(120):
        await outbox.enqueue(f"{number}")
    await outbox.enqueue("future")
    await outbox.execute(
        "UPDATE outbox.events SET available_at = now() + interval '1 hour' WHERE key = 'future'"
    )
    async with running(worker):
        ended = await asyncio.gather(*[drain.drain() for drain in drains])
        await until(lambda: sum(len(remote.calls) for remote in remotes) >= 120)
        await until(lambda: not worker._flights)

    assert [one.ended for one in ended] == ["done", "done"]
    keys = [key for remote in remotes for key in remote.about()]
    assert len(keys) == len(set(keys)) == 120
    rows = await outbox.rows("SELECT outcome, count(*) FROM outbox.settled GROUP BY outcome")
    assert [tuple(row) for row in rows] == [("delivered", 120)]


async def test_a_drain_outlasts_a_moment_without_a_database(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A failover at night is no reason to leave the rest of the backlog to the next night.
    """
    asked: list[int] = []

    def wait(state: RetryCallState) -> float:
        asked.append(state.attempt_number)
        return 0.05 * len(asked)

    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait))  # type: ignore[arg-type]
    for key in "ab":
        await outbox.enqueue(key)
    hold = remote.holds("a")
    drain = asyncio.create_task(
        outbox.relay(remote.deliver, concurrency=1, engine=own_engine).drain()
    )
    await hold.arrived.wait()
    async with broken_database(outbox, own_engine):
        hold.let_go.set()
        await until(lambda: asked)

    drained = await drain
    assert (drained.ended, drained.tally["delivered"]) == ("done", 2)
    assert sorted(remote.values) == ["a", "b"]


async def test_a_drain_without_a_database_ends_in_time(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It does not wait for the database beyond its own end, and claims nothing after it.
    """
    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait_fixed(60)))
    async with broken_database(outbox, own_engine):
        relay = outbox.relay(remote.deliver, engine=own_engine)
        drain = asyncio.create_task(relay.drain(seconds=0.2))
        await outbox.enqueue("a")
        drained = await drain

    assert (drained.ended, remote.calls) == ("time", [])


async def test_a_drain_does_not_repeat_what_no_new_try_will_mend(
    outbox: Outbox, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A table that is not there is said at once.
    """
    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait_fixed(60)))
    monkeypatch.setattr(store, "claim_statement", lambda *_, **__: text("SELECT * FROM nowhere"))

    with pytest.raises(ProgrammingError):
        await outbox.relay(remote.deliver).drain()


async def test_a_drain_that_loses_the_database_says_so(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine
) -> None:
    """
    It raises instead of pretending; what it had claimed comes back by itself.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")
    drain = asyncio.create_task(outbox.relay(remote.deliver, engine=own_engine).drain())
    await hold.arrived.wait()
    async with broken_database(outbox, own_engine):
        hold.let_go.set()
        with pytest.raises(OperationalError):
            await drain

    await outbox.pass_time(61)
    await outbox.relay(remote.deliver).drain()
    assert await outbox.history() == [(1, "delivered")]


# ----------------------------------------------------------------------------------- stop


async def test_stopping_lets_flights_land(outbox: Outbox, remote: Remote) -> None:
    """
    What is on its way is waited for and written, and nothing more is claimed.
    """
    for key in "ab":
        await outbox.enqueue(key)
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, concurrency=1)
    run = asyncio.create_task(relay.run(grace_seconds=30))
    await hold.arrived.wait()
    relay.stop()
    hold.let_go.set()
    await run

    assert remote.about() == ["a"]
    assert await outbox.history("a") == [(1, "delivered")]
    assert (await outbox.waiting("b")).attempts == 0


async def test_stopping_gives_back_what_does_not_land(outbox: Outbox, remote: Remote) -> None:
    """
    After the grace the event is free for others at once, with all its attempts; whether the
    request got through is unknown, and remembered.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver)
    run = asyncio.create_task(relay.run(grace_seconds=0.05))
    await hold.arrived.wait()
    relay.stop()
    async with asyncio.timeout(5):
        await run

    live = await outbox.waiting()
    assert (live.attempts, live.claim_token, live.last_error_code) == (0, None, "interrupted")
    assert live.waits <= 0
    assert await outbox.doubts() == [1]


async def test_stopping_keeps_what_others_have_finished(outbox: Outbox, remote: Remote) -> None:
    """
    The event was delivered by somebody else meanwhile: giving it back changes nothing.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, concurrency=1)
    run = asyncio.create_task(relay.run(grace_seconds=0))
    await hold.arrived.wait()
    await outbox.pass_time(61)
    [event] = await outbox.claim()
    await outbox.settle(event, Delivered())
    relay.stop()
    await run

    assert await outbox.history() == [(1, "delivered")]
    assert await outbox.live() is None
    assert relay.tally["lost"] == 1


async def test_a_second_stop_does_not_wait(outbox: Outbox, remote: Remote) -> None:
    """
    Whoever insists gets the process back at once, and the event is still given back.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, attempt_seconds=25.0)
    run = asyncio.create_task(relay.run(grace_seconds=3600))
    await hold.arrived.wait()
    relay.stop()
    await until(lambda: relay._stops == 1 and not relay._awake.is_set())
    relay.stop()
    async with asyncio.timeout(5):
        await run

    assert (await outbox.waiting()).claim_token is None


async def test_a_second_stop_right_after_the_first_does_not_wait_either(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Two signals may arrive before the loop has seen the first, as while it asks the database.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, attempt_seconds=25.0)
    run = asyncio.create_task(relay.run(grace_seconds=3600))
    await hold.arrived.wait()
    relay.stop()
    relay.stop()
    try:
        async with asyncio.timeout(3):
            await asyncio.shield(run)
    finally:
        hold.let_go.set()
        await run


async def test_a_handler_that_ignores_its_end_does_not_hold_up_the_stop(
    outbox: Outbox,
) -> None:
    """
    A process that was told to go goes, also with a handler that swallows its cancellation;
    the claim comes back with its lease.
    """
    arrived, let_go = asyncio.Event(), asyncio.Event()

    async def deliver(_event: Event, _seconds: float) -> Delivered:
        arrived.set()
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()
        return Delivered()

    await outbox.enqueue("a")
    relay = outbox.relay(deliver)
    run = asyncio.create_task(relay.run(grace_seconds=0.05))
    await arrived.wait()
    relay.stop()
    try:
        async with asyncio.timeout(3):
            await asyncio.shield(run)
    finally:
        let_go.set()
        await run


async def test_what_is_stopped_can_be_started_again(outbox: Outbox, remote: Remote) -> None:
    """
    The next process goes on where this one stopped.
    """
    await outbox.enqueue("a")
    relay = outbox.relay(remote.deliver)
    relay.stop()
    await relay.run(grace_seconds=1)
    assert remote.calls == []

    await run_to_the_end(outbox, outbox.relay(remote.deliver))

    assert remote.values == {"a": 1}


async def test_stopping_settles_what_a_business_transaction_held(
    outbox: Outbox, remote: Remote
) -> None:
    """
    The flight landed, but its row was held; it is written as soon as it can be.
    """
    await outbox.enqueue("a", 1)
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver)
    run = asyncio.create_task(relay.run(grace_seconds=30))
    await hold.arrived.wait()
    async with outbox.engine.connect() as business:
        await enqueue(business, [outbox.new("a", 2)])
        hold.let_go.set()
        await until(lambda: relay._unsettled)
        relay.stop()
        await business.commit()
    await run

    assert (await outbox.history())[0] == (1, "delivered")
    live = await outbox.live()
    assert live is None or (live.version, live.claim_token) == (2, None)


async def test_a_stop_without_a_database_ends_and_says_what_it_left(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine
) -> None:
    """
    Claims that could not be given back are named; they end with their lease.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, engine=own_engine)
    run = asyncio.create_task(relay.run(grace_seconds=0.1))
    await hold.arrived.wait()
    with capture_logs() as logs:
        async with broken_database(outbox, own_engine):
            relay.stop()
            async with asyncio.timeout(10):
                await run

    assert [line["event"] for line in logs].count("outbox.claim_left") == 1
    await outbox.pass_time(61)
    await run_to_the_end(outbox, outbox.relay(remote.deliver))
    assert await outbox.history() == [(1, "delivered")]


# ------------------------------------------------------------------------ a failing database


@asynccontextmanager
async def broken_database(outbox: Outbox, engine: AsyncEngine) -> AsyncIterator[None]:
    """
    A database that the relay cannot reach meanwhile: its connections are cut, new ones refused.
    """

    def refuse(*_arguments: object) -> None:
        raise psycopg.OperationalError("connection refused")

    event.listen(engine.sync_engine, "do_connect", refuse)
    while await terminate(outbox):
        pass
    try:
        yield
    finally:
        event.remove(engine.sync_engine, "do_connect", refuse)


async def terminate(outbox: Outbox) -> int:
    """
    Kill the server processes of the relay's connections.
    """
    rows = await outbox.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'relay under test'"
    )
    return len(rows)


async def test_a_database_that_is_away_for_a_while_costs_nothing(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The relay waits, one line per look, ever longer; when the database is back everything is
    delivered and counting starts anew.
    """
    asked: list[int] = []

    def wait(state: RetryCallState) -> float:
        asked.append(state.attempt_number)
        return 0.01

    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait))  # type: ignore[arg-type]
    relay = outbox.relay(remote.deliver, engine=own_engine)
    with capture_logs() as logs:
        async with running(relay):
            for key in "ab":
                before = len(asked)
                async with broken_database(outbox, own_engine):
                    await outbox.enqueue(key)
                    await until(lambda before=before: len(asked) >= before + 5)
                await until(lambda key=key: key in remote.values)

    lines = [line["event"] for line in logs]
    assert lines.count("outbox.database_failed") == len(asked)
    assert lines.count("outbox.database_back") == 2
    again = asked.index(1, 1)
    assert asked == [*range(1, again + 1), *range(1, len(asked) - again + 1)]


async def test_outcomes_survive_a_database_that_is_away_when_they_land(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What was delivered meanwhile is written when the database is back, and not sent again.
    """
    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait_fixed(0.01)))
    for key in "abc":
        await outbox.enqueue(key)
    holds = [remote.holds(key) for key in "abc"]
    relay = outbox.relay(remote.deliver, engine=own_engine)
    async with running(relay):
        for hold in holds:
            await hold.arrived.wait()
        async with broken_database(outbox, own_engine):
            for hold in holds:
                hold.let_go.set()
            await until(lambda: len(relay._unsettled) == 3)
        await until(lambda: len(outbox.recorded) == 3)

    assert sorted(remote.about()) == ["a", "b", "c"]
    assert [await outbox.history(key) for key in "abc"] == [[(1, "delivered")]] * 3


async def test_connections_that_are_cut_lose_nothing(
    outbox: Outbox, remote: Remote, own_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Server processes of the relay are killed again and again while it works, statements and
    commits included: every event ends, and none twice.
    """
    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait_fixed(0.01)))
    for number in range(200):
        await outbox.enqueue(f"{number}")
    relay = outbox.relay(remote.deliver, engine=own_engine, concurrency=2)
    flights = relay._flights

    async def over() -> bool:
        # A claim whose COMMIT was cut off may be nobody's: its lease ends.
        await outbox.execute(
            "UPDATE outbox.events SET available_at = now()"
            " WHERE claim_token IS NOT NULL AND NOT id = ANY (:flying)",
            flying=[one.event.id for one in (*flights._up, *flights._waiting, *flights._over)]
            + [one.event.id for one in relay._unsettled],
        )
        return not await outbox.rows("SELECT 1 FROM outbox.events")

    cut = 0
    async with running(relay):
        while cut < 10 and not await over():
            cut += await terminate(outbox)
        await until(over)

    assert cut >= 10
    rows = await outbox.rows("SELECT outcome, count(*) FROM outbox.settled GROUP BY outcome")
    assert [tuple(row) for row in rows] == [("delivered", 200)]
    assert len(remote.values) == 200


async def test_a_database_that_answers_nothing_holds_nobody_for_ever(
    outbox: Outbox, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A statement without an answer is given up after its time, and the relay goes on.
    """
    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait_fixed(0.01)))
    await outbox.enqueue("a")
    relay = outbox.relay(remote.deliver, database_seconds=0.2)
    with capture_logs() as logs:
        async with outbox.engine.connect() as hole:
            await hole.execute(text("LOCK TABLE outbox.gates IN ACCESS EXCLUSIVE MODE"))
            async with running(relay):
                await until(lambda: [line for line in logs if line.get("error") == "TimeoutError"])
                await hole.rollback()
                await until(lambda: remote.values)


async def test_a_redrive_that_the_database_breaks_off_is_survived(
    outbox: Outbox, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The database goes away in the middle of a re-drive; the relay leaves it alone for a while,
    tries again, and only then opens the gate.
    """
    monkeypatch.setattr("outbox.relay.DATABASE_PATIENCE", RetryPolicy(wait=wait_fixed(0.01)))
    redriven = 0

    async def redrive(_limit: int | None) -> int:
        nonlocal redriven
        redriven += 1
        if redriven == 1:
            raise OperationalError("INSERT", None, Exception("gone"))
        return 0

    outbox.redrive = redrive
    await outbox.half_open_gate()
    await outbox.enqueue("a")
    async with running(outbox.relay(remote.deliver)):
        await outbox.enqueue("b")
        await until(lambda: sorted(remote.values) == ["a", "b"])

    assert redriven == 2
    assert (await outbox.gate()).state == "open"


# ----------------------------------------------------------------------------- lost claims


async def test_a_lost_claim_changes_nothing(outbox: Outbox) -> None:
    """
    A process stands still for longer than its lease in the middle of a request; another one
    takes over, is told a newer state, and delivers it. When the first one wakes up its result
    is dropped and counted, and the newer state is said again after the doubt.
    """
    frozen, healthy = Remote(), Remote()
    await outbox.enqueue("a", 1, value="hide")
    hold = frozen.holds("a")
    lost = Mock(spec=Observer)
    first = outbox.relay(frozen.deliver, observer=lost)
    second = outbox.relay(healthy.deliver)
    with capture_logs() as logs:
        async with running(first):
            await hold.arrived.wait()
            first._claim = nothing  # type: ignore[method-assign] # it stands still
            await outbox.enqueue("a", 2, value="show")
            await outbox.pass_time(61)
            async with running(second):
                await until(lambda: healthy.values == {"a": "show"})
                await until(lambda: second.tally["delivered"])
                before = await outbox.waiting()
                hold.let_go.set()
                await until(lambda: first.tally["lost"])

    assert [line["key"] for line in logs if line["event"] == "outbox.claim_lost"] == ["a"]
    assert first.tally["delivered"] == 0
    lost.lost.assert_called_once_with(1)
    after = await outbox.waiting()
    assert after[:-1] == before[:-1]
    assert await outbox.history() == [(2, "delivered")]
    assert [one.version for one in outbox.recorded] == [2]

    await outbox.pass_time(151)
    await run_to_the_end(outbox, outbox.relay(healthy.deliver))
    assert [call.value for call in healthy.calls] == ["show", "show"]


async def nothing(connection: AsyncConnection, room: int) -> tuple[Sequence[Event], bool]:
    """
    A claim that finds nothing.
    """
    return [], False


async def test_a_lost_claim_does_not_disturb_the_one_who_took_over(outbox: Outbox) -> None:
    """
    The late result comes while the other request is still under way: that one stays in charge.
    """
    frozen, healthy = Remote(), Remote()
    await outbox.enqueue("a", 1)
    hold, other_hold = frozen.holds("a"), healthy.holds("a")
    first, second = outbox.relay(frozen.deliver), outbox.relay(healthy.deliver)
    async with running(first):
        await hold.arrived.wait()
        first._claim = nothing  # type: ignore[method-assign]
        await outbox.pass_time(61)
        async with running(second):
            await other_hold.arrived.wait()
            hold.let_go.set()
            await until(lambda: first.tally["lost"])
            live = await outbox.waiting()
            assert (live.claimed_by, live.attempts) == (second.worker_id, 2)
            assert await outbox.history() == []
            other_hold.let_go.set()
            await until(lambda: second.tally["delivered"])

    assert await outbox.history() == [(1, "delivered")]


async def test_being_told_to_wait_for_long_outlives_no_lease(
    outbox: Outbox, remote: Remote
) -> None:
    """
    A Retry-After is waited for without holding the claim, so no lease can end meanwhile.
    """
    await outbox.enqueue("a")
    remote.answers("a", ThrottledError("throttled", "Wait.", retry_after=600))

    await outbox.relay(remote.deliver).drain()

    live = await outbox.waiting()
    assert live.claim_token is None
    assert live.waits > 590
