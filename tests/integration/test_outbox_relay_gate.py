"""
Relays and the gate: an outage costs no event an attempt, and ends by itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text

from outbox import (
    ConfigurationError,
    PermanentError,
    Settlement,
    Skipped,
    ThrottledError,
    TransientError,
    store,
)
from outbox.gate import Backoff
from outbox.store import START, Claimed
from tests.conftest import until
from tests.integration.outbox_builders import Outbox, Remote, run_to_the_end, running
from worker import database

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

AT_ONCE = Backoff(first_seconds=0.01, longest_seconds=0.01)
"""An outage that is looked at again after a moment."""


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


def busy() -> TransientError:
    """
    An error that passes.
    """
    return TransientError("busy", "Busy.")


async def enqueue_many(outbox: Outbox, keys: str) -> None:
    """
    One event for each letter.
    """
    for key in keys:
        await outbox.enqueue(key)


async def attempts(outbox: Outbox) -> list[int]:
    """
    The attempts of all live events.
    """
    rows = await outbox.rows("SELECT attempts FROM outbox.events ORDER BY key")
    return [row.attempts for row in rows]


# ------------------------------------------------------------------------------ throttled


async def test_a_wait_that_was_asked_for_holds_for_every_process(
    outbox: Outbox, remote: Remote
) -> None:
    """
    One relay is told to keep away for a minute: neither it nor another one sends anything
    until then, and nothing is burnt.
    """
    await outbox.enqueue("a")
    remote.answers("a", ThrottledError("throttled", "Wait.", retry_after=60))
    drained = await outbox.relay(remote.deliver).drain()
    await outbox.enqueue("b")

    assert (await outbox.relay(remote.deliver).drain()).ended == "gate"

    assert drained.ended == "gate"
    assert remote.about() == ["a"]
    closed = await outbox.gate()
    assert closed.reason == "throttled"
    assert 50 < closed.seconds <= 60
    assert await attempts(outbox) == [0, 0]

    await outbox.pass_time(61)
    drained = await outbox.relay(remote.deliver).drain()
    assert drained.ended == "done"
    assert sorted(remote.values) == ["a", "b"]


async def test_an_hour_of_throttling_kills_nothing(outbox: Outbox, remote: Remote) -> None:
    """
    However often everybody is sent away, no event dies of it; afterwards all are delivered,
    and more relays have not asked more often.
    """
    await enqueue_many(outbox, "abc")
    relays = [outbox.relay(remote.deliver, concurrency=1) for _ in range(3)]
    remote.broken = ThrottledError("throttled", "Wait.", retry_after=300)
    for wait in range(1, 13):
        for relay in relays:
            await relay.drain()
        assert len(remote.calls) == wait
        await outbox.pass_time(301)

    remote.broken = None
    for relay in relays:
        await relay.drain()
    assert sorted(remote.values) == ["a", "b", "c"]
    assert (await outbox.rows("SELECT max(attempts) FROM outbox.settled"))[0][0] == 1


@pytest.mark.parametrize("retry_after", [0.0, -5.0])
async def test_a_wait_of_no_time_is_no_hot_loop(
    outbox: Outbox, remote: Remote, retry_after: float
) -> None:
    """
    "Wait 0 seconds", or until a moment that is past, must not turn into requests as fast as
    the machine can send them.
    """
    await outbox.enqueue("a")
    remote.broken = ThrottledError("throttled", "Wait.", retry_after=retry_after)

    await outbox.relay(remote.deliver).drain(seconds=0.5)

    assert len(remote.calls) == 1


@pytest.mark.parametrize(
    "retry_after",
    [
        float("nan"),
        1e30,
        float("inf"),
    ],
)
async def test_a_wait_that_no_clock_can_hold_does_not_stop_the_relay(
    outbox: Outbox, remote: Remote, retry_after: float
) -> None:
    """
    Whatever number a handler passes on, the gate closes and the next events are not stuck
    behind a wait that cannot be written.
    """
    await outbox.enqueue("a")
    remote.answers("a", ThrottledError("throttled", "Wait.", retry_after=retry_after))

    drained = await outbox.relay(remote.deliver).drain(seconds=5)

    assert drained.ended == "gate"
    assert (await outbox.waiting()).claim_token is None


# -------------------------------------------------------------------------- configuration


async def test_a_broken_setup_closes_the_gate_and_burns_nothing(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Nobody can be told anything before it is mended; a few requests find that out, and no
    event pays for it.
    """
    await enqueue_many(outbox, "abcdefgh")
    remote.broken = ConfigurationError("forbidden", "The permission is missing.")

    drained = await outbox.relay(remote.deliver, concurrency=2).drain()

    assert drained.ended == "gate"
    assert len(remote.calls) <= 4
    closed = await outbox.gate()
    assert (closed.reason, closed.message) == ("configuration", "The permission is missing.")
    assert await attempts(outbox) == [0] * 8
    assert await outbox.rows("SELECT 1 FROM outbox.settled") == []


