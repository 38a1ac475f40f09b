"""
Enqueueing: the newest state of a key is the one to deliver, and the caller is never harmed.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from outbox import Delivered, enqueue
from outbox.outcome import Retry
from tests.conftest import until
from tests.integration.outbox_builders import DESTINATION, Outbox

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


@pytest.fixture
def outbox(engine: AsyncEngine) -> Outbox:
    """
    An empty outbox.
    """
    return Outbox(engine)


async def waits_for_a_lock(outbox: Outbox) -> bool:
    """
    Whether some connection waits for another one.
    """
    rows = await outbox.rows(
        "SELECT 1 FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(rows)


async def backend(connection: AsyncConnection) -> int:
    """
    The server process of a connection.
    """
    return int(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)


async def test_an_event_is_due_at_once(outbox: Outbox) -> None:
    """
    Everything that was said about the state is stored, and nothing else has happened to it.
    """
    await outbox.enqueue("a", 3, value={"visible": False}, priority=1, traceparent="00-1-2-01")

    live = await outbox.waiting()
    assert (live.version, live.payload, live.priority) == (3, {"value": {"visible": False}}, 1)
    assert (live.organization_id, live.traceparent) == (outbox.organization_id, "00-1-2-01")
    assert (live.attempts, live.replaced, live.claim_token) == (0, 0, None)
    assert live.waits <= 0


async def test_nothing_is_enqueued_from_nothing(outbox: Outbox) -> None:
    """
    An empty batch is no error.
    """
    async with outbox.engine.begin() as connection:
        await enqueue(connection, [])

    assert await outbox.live() is None


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1), (3, 3, 1)])
async def test_the_highest_version_of_one_call_wins(outbox: Outbox, order: tuple[int, ...]) -> None:
    """
    However the versions of a key are ordered in a batch, one event is left: the newest.
    """
    async with outbox.engine.begin() as connection:
        await enqueue(connection, [outbox.new("a", version) for version in order])

    live = await outbox.waiting()
    assert (live.version, live.payload) == (3, {"value": 3})


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (2, 2)])
async def test_the_highest_version_of_one_transaction_wins(
    outbox: Outbox, order: tuple[int, ...]
) -> None:
    """
    Two calls of one transaction, also with equal payloads, leave one event behind.
    """
    async with outbox.engine.begin() as connection:
        for version in order:
            await enqueue(connection, [outbox.new("a", version, value="same")])

    assert (await outbox.waiting()).version == 2


async def test_an_older_state_never_replaces_a_newer_one(outbox: Outbox) -> None:
    """
    Whoever comes late with an old version changes nothing at all.
    """
    await outbox.enqueue("a", 5, value="new", priority=0)
    before = await outbox.waiting()

    await outbox.enqueue("a", 4, value="old", priority=7)
    await outbox.enqueue("a", 5, value="repeated", priority=7)

    after = await outbox.waiting()
    assert after._mapping.items() >= {"version": 5, "priority": 0, "replaced": 0}.items()
    assert (after.payload, after.available_at) == (before.payload, before.available_at)


async def test_the_state_committed_last_is_delivered_whatever_the_ids_say(outbox: Outbox) -> None:
    """
    Two writers whose commits overtake each other would leave the older state as the last one
    sent, if order came from ids or times; the version decides instead.
    """
    async with outbox.engine.connect() as slow:
        await enqueue(slow, [outbox.new("other", 1)])  # it has begun, and drawn an id
        await outbox.enqueue("a", 2, value="second")
        await enqueue(slow, [outbox.new("a", 1, value="first")])
        await slow.commit()

    assert (await outbox.waiting()).payload == {"value": "second"}


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
async def test_two_transactions_that_meet_on_a_key_both_survive(
    outbox: Outbox, first: int, second: int
) -> None:
    """
    An insert that meets an uncommitted one waits and replaces or yields; a unique violation
    would abort a person's renewal.
    """
    async with outbox.engine.connect() as one:
        await enqueue(one, [outbox.new("a", first)])
        later = asyncio.create_task(outbox.enqueue("a", second))
        await until(lambda: waits_for_a_lock(outbox))
        await one.commit()
        await later

    assert (await outbox.waiting()).version == 2


async def test_a_transaction_can_go_on_after_every_kind_of_enqueue(outbox: Outbox) -> None:
    """
    New, newer, repeated and older states all leave the caller's transaction usable.
    """
    async with outbox.engine.begin() as connection:
        for version in (2, 3, 3, 1):
            await enqueue(connection, [outbox.new("a", version)])
        assert await connection.scalar(text("SELECT version FROM outbox.events")) == 3


async def test_a_rollback_leaves_nothing(outbox: Outbox) -> None:
    """
    An event without its transition would tell the destination something that never happened.
    """
    async with outbox.engine.connect() as connection:
        await enqueue(connection, [outbox.new("a", 1)])
        await connection.rollback()

    assert await outbox.live() is None


async def test_a_rollback_gives_the_replaced_state_back(outbox: Outbox) -> None:
    """
    The state that a failed transaction had replaced is the one to deliver again.
    """
    await outbox.enqueue("a", 1, value="old")

    async with outbox.engine.connect() as connection:
        await enqueue(connection, [outbox.new("a", 2, value="new")])
        await connection.rollback()

    live = await outbox.waiting()
    assert (live.version, live.payload, live.replaced) == (1, {"value": "old"}, 0)


async def test_enqueue_ends_no_transaction_of_its_caller(outbox: Outbox) -> None:
    """
    Until the caller commits, nobody else sees the event.
    """
    async with outbox.engine.connect() as connection:
        before = await connection.scalar(text("SELECT txid_current()"))
        await enqueue(connection, [outbox.new("a", 1)])
        assert await connection.scalar(text("SELECT txid_current()")) == before
        assert await outbox.live() is None
        await connection.commit()

    assert await outbox.live() is not None


async def test_flip_flop_between_two_looks_is_one_event(outbox: Outbox) -> None:
    """
    Expired, renewed and expired again before anybody looked: one call, the last state, and
    the two replaced versions are counted.
    """
    for version, value in enumerate(["hide", "show", "hide"], start=1):
        await outbox.enqueue("a", version, value=value)

    [event] = await outbox.claim()
    await outbox.settle(event, Delivered())

    assert (event.version, event.payload) == (3, {"value": "hide"})
    assert await outbox.history() == [(3, "delivered")]
    assert await outbox.live() is None


async def test_a_newer_state_starts_with_all_attempts(outbox: Outbox) -> None:
    """
    A waiting event that had failed is as good as new, and due at once.
    """
    await outbox.enqueue("a", 1)
    [event] = await outbox.claim()
    await outbox.settle(event, Retry(after_seconds=60, code="busy"))

    await outbox.enqueue("a", 2)

    live = await outbox.waiting()
    assert (live.attempts, live.first_attempt_at, live.last_error_code) == (0, None, None)
    assert (live.version, live.replaced) == (2, 1)
    assert live.waits <= 0


async def test_a_future_retry_does_not_block_a_newer_state(outbox: Outbox) -> None:
    """
    A retry planned for later is replaced by what is ready now: no key waits behind its past.
    """
    await outbox.enqueue("a", 1)
    [event] = await outbox.claim()
    await outbox.settle(event, Retry(after_seconds=3600, code="busy"))
    assert await outbox.claim() == []

    await outbox.enqueue("a", 2)

    [event] = await outbox.claim()
    assert (event.version, event.attempts) == (2, 1)


async def test_a_newer_state_leaves_a_flight_alone(outbox: Outbox) -> None:
    """
    While an event is in flight its lease, its token and its count belong to the flight.
    """
    await outbox.enqueue("a", 1, priority=1)
    [event] = await outbox.claim()
    before = await outbox.waiting()

    await outbox.enqueue("a", 2, priority=0, value="new")

    after = await outbox.waiting()
    kept = ("id", "claim_token", "claimed_version", "claimed_by", "available_at", "attempts")
    assert [after._mapping[name] for name in (*kept, "first_attempt_at")] == [
        before._mapping[name] for name in (*kept, "first_attempt_at")
    ]
    assert (after.version, after.payload, after.priority) == (2, {"value": "new"}, 0)
    assert after.claim_token == event.claim_token
    assert await outbox.claim() == []


async def test_the_same_key_of_two_destinations_is_two_events(outbox: Outbox) -> None:
    """
    What one destination has to be told replaces nothing that another one has to be told.
    """
    await outbox.enqueue("a", 9)
    await outbox.enqueue("a", 1, destination="bufdir")

    rows = await outbox.rows("SELECT destination, version FROM outbox.events ORDER BY version")
    assert [tuple(row) for row in rows] == [("bufdir", 1), (DESTINATION, 9)]


async def test_batches_that_overlap_in_any_order_do_not_deadlock(outbox: Outbox) -> None:
    """
    Keys are locked in ascending order, so that two batches wait for each other in one
    direction only.
    """
    keys = [f"key {number:02}" for number in range(40)]

    async def batch(first_version: int, *, backwards: bool) -> None:
        for version in range(first_version, first_version + 40, 2):
            order = keys[::-1] if backwards else keys
            async with outbox.engine.begin() as connection:
                await enqueue(connection, [outbox.new(key, version) for key in order])

    await asyncio.gather(batch(1, backwards=False), batch(2, backwards=True))

    rows = await outbox.rows("SELECT DISTINCT version FROM outbox.events")
    assert [row.version for row in rows] == [40]


async def test_the_statement_itself_locks_in_order(outbox: Outbox) -> None:
    """
    A batch waits at its lowest locked key and holds none that comes after it.
    """
    async with outbox.engine.connect() as one, outbox.engine.connect() as other:
        await enqueue(one, [outbox.new("b", 1)])
        waiting = asyncio.create_task(
            enqueue(other, [outbox.new(key, 2) for key in ("c", "a", "b")])
        )
        await until(lambda: waits_for_a_lock(outbox))
        await enqueue(one, [outbox.new("c", 1)])  # would deadlock if "c" came first
        await one.commit()
        await waiting
        await other.commit()

    rows = await outbox.rows("SELECT key, version FROM outbox.events ORDER BY key")
    assert [tuple(row) for row in rows] == [("a", 2), ("b", 2), ("c", 2)]


async def test_any_json_arrives_as_it_was(outbox: Outbox) -> None:
    """
    Keys and payloads are data: quotes, backslashes and other scripts change nothing.
    """
    value = {"name": "Ø\"\\'; DROP TABLE outbox.events; --", "numbers": [1, 2.5, None, True]}
    await outbox.enqueue("k'\"\\ø", 1, value=value)

    [event] = await outbox.claim()

    assert event.key == "k'\"\\ø"
    assert event.payload["value"] == value
    assert json.loads(json.dumps(event.payload)) == event.payload
