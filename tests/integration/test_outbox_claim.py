"""
Claiming: who gets which event, for how long, and at what cost.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text

from outbox import LookUp, enqueue, store
from outbox.attempt import attempt
from outbox.outcome import Dead, Deferred, Delivered, Outcome, Retry
from outbox.store import START, Claimed, Landed
from tests.conftest import until
from tests.integration.outbox_builders import Outbox, Remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Event


@pytest.fixture
def outbox(engine: AsyncEngine) -> Outbox:
    """
    An empty outbox.
    """
    return Outbox(engine)


def keys(events: Sequence[Event]) -> list[str]:
    """
    Whose events these are.
    """
    return [event.key for event in events]


async def tried(outbox: Outbox, event: Event, remote: Remote) -> Outcome:
    """
    What an attempt at a claimed event comes to; nothing is written.
    """
    return await attempt(event, outbox.destination(remote.deliver), claimed_at=time.monotonic())


async def test_a_claim_is_a_lease_with_a_token(outbox: Outbox) -> None:
    """
    The attempt is counted, the event is ours until the lease ends, and nobody else's.
    """
    worker_id = uuid4()
    await outbox.enqueue("a", 7)

    [event] = await outbox.claim(worker_id=worker_id, lease_seconds=60)

    live = await outbox.waiting()
    assert (event.version, event.attempts, event.elapsed_seconds) == (7, 1, 0)
    assert (live.claim_token, live.claimed_version) == (event.claim_token, 7)
    assert (live.claimed_by, live.attempts) == (worker_id, 1)
    assert 55 < live.waits <= 60
    assert await outbox.claim() == []


async def test_a_claim_brings_what_its_deliveries_need(outbox: Outbox) -> None:
    """
    About each event what is its own, or nothing, read by the same statement.
    """
    for key in "ab":
        await outbox.enqueue(key)

    look_up = LookUp(
        sql="SELECT jsonb_build_array(claimed.key, CAST(:word AS text)) WHERE claimed.key <> 'b'",
        parameters={"word": "mine"},
    )
    events = await outbox.claim(look_up=look_up)

    assert {event.key: event.found for event in events} == {"a": ["a", "mine"], "b": None}


async def test_what_comes_while_a_claim_looks_is_the_next_ones(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It may have come together with a change of what is looked up, which this claim cannot see.
    """
    looking = "AND available_at <= now()"
    slow = looking + " AND (SELECT pg_advisory_xact_lock(71) IS NOT NULL)"
    statement = text(str(store.claim_statement()).replace(looking, slow))
    await outbox.enqueue("a", 1)

    async with outbox.engine.begin() as holding:
        await holding.execute(text("SELECT pg_advisory_xact_lock(71)"))
        async with outbox.engine.begin() as business:
            await business.execute(text("SELECT now()"))  # it begins before the claim does
            with monkeypatch.context() as patched:
                patched.setattr(store, "claim_statement", lambda *_, **__: statement)
                claiming = asyncio.create_task(outbox.claim())
                await until(outbox.waits_for_an_advisory_lock, seconds=5)
            await enqueue(business, [outbox.new("a", 2)])

    assert await claiming == []
    [event] = await outbox.claim()
    assert (event.version, event.attempts) == (2, 1)


async def test_two_connections_never_get_the_same_event(outbox: Outbox) -> None:
    """
    What one claim holds, another skips without waiting for it.
    """
    for key in "abcd":
        await outbox.enqueue(key)

    async with outbox.engine.connect() as one, outbox.engine.connect() as other:
        first = await outbox.claim_on(one, 2)
        async with asyncio.timeout(5):
            second = await outbox.claim_on(other, 10)
        await one.commit()
        await other.commit()

    assert (keys(first), keys(second)) == (["a", "b"], ["c", "d"])


async def test_no_more_is_claimed_than_was_asked_for(outbox: Outbox) -> None:
    """
    A limit is a limit, also with other claims going on.
    """
    for number in range(30):
        await outbox.enqueue(f"{number:02}")

    claimed = await asyncio.gather(*[outbox.claim(4) for _ in range(5)])

    assert [len(one) for one in claimed] == [4] * 5
    assert len({event.id for one in claimed for event in one}) == 20


async def test_urgent_events_go_first_and_then_old_ones(outbox: Outbox) -> None:
    """
    Priority decides, then how long an event has been due.
    """
    await outbox.enqueue("new and urgent", priority=0)
    await outbox.pass_time(10)
    await outbox.enqueue("old", priority=1)
    await outbox.pass_time(10)
    await outbox.enqueue("newest and urgent", priority=0)
    await outbox.enqueue("new", priority=1)

    first, second = await outbox.claim(3), await outbox.claim(3)

    assert keys(first) == ["new and urgent", "newest and urgent", "old"]
    assert keys(second) == ["new"]