async def test_an_hour_of_a_broken_setup_kills_nothing(outbox: Outbox, remote: Remote) -> None:
    """
    Each time the gate opens for a look, one request goes out, and all waits for the repair.
    """
    await enqueue_many(outbox, "abc")
    remote.broken = ConfigurationError("forbidden", "The permission is missing.")
    relay = outbox.relay(remote.deliver, concurrency=1)
    for look in range(1, 13):
        await relay.drain()
        assert len(remote.calls) == look
        await outbox.pass_time(301)

    remote.broken = None
    await outbox.relay(remote.deliver).drain()

    assert sorted(remote.values) == ["a", "b", "c"]
    assert (await outbox.rows("SELECT max(attempts) FROM outbox.settled"))[0][0] == 1


# --------------------------------------------------------------------------------- outage


async def test_several_failing_keys_close_the_gate(outbox: Outbox, remote: Remote) -> None:
    """
    Five different keys failing in a row are an outage: the rest is not even tried.
    """
    await enqueue_many(outbox, "abcdefghijkl")
    remote.broken = busy()

    drained = await outbox.relay(remote.deliver, concurrency=1).drain()

    assert drained.ended == "gate"
    assert len(set(remote.about())) == 5
    closed = await outbox.gate()
    assert (closed.reason, closed.message) == (
        "outage",
        "Several deliveries in a row failed (busy).",
    )


async def test_an_outage_burns_no_attempts(outbox: Outbox, remote: Remote) -> None:
    """
    What failed while it began is as good as new when it is over.
    """
    await enqueue_many(outbox, "abcde")
    remote.broken = busy()
    await outbox.relay(remote.deliver, concurrency=5).drain()
    assert (await outbox.gate()).state == "closed"

    remote.broken = None
    await outbox.pass_time(61)
    await run_to_the_end(outbox, outbox.relay(remote.deliver))

    rows = await outbox.rows("SELECT outcome, attempts FROM outbox.settled")
    assert [tuple(row) for row in rows] == [("delivered", 1)] * 5


async def test_a_probe_that_comes_through_opens_the_gate_after_the_redrive(
    outbox: Outbox, remote: Remote
) -> None:
    """
    One request first; then what died of the outage is enqueued again while the gate is still
    closed, so that a crash in between is finished by the next probe; then all go.
    """
    states: list[str] = []

    async def redrive(limit: int | None) -> int:
        states.append((await outbox.gate()).state)
        assert limit is None
        await outbox.enqueue("dead of the outage", 2)
        return 1

    outbox.redrive = redrive
    await outbox.half_open_gate()
    await enqueue_many(outbox, "abc")
    hold = remote.holds("a")
    async with running(outbox.relay(remote.deliver)):
        await hold.arrived.wait()
        assert remote.about() == ["a"]
        hold.let_go.set()
        await until(lambda: len(remote.values) == 4)

    assert states == ["closed"]
    assert outbox.redriven == [None]
    assert (await outbox.gate()).state == "open"


async def test_while_one_probes_all_others_wait(outbox: Outbox, remote: Remote) -> None:
    """
    Of two relays with much to do, one sends one request.
    """
    await outbox.half_open_gate()
    await enqueue_many(outbox, "abc")
    hold = remote.holds("a")
    relays = [outbox.relay(remote.deliver) for _ in range(2)]
    looks = 0
    turn = relays[1]._turn

    async def counted() -> bool:
        nonlocal looks
        looks += 1
        return await turn()

    relays[1]._turn = counted  # type: ignore[method-assign]
    async with running(relays[0]):
        await hold.arrived.wait()
        async with running(relays[1]):
            await until(lambda: looks > 3)
            assert remote.about() == ["a"]
            assert relays[1].gate.state == "closed"
            hold.let_go.set()
            await until(lambda: len(remote.values) == 3)