async def test_claimed_events_are_in_order_whatever_the_database_returns(outbox: Outbox) -> None:
    """
    An update returns rows in the order of their places; a batch has to be sorted afterwards.
    """
    async with outbox.engine.begin() as connection:
        await enqueue(
            connection, [outbox.new(f"{number:03}", priority=number % 3) for number in range(60)]
        )
    await outbox.execute("UPDATE outbox.events SET priority = 2 - priority")

    async with outbox.engine.begin() as connection:
        # So that the rows are found in the order of their places.
        await connection.execute(text("SET LOCAL enable_nestloop = off"))
        await connection.execute(text("SET LOCAL enable_mergejoin = off"))
        events = await outbox.claim_on(connection, 60)

    order = [(event.priority, event.created_at, event.id) for event in events]
    assert len(order) == 60
    assert order == sorted(order)


async def test_equal_times_are_no_ambiguity(outbox: Outbox) -> None:
    """
    Events of one transaction may have one time; the id breaks the tie.
    """
    for key in "cab":
        await outbox.enqueue(key)
    await outbox.execute(
        "UPDATE outbox.events SET created_at = date_trunc('day', now()),"
        " available_at = date_trunc('day', now())"
    )

    assert [keys(await outbox.claim(1)) for _ in range(3)] == [["c"], ["a"], ["b"]]


async def test_an_event_that_commits_late_is_still_found(outbox: Outbox) -> None:
    """
    A row with a lower id that commits after a higher one was delivered is not passed over.
    """
    async with outbox.engine.connect() as slow:
        await enqueue(slow, [outbox.new("early id", 1)])
        await outbox.enqueue("late id", 1)
        [event] = await outbox.claim()
        assert event.key == "late id"
        await outbox.settle(event, Delivered())
        await slow.commit()

    assert keys(await outbox.claim()) == ["early id"]


async def test_a_claim_can_go_on_after_another(outbox: Outbox) -> None:
    """
    It leaves out what stands before, also what has come in there since.
    """
    for key in "abcd":
        await outbox.enqueue(key, priority=1)
    async with outbox.engine.begin() as connection:
        first = await outbox.claim_really(connection, 2)
    await outbox.enqueue("urgent", priority=0)

    assert keys(await outbox.claim(after=first.last)) == ["c", "d"]
    assert keys(await outbox.claim()) == ["urgent"]


async def test_a_claim_that_finds_nothing_is_nowhere(outbox: Outbox) -> None:
    """
    The next one begins at the start.
    """
    async with outbox.engine.begin() as connection:
        claimed = await outbox.claim_really(connection)
    assert claimed == Claimed(gate="open", events=[], last=START, due=0)


@pytest.mark.parametrize("state", ["closed", "half-open"])
async def test_nothing_comes_through_a_gate_that_is_not_open(outbox: Outbox, state: str) -> None:
    """
    The claim itself looks, so nobody can close the gate between a look and a claim.
    """
    await outbox.enqueue("a")
    await (outbox.close_gate() if state == "closed" else outbox.half_open_gate())
    async with outbox.engine.begin() as connection:
        claimed = await outbox.claim_really(connection)
    assert (claimed.gate, claimed.events) == (state, [])


async def test_an_idle_transaction_elsewhere_delays_nothing(outbox: Outbox) -> None:
    """
    Somebody's forgotten write transaction holds no delivery up.
    """
    async with outbox.engine.connect() as idle:
        await enqueue(idle, [outbox.new("idle", 1)])
        await outbox.enqueue("a", 1)

        [event] = await outbox.claim()
        settled = await outbox.settle(event, Delivered())

        assert [one.key for one in settled.written] == ["a"]
        await idle.rollback()


async def test_a_key_is_never_overtaken_by_itself(outbox: Outbox) -> None:
    """
    While a key is in flight, no worker can skip the lock and send another state of it.
    """
    await outbox.enqueue("a", 1)
    async with outbox.engine.connect() as one:
        [event] = await outbox.claim_on(one)
        assert await outbox.claim() == []  # locked
        await one.commit()
    await outbox.enqueue("a", 2)

    assert await outbox.claim() == []  # leased
    await outbox.settle(event, Delivered())
    assert [event.version for event in await outbox.claim()] == [2]


async def test_events_of_others_are_never_claimed(outbox: Outbox) -> None:
    """
    Another organisation's events need other credentials, another destination's another handler.
    """
    await outbox.enqueue("a", organization_id=uuid4())
    await outbox.enqueue("b", destination="bufdir")
    await outbox.enqueue("c")

    assert keys(await outbox.claim()) == ["c"]
    assert await outbox.claim() == []