async def test_a_refused_probe_opens_the_gate_too(outbox: Outbox, remote: Remote) -> None:
    """
    An answer about the event itself shows that the destination is back.
    """
    await outbox.half_open_gate()
    await enqueue_many(outbox, "ab")
    remote.answers("a", PermanentError("gone", "Gone."))

    drained = await outbox.relay(remote.deliver).drain()

    assert drained.ended == "done"
    assert await outbox.history("a") == [(1, "dead")]
    assert await outbox.history("b") == [(1, "delivered")]


@pytest.mark.parametrize("error", [busy(), ValueError("bug")], ids=["transient", "bug"])
async def test_a_failed_probe_closes_again_for_longer_and_burns_nothing(
    outbox: Outbox, remote: Remote, error: Exception
) -> None:
    """
    Probes of a long outage come ever more rarely, and the probing event has all its attempts.
    """
    await enqueue_many(outbox, "ab")
    remote.broken = error
    waits = []
    await outbox.half_open_gate()
    for look in range(1, 9):
        drained = await outbox.relay(remote.deliver).drain()
        assert drained.ended == "gate"
        assert len(remote.calls) == look
        waits.append((await outbox.gate()).seconds)
        await outbox.pass_time(61)

    assert waits[0] < waits[1] < waits[2] <= max(waits) <= 60
    assert await attempts(outbox) == [0, 0]
    assert outbox.redriven == []


async def test_a_hanging_probe_is_a_failed_one(outbox: Outbox, remote: Remote) -> None:
    """
    It meets its deadline, and its doubt is remembered.
    """
    await outbox.half_open_gate()
    await outbox.enqueue("a")
    remote.holds("a")

    drained = await outbox.relay(remote.deliver, attempt_seconds=0.1).drain()

    assert drained.ended == "gate"
    assert await outbox.doubts() == [1]
    assert await attempts(outbox) == [0]


async def test_a_throttled_probe_keeps_everybody_away_for_as_long_as_asked(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Neither shorter, by our own backoff, nor opened: the destination has the word.
    """
    await outbox.half_open_gate()
    await outbox.enqueue("a")
    remote.answers("a", ThrottledError("throttled", "Wait.", retry_after=200))

    await outbox.relay(remote.deliver).drain()

    closed = await outbox.gate()
    assert closed.reason == "throttled"
    assert 190 < closed.seconds <= 200


async def test_a_skipped_probe_leaves_the_gate_to_the_next_one(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Nothing was sent, so nothing was proved: the gate is neither opened nor closed for longer.
    """
    await outbox.half_open_gate()
    await outbox.enqueue("a")
    await outbox.enqueue("b")
    remote.answers("a", Skipped(reason="other_organization"))

    relay = outbox.relay(remote.deliver)
    await relay.drain()
    assert remote.about() == ["a"]
    assert (await outbox.gate()).state == "closed"

    await outbox.pass_time(11)
    await relay.drain()
    assert sorted(remote.values) == ["b"]
    assert (await outbox.gate()).state == "open"


async def test_burying_an_event_unsent_does_not_open_the_gate(
    outbox: Outbox, remote: Remote
) -> None:
    """
    The probe falls on an event that killed its workers: it is buried without a request, so
    the destination has shown nothing and the others go on waiting.
    """
    await outbox.half_open_gate()
    await outbox.enqueue("killer")
    for _ in range(4):
        await outbox.claim(1, probing=True)
        await outbox.pass_time(61)
    await outbox.enqueue("innocent")
    remote.broken = busy()

    await outbox.relay(remote.deliver, concurrency=1).drain()

    assert await outbox.history("killer") == [(1, "dead")]
    assert remote.calls == []
    assert outbox.redriven == []
    assert (await outbox.gate()).state == "closed"


async def test_one_event_that_always_fails_does_not_keep_the_gate_shut(
    outbox: Outbox, remote: Remote
) -> None:
    """
    The destination works but for one urgent event, of which it always says that it is busy:
    probes must get round to another event, or everybody waits for the one for ever.
    """
    await outbox.enqueue("stuck", priority=0)
    await outbox.enqueue("fine", priority=1)
    remote.answers("stuck", *[busy()] * 50)
    await outbox.half_open_gate()
    for _ in range(6):
        await outbox.relay(remote.deliver, concurrency=1).drain()
        await outbox.pass_time(61)

    assert "fine" in remote.values


async def test_half_open_with_nothing_to_send_redrives_one(outbox: Outbox, remote: Remote) -> None:
    """
    If everything died before the gate closed, one of the dead goes ahead to see; the others
    follow when it came through.
    """
    dead = ["a", "b", "c"]

    async def redrive(limit: int | None) -> int:
        again = dead[: len(dead) if limit is None else limit]
        del dead[: len(again)]
        for key in again:
            await outbox.enqueue(key, 2)
        return len(again)

    outbox.redrive = redrive
    await outbox.half_open_gate()
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver)
    async with running(relay):
        await hold.arrived.wait()
        assert outbox.redriven == [1]
        assert dead == ["b", "c"]
        hold.let_go.set()
        await until(lambda: len(remote.values) == 3)

    assert outbox.redriven[:2] == [1, None]