async def test_what_is_not_due_is_not_claimed(outbox: Outbox) -> None:
    """
    A planned retry comes at its time by the database's clock, not before.
    """
    await outbox.enqueue("a")
    [event] = await outbox.claim()
    await outbox.settle(event, Retry(after_seconds=30, code="busy"))

    assert await outbox.claim() == []
    await outbox.pass_time(29)
    assert await outbox.claim() == []
    await outbox.pass_time(2)
    [event] = await outbox.claim()
    assert (event.attempts, event.last_error_code) == (2, "busy")


async def test_an_event_of_a_dead_worker_comes_back_by_itself(outbox: Outbox) -> None:
    """
    When the lease ends the event is due again, with a new token; nobody has to rescue it, and
    the request that may still be on its way is remembered.
    """
    await outbox.enqueue("a", 1)
    [lost] = await outbox.claim(lease_seconds=60)

    await outbox.pass_time(59)
    assert await outbox.claim() == []
    await outbox.pass_time(2)
    [event] = await outbox.claim()

    assert event.id == lost.id
    assert event.claim_token != lost.claim_token
    assert event.attempts == 2
    assert await outbox.doubts() == [1]


async def test_only_the_age_of_the_claim_makes_it_stale(outbox: Outbox) -> None:
    """
    An old event that was claimed just now is in good hands: neither its age nor that of its
    first attempt takes it away from its owner.
    """
    await outbox.enqueue("a")
    await outbox.execute(
        "UPDATE outbox.events SET created_at = now() - interval '1 day',"
        " first_attempt_at = now() - interval '1 day', attempts = 1"
    )
    [event] = await outbox.claim(lease_seconds=60)

    assert await outbox.claim() == []
    settled = await outbox.settle(event, Delivered())
    assert len(settled.written) == 1


async def test_taking_over_races_with_nobody(outbox: Outbox) -> None:
    """
    Of many workers that find a stale claim at once, one gets it.
    """
    await outbox.enqueue("a")
    await outbox.claim()
    await outbox.pass_time(61)

    claimed = await asyncio.gather(*[outbox.claim() for _ in range(8)])

    assert sorted(len(one) for one in claimed) == [0] * 7 + [1]


async def test_a_takeover_that_meets_a_late_settlement_backs_off(outbox: Outbox) -> None:
    """
    The owner who settles in the last moment is not robbed of what it just gave back.
    """
    await outbox.enqueue("a")
    [event] = await outbox.claim(lease_seconds=60)
    await outbox.pass_time(61)

    async with outbox.engine.connect() as owner:
        await store.settle(
            owner,
            [Landed(event=event, outcome=Retry(after_seconds=60, code="busy"))],
            doubt_seconds=150,
        )
        assert await outbox.claim() == []  # skipped, not waited for
        await owner.commit()

    assert await outbox.claim() == []
    assert (await outbox.waiting()).attempts == 1


async def test_an_event_that_kills_its_workers_runs_out_of_attempts(outbox: Outbox) -> None:
    """
    Attempts are counted before anything is tried, so a killer is buried in the end, and the
    events beside it are delivered meanwhile.
    """
    remote = Remote()
    await outbox.enqueue("killer")
    await outbox.enqueue("innocent")
    [killer, innocent] = sorted(await outbox.claim(), key=lambda event: event.key, reverse=True)
    await outbox.settle(innocent, Delivered())
    for attempts in (2, 3, 4, 5):
        await outbox.pass_time(61)
        [killer] = await outbox.claim()
        assert killer.attempts == attempts

    outcome = await tried(outbox, killer, remote)

    assert isinstance(outcome, Dead)
    assert outcome.code == "abandoned"
    assert remote.calls == []
    await outbox.settle(killer, outcome)
    assert await outbox.history("killer") == [(1, "dead")]
    assert await outbox.history("innocent") == [(1, "delivered")]


async def test_a_newer_state_does_not_pay_for_an_abandoned_one(outbox: Outbox) -> None:
    """
    If workers died with the old state and a newer one came before the lease ended, the newer
    one has all its attempts: buried untried, it would never reach the destination.
    """
    await outbox.enqueue("a", 1)
    for _ in range(4):
        await outbox.claim()
        await outbox.pass_time(61)
    await outbox.enqueue("a", 2)

    [event] = await outbox.claim()
    outcome = await tried(outbox, event, Remote())

    assert (event.version, event.attempts) == (2, 1)
    assert outcome == Delivered()


# ------------------------------------------------------------------------------ the window


async def failed_once(outbox: Outbox, *, after_seconds: float = 1) -> None:
    """
    An event that waits for its first retry.
    """
    await outbox.enqueue("a")
    [event] = await outbox.claim()
    await outbox.settle(event, Retry(after_seconds=after_seconds, code="busy"))