async def test_half_open_with_nothing_at_all_stays_half_open(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Looking for a probe in vain takes nothing: the next event can go at once.
    """
    await outbox.half_open_gate()
    drained = await outbox.relay(remote.deliver).drain()
    assert drained.ended == "done"
    assert (await outbox.gate()).state == "half-open"

    await outbox.enqueue("a")
    await outbox.relay(remote.deliver).drain()

    assert remote.values == {"a": 1}
    assert (await outbox.gate()).state == "open"


async def test_half_open_with_nothing_at_all_opens_no_connection_at_each_look(
    outbox: Outbox, remote: Remote, database_url: str
) -> None:
    """
    It may stay so for hours.
    """
    engine = database.connect(database_url, application_name="test", pool_size=2)
    opened: list[object] = []
    event.listen(engine.sync_engine, "connect", lambda *connection: opened.append(connection))
    await outbox.half_open_gate()
    async with running(outbox.relay(remote.deliver, engine=engine, poll_seconds=0.01)):
        await until(lambda: len(outbox.redriven) >= 10)
    await engine.dispose()

    assert len(opened) <= 2


async def test_a_probe_that_was_overtaken_is_no_end(
    outbox: Outbox, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What changed while it was claimed is due: a drain goes on, and delivers it.
    """
    await outbox.enqueue("a")
    await outbox.half_open_gate()
    claim = store.claim
    overtaken: list[object] = []

    async def once_overtaken(connection: AsyncConnection, **how: Any) -> Claimed:  # noqa: ANN401
        if how["probing"] and not overtaken:
            overtaken.append(how)
            return Claimed(gate="half-open", events=[], last=START, due=1)
        return await claim(connection, **how)

    monkeypatch.setattr(store, "claim", once_overtaken)
    drained = await outbox.relay(remote.deliver).drain()

    assert (drained.ended, drained.tally["delivered"]) == ("done", 1)


async def test_a_redrive_needs_no_second_place_in_the_pool(
    outbox: Outbox, remote: Remote, database_url: str
) -> None:
    """
    The relay lets its own connection go meanwhile.
    """
    engine = database.connect(database_url, application_name="test", pool_size=1)

    async def redrive(_limit: int | None) -> int:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT 1"))
        return 0

    outbox.redrive = redrive
    await outbox.enqueue("a")
    await outbox.half_open_gate()
    async with asyncio.timeout(8):  # less than a pool lets anybody wait
        await outbox.relay(remote.deliver, engine=engine).drain()
    await engine.dispose()

    assert (await outbox.gate()).state == "open"


async def test_a_real_outage_from_its_start_to_its_end(outbox: Outbox, remote: Remote) -> None:
    """
    Two relays meet an outage with a few events: some die, the gate closes, probes go out one
    by one, and when it is over everything is delivered without anybody's help.
    """
    dead: dict[str, int] = {}

    def record(settlement: Settlement) -> None:
        if settlement.ending == "dead":
            dead[settlement.key] = settlement.version
        elif settlement.ending == "delivered":
            dead.pop(settlement.key, None)

    async def redrive(limit: int | None) -> int:
        again = [key for key in sorted(dead) if await outbox.live(key) is None][:limit]
        for key in again:
            await outbox.enqueue(key, dead[key] + 1)
        return len(again)

    outbox.record, outbox.redrive = record, redrive
    remote.broken = busy()
    relays = [
        outbox.relay(remote.deliver, outage=AT_ONCE, breaker_keys=3, concurrency=2)
        for _ in range(2)
    ]
    async with running(*relays):
        await outbox.enqueue("a")
        await until(lambda: dead)
        await enqueue_many(outbox, "bcd")
        calls = len(remote.calls)
        await until(lambda: len(remote.calls) > calls + 5)
        remote.broken = None
        await until(lambda: len(remote.values) == 4)
        await until(lambda: not dead)

    assert (await outbox.gate()).state == "open"


# -------------------------------------------------------------------------------- by hand


async def test_nothing_is_sent_while_a_person_keeps_the_gate_closed(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Events wait, untouched, and go when the person opens it.
    """
    await outbox.close_gate_by_hand()
    await enqueue_many(outbox, "ab")
    assert (await outbox.relay(remote.deliver).drain()).ended == "gate"
    assert remote.calls == []
    assert await attempts(outbox) == [0, 0]

    await outbox.open_gate()

    await outbox.relay(remote.deliver).drain()
    assert sorted(remote.values) == ["a", "b"]


async def test_a_flight_lands_after_a_person_closed_the_gate(
    outbox: Outbox, remote: Remote
) -> None:
    """
    What is on its way comes to its end and is written; nothing new goes out, and no failure
    of it opens the gate.
    """
    await enqueue_many(outbox, "ab")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, concurrency=1)
    async with running(relay):
        await hold.arrived.wait()
        await outbox.close_gate_by_hand()
        hold.let_go.set()
        await until(lambda: outbox.recorded)
        await until(lambda: relay.gate.state == "closed")

    assert remote.about() == ["a"]
    assert await outbox.history("a") == [(1, "delivered")]
    assert (await outbox.gate()).reason == "operator"


async def test_a_person_who_pauses_during_a_probe_is_obeyed(outbox: Outbox, remote: Remote) -> None:
    """
    The probe that was under way fails; nothing goes out afterwards, however long it lasts.
    """
    await outbox.half_open_gate()
    await enqueue_many(outbox, "ab")
    hold = remote.holds("a")
    relay = outbox.relay(remote.deliver, attempt_seconds=0.3)
    async with running(relay):
        await hold.arrived.wait()
        await outbox.close_gate_by_hand()
        await until(lambda: outbox.recorded)
    await outbox.pass_time(3600)

    await outbox.relay(remote.deliver).drain()

    assert remote.about() == ["a"]


# ------------------------------------------------------------------ closing is not forgotten


async def test_the_gate_is_closed_before_anything_is_released(
    outbox: Outbox, remote: Remote
) -> None:
    """
    No process can claim what was just deferred while the gate is still open.
    """
    await outbox.enqueue("a")
    remote.answers("a", ConfigurationError("forbidden", "No."))
    order: list[str | None] = []
    outbox.record = lambda _: order.append("released")
    relay = outbox.relay(remote.deliver)
    close = relay._close_gate

    async def closing() -> None:
        await close()
        order.append((await outbox.gate()).reason)

    relay._close_gate = closing  # type: ignore[method-assign]
    await relay.drain()

    assert order == ["configuration", "released"]


async def test_an_event_that_cannot_be_recorded_still_closes_the_gate(
    outbox: Outbox, remote: Remote
) -> None:
    """
    "Keep away for five minutes" came with an event whose settling fails: the wait holds all
    the same, for all the others.
    """

    def record(settlement: Settlement) -> None:
        if settlement.key == "odd":
            raise LookupError("no such column")

    outbox.record = record
    await outbox.enqueue("odd")
    remote.answers("odd", ThrottledError("throttled", "Wait.", retry_after=300))
    relay = outbox.relay(remote.deliver)
    await relay.drain()
    await outbox.enqueue("b")

    await relay.drain()

    assert (await outbox.gate()).reason == "throttled"
    assert remote.about() == ["odd"]


async def test_relays_of_two_organisations_have_two_gates(outbox: Outbox, remote: Remote) -> None:
    """
    One organisation's broken set-up stops nobody else.
    """
    neighbour = Outbox(outbox.engine)
    neighbours = Remote()
    await outbox.enqueue("ours")
    await neighbour.enqueue("theirs")
    remote.broken = ConfigurationError("forbidden", "No.")

    await asyncio.gather(
        outbox.relay(remote.deliver).drain(), neighbour.relay(neighbours.deliver).drain()
    )

    assert remote.about() == ["ours"]
    assert neighbours.values == {"theirs": 1}
    assert (await neighbour.gate()).state == "open"


async def test_a_breaker_of_one_process_does_not_count_anothers_success(
    outbox: Outbox,
) -> None:
    """
    A process whose own way to the destination is broken closes the gate for all; the probe
    of one that gets through opens it again.
    """
    for key in "abcde":
        await outbox.enqueue(key)
    cut_off, connected = Remote(), Remote()
    cut_off.broken = busy()

    await outbox.relay(cut_off.deliver).drain()
    assert (await outbox.gate()).state == "closed"
    await outbox.pass_time(61)
    drained = await outbox.relay(connected.deliver).drain()

    assert drained.ended == "done"
    assert len(connected.values) == 5