async def test_the_window_runs_from_the_first_attempt(outbox: Outbox) -> None:
    """
    Waits count as well as requests, by the database's clock.
    """
    await failed_once(outbox, after_seconds=4)
    await outbox.pass_time(5)

    [event] = await outbox.claim(slack_seconds=30)

    assert event.attempts == 2
    assert 5 <= event.elapsed_seconds < 20


async def test_a_gate_that_closed_since_gives_everything_back(outbox: Outbox) -> None:
    """
    An outage burns no attempts: once it is over, the series starts from the beginning.
    """
    await failed_once(outbox)
    await outbox.close_gate("outage", seconds=60)
    await outbox.pass_time(61)
    await outbox.open_gate()

    [event] = await outbox.claim()

    assert (event.attempts, event.elapsed_seconds) == (1, 0)


async def test_a_gate_that_closed_long_before_changes_nothing(outbox: Outbox) -> None:
    """
    What failed after the last outage has failed for its own reasons.
    """
    await outbox.close_gate("outage", seconds=1)
    await outbox.pass_time(100)
    await outbox.open_gate()
    await outbox.pass_time(1)
    await failed_once(outbox)
    await outbox.pass_time(2)

    [event] = await outbox.claim(slack_seconds=30)

    assert event.attempts == 2
    assert event.elapsed_seconds > 0


async def test_a_gate_gives_nothing_back_to_a_killer(outbox: Outbox) -> None:
    """
    A claim that its worker did not survive counts, outage or not; else it would kill for ever.
    """
    await outbox.enqueue("a")
    await outbox.claim(lease_seconds=60)
    await outbox.close_gate("outage", seconds=5)
    await outbox.pass_time(61)
    await outbox.open_gate()

    [event] = await outbox.claim()

    assert event.attempts == 2


async def test_an_abandoned_event_has_a_new_window(outbox: Outbox) -> None:
    """
    The lease of a dead worker is longer than the window; the time it cost is not the event's.
    """
    await outbox.enqueue("a")
    await outbox.claim(lease_seconds=60)
    await outbox.pass_time(61)

    [event] = await outbox.claim()

    assert (event.attempts, event.elapsed_seconds) == (2, 0)


async def test_an_event_that_nobody_came_for_has_a_new_window(outbox: Outbox) -> None:
    """
    If no worker ran when the retry was due, it is made late instead of never.
    """
    await failed_once(outbox, after_seconds=1)
    await outbox.pass_time(17)

    [event] = await outbox.claim()

    assert (event.attempts, event.elapsed_seconds) == (2, 0)


async def test_a_short_pause_of_all_workers_buries_nothing(outbox: Outbox) -> None:
    """
    A retry was planned within the window; that nobody was there to make it in time, as during
    a restart of ten seconds, is no reason to give up without trying.
    """
    await failed_once(outbox, after_seconds=7)
    await outbox.pass_time(7 + 10)
    remote = Remote()

    [event] = await outbox.claim()
    await tried(outbox, event, remote)

    assert remote.about() == ["a"]


async def test_a_deferral_costs_nothing(outbox: Outbox) -> None:
    """
    However often an event is deferred, its next attempt is the first, in a fresh window.
    """
    await outbox.enqueue("a")
    for _ in range(20):
        [event] = await outbox.claim()
        assert (event.attempts, event.elapsed_seconds) == (1, 0)
        await outbox.settle(event, Deferred(after_seconds=1, code="throttled"))
        await outbox.pass_time(2)


async def test_a_summer_time_change_moves_nothing(outbox: Outbox) -> None:
    """
    Leases and retries are points in time: the zone of a session, or a clock set anywhere
    else, does not shift them.
    """
    await outbox.enqueue("a")
    async with outbox.engine.connect() as connection:
        await connection.execute(text("SET LOCAL TIME ZONE 'Pacific/Kiritimati'"))
        assert len(await outbox.claim_on(connection, lease_seconds=60)) == 1
        await connection.commit()
    assert 55 < (await outbox.waiting()).waits <= 60
    async with outbox.engine.connect() as connection:
        await connection.execute(text("SET LOCAL TIME ZONE 'Pacific/Niue'"))
        assert await outbox.claim_on(connection) == []


async def test_a_worker_whose_clock_is_wrong_claims_what_is_due(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Ten minutes of difference between worker and database change no due time: delays are sent
    as seconds, and the database alone knows what time it is.
    """
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 600)
    await outbox.enqueue("a")
    remote = Remote()
    relay = outbox.relay(remote.deliver)
    await relay.drain()
    assert remote.about() == ["a"]

    monkeypatch.setattr(time, "time", lambda: now() + 600)
    await outbox.enqueue("b")
    [event] = await outbox.claim(lease_seconds=60)
    await relay.drain()
    assert remote.about() == ["a"]
    assert len((await outbox.settle(event, Delivered())).written) == 1
