"""
Settling: what becomes of an attempt is written once, by its owner, as a whole or not at all.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from outbox import enqueue, store
from outbox.outcome import Dead, Deferred, Delivered, Outcome, Retry, Skipped
from outbox.store import Landed
from tests.conftest import until
from tests.integration.outbox_builders import Outbox

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Event

DEAD = Dead(code="gone", message="Gone.")
OUTCOMES: list[Outcome] = [
    Delivered(),
    Skipped(reason="other_organization"),
    Retry(after_seconds=9, code="busy", doubtful=True),
    Deferred(after_seconds=9, code="throttled", closes="throttled"),
    DEAD,
]
each_outcome = pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda one: type(one).__name__)


@pytest.fixture
def outbox(engine: AsyncEngine) -> Outbox:
    """
    An empty outbox.
    """
    return Outbox(engine)


async def claimed(outbox: Outbox, key: str = "a", version: int = 1) -> Event:
    """
    An event in flight, at its first attempt.
    """
    await outbox.enqueue(key, version)
    [event] = await outbox.claim()
    return event


@pytest.mark.parametrize(
    ("outcome", "ending", "code"),
    [
        (Delivered(), "delivered", None),
        (Skipped(reason="other_organization"), "skipped", "other_organization"),
        (Dead(code="gone", message="Gone."), "dead", "gone"),
        (Dead(code="busy", message="Busy.", recoverable=True), "dead", "busy"),
    ],
    ids=["delivered", "skipped", "dead", "recoverable"],
)
async def test_an_ending_moves_the_event_into_the_history(
    outbox: Outbox, outcome: Outcome, ending: str, code: str | None
) -> None:
    """
    A finished version leaves the live table and one row of history that says all about it.
    """
    event = await claimed(outbox, version=3)

    settled = await outbox.settle(event, outcome)

    [one] = settled.written
    assert (one.key, one.version, one.ending, one.outcome) == ("a", 3, ending, outcome)
    assert (one.event_id, one.retries, one.payload) == (event.id, 0, {"value": 3})
    assert await outbox.live() is None
    [row] = await outbox.rows("SELECT * FROM outbox.settled")
    assert (row.event_id, row.key, row.version) == (event.id, "a", 3)
    assert (row.outcome, row.error_code, row.attempts) == (ending, code, 1)
    assert (row.payload, row.created_at) == ({"value": 3}, event.created_at)
    assert row.organization_id == outbox.organization_id
    assert row.settled_at >= row.created_at


async def test_a_retry_waits_and_keeps_its_count(outbox: Outbox) -> None:
    """
    The event is free again, due after the delay, one attempt further, and says why.
    """
    event = await claimed(outbox)

    settled = await outbox.settle(event, Retry(after_seconds=30, code="busy"))

    live = await outbox.waiting()
    assert (live.attempts, live.last_error_code) == (1, "busy")
    assert (live.claim_token, live.claimed_version, live.claimed_by) == (None, None, None)
    assert live.first_attempt_at is not None
    assert 25 < live.waits <= 30
    assert [one.ending for one in settled.written] == [None]
    assert await outbox.history() == []


async def test_a_deferral_burns_nothing(outbox: Outbox) -> None:
    """
    The attempt is taken back, and the window with it.
    """
    event = await claimed(outbox)

    await outbox.settle(event, Deferred(after_seconds=30, code="throttled"))

    live = await outbox.waiting()
    assert (live.attempts, live.first_attempt_at) == (0, None)
    assert live.last_error_code == "throttled"
    assert 25 < live.waits <= 30


async def test_a_deferral_takes_back_one_attempt_and_no_more(outbox: Outbox) -> None:
    """
    What failed before the deferral is still counted.
    """
    event = await claimed(outbox)
    await outbox.settle(event, Retry(after_seconds=0, code="busy"))
    [event] = await outbox.claim()

    await outbox.settle(event, Deferred(after_seconds=0, code="late"))

    live = await outbox.waiting()
    assert live.attempts == 1
    assert live.first_attempt_at is not None


async def test_retries_are_counted_from_the_second_attempt(outbox: Outbox) -> None:
    """
    The application hears of retries, which are attempts after the first.
    """
    event = await claimed(outbox)
    for _ in range(2):
        await outbox.settle(event, Retry(after_seconds=0, code="busy"))
        [event] = await outbox.claim()

    settled = await outbox.settle(event, DEAD)

    assert [one.retries for one in settled.written] == [2]
    [row] = await outbox.rows("SELECT attempts FROM outbox.settled")
    assert row.attempts == 3


@each_outcome
async def test_a_stale_token_changes_nothing(outbox: Outbox, outcome: Outcome) -> None:
    """
    A worker that lost its claim writes no row, whatever it brings; it is told so.
    """
    lost = await claimed(outbox)
    await outbox.pass_time(61)
    await outbox.claim()
    before = await outbox.waiting()

    settled = await outbox.settle(lost, outcome)

    after = await outbox.waiting()
    assert (settled.written, settled.busy) == ([], [])
    assert [one.event for one in settled.lost] == [lost]
    assert after[:-1] == before[:-1]
    assert await outbox.history() == []
    assert await outbox.doubts() == [1]  # from the claim that took over


@each_outcome
async def test_a_second_write_by_the_same_holder_is_refused(
    outbox: Outbox, outcome: Outcome
) -> None:
    """
    After its own final word a worker has nothing more to say, also not by a repeated flush.
    """
    event = await claimed(outbox)
    await outbox.settle(event, Delivered())

    settled = await outbox.settle(event, outcome)

    assert [one.event for one in settled.lost] == [event]
    assert await outbox.history() == [(1, "delivered")]
    assert await outbox.live() is None


async def test_a_repeated_flush_after_a_retry_is_refused(outbox: Outbox) -> None:
    """
    Giving the event back gives the token back: the answer of a COMMIT that got lost may make
    a worker write again, and it must not move what others may have claimed since.
    """
    event = await claimed(outbox)
    await outbox.settle(event, Retry(after_seconds=60, code="busy"))

    settled = await outbox.settle(event, Deferred(after_seconds=0, code="late"))

    assert [one.event for one in settled.lost] == [event]
    live = await outbox.waiting()
    assert live.attempts == 1
    assert live.waits > 50


async def test_the_token_is_the_fence_and_not_the_count(outbox: Outbox) -> None:
    """
    A retry by hand resets the attempts, so an old and a new claim may have the same number;
    the old one is refused all the same.
    """
    old = await claimed(outbox, version=1)
    await outbox.pass_time(61)
    [taken_over] = await outbox.claim()
    await outbox.settle(taken_over, Retry(after_seconds=60, code="busy"))
    await outbox.enqueue("a", 2)
    [new] = await outbox.claim()
    assert (old.attempts, new.attempts) == (1, 1)

    settled = await outbox.settle(old, Delivered())

    assert len(settled.lost) == 1
    assert (await outbox.waiting()).claim_token == new.claim_token
    assert await outbox.history() == []


async def test_an_invented_token_changes_nothing(outbox: Outbox) -> None:
    """
    The id of a row is no right to write to it.
    """
    event = await claimed(outbox)

    settled = await outbox.settle(replace(event, claim_token=uuid4()), DEAD)

    assert len(settled.lost) == 1
    assert await outbox.live() is not None


# --------------------------------------------------------------------- a newer state came


@pytest.mark.parametrize(
    ("outcome", "ending"),
    [
        (Delivered(), "delivered"),
        (Skipped(reason="other_organization"), "skipped"),
        (Retry(after_seconds=60, code="busy"), "superseded"),
        (Deferred(after_seconds=60, code="throttled"), "superseded"),
        (Dead(code="gone", message="Gone."), "superseded"),
    ],
    ids=["delivered", "skipped", "retry", "deferred", "dead"],
)
async def test_a_newer_state_is_due_at_once_when_the_flight_lands(
    outbox: Outbox, outcome: Outcome, ending: str
) -> None:
    """
    Whatever became of the old version, it goes into the history, and exactly one follow-up
    is due now with all its attempts; no failure is opened for what nobody wants any more.
    """
    event = await claimed(outbox, version=1)
    await outbox.enqueue("a", 2)

    settled = await outbox.settle(event, outcome)

    [one] = settled.written
    assert (one.version, one.payload, one.ending) == (1, {"value": 1}, ending)
    assert await outbox.history() == [(1, ending)]
    live = await outbox.waiting()
    assert (live.version, live.attempts, live.first_attempt_at) == (2, 0, None)
    assert (live.claim_token, live.last_error_code) == (None, None)
    assert live.waits <= 0
    [follow_up] = await outbox.claim()
    assert (follow_up.version, follow_up.attempts) == (2, 1)


async def test_a_newer_state_that_dies_leaves_the_key_failed(outbox: Outbox) -> None:
    """
    The older version was given up for the newer one; if that dies, the key ends as dead and
    not as nothing.
    """
    event = await claimed(outbox, version=1)
    await outbox.enqueue("a", 2)
    await outbox.settle(event, Retry(after_seconds=1, code="busy"))
    [event] = await outbox.claim()

    settled = await outbox.settle(event, DEAD)

    assert [(one.version, one.ending) for one in settled.written] == [(2, "dead")]
    assert await outbox.history() == [(1, "superseded"), (2, "dead")]


async def test_an_old_dead_state_cannot_be_sent_after_a_newer_success(outbox: Outbox) -> None:
    """
    What died is not kept to be replayed: only its version could come back, and only if no
    newer one is live.
    """
    event = await claimed(outbox, version=1)
    await outbox.settle(event, DEAD)
    newer = await claimed(outbox, version=2)

    await outbox.enqueue("a", 1, value="replayed")
    await outbox.settle(newer, Delivered())

    assert await outbox.live() is None
    assert await outbox.history() == [(1, "dead"), (2, "delivered")]


async def test_two_equal_states_both_reach_an_end(outbox: Outbox) -> None:
    """
    Endings go by id and version, never by payload: equal payloads of two keys, or of two
    versions of one key, do not end each other.
    """
    async with outbox.engine.begin() as connection:
        await enqueue(connection, [outbox.new("a", 1, value="x"), outbox.new("b", 1, value="x")])
    first, second = await outbox.claim()
    await outbox.settle(first, Delivered())
    assert await outbox.live("b") is not None
    await outbox.enqueue("b", 2, value="x")
    await outbox.settle(second, Delivered())
    [third] = await outbox.claim()
    await outbox.settle(third, Delivered())

    assert await outbox.history("a") == [(1, "delivered")]
    assert await outbox.history("b") == [(1, "delivered"), (2, "delivered")]


# -------------------------------------------------------------------------------- batches


async def test_a_batch_is_settled_each_in_its_own_way(outbox: Outbox) -> None:
    """
    Every outcome of a batch, lost ones included, is written or refused on its own.
    """
    names = ["delivered", "skipped", "retry", "deferred", "dead", "lost"]
    for name in names:
        await outbox.enqueue(name)
    events = {event.key: event for event in await outbox.claim()}
    events["lost"] = replace(events["lost"], claim_token=uuid4())

    settled = await outbox.settle_all(
        [
            Landed(event=events[name], outcome=outcome)
            for name, outcome in zip(names, [*OUTCOMES, Delivered()], strict=True)
        ]
    )

    assert [(one.key, one.ending) for one in settled.written] == [
        ("delivered", "delivered"),
        ("skipped", "skipped"),
        ("retry", None),
        ("deferred", None),
        ("dead", "dead"),
    ]
    assert [one.event.key for one in settled.lost] == ["lost"]
    alive = await outbox.rows("SELECT key FROM outbox.events ORDER BY key")
    assert [row.key for row in alive] == ["deferred", "lost", "retry"]


async def test_an_old_and_a_new_claim_of_one_event_are_told_apart(outbox: Outbox) -> None:
    """
    A process that stood still may land its old flight together with the new one of the same
    event: the stale result is lost, also then, and is not recorded as if it had been written.
    """
    old = await claimed(outbox)
    await outbox.pass_time(61)
    [new] = await outbox.claim()

    settled = await outbox.settle_all(
        [
            Landed(event=old, outcome=DEAD),
            Landed(event=new, outcome=Delivered()),
        ]
    )

    assert [one.outcome for one in settled.written] == [Delivered()]
    assert [one.event for one in settled.lost] == [old]


async def test_what_a_business_transaction_holds_is_left_for_later(outbox: Outbox) -> None:
    """
    The worker never waits for a person's transaction: the row comes back as busy, the others
    are settled, and the next flush finds the newer version.
    """
    await outbox.enqueue("free")
    await outbox.enqueue("held", 1)
    events = {event.key: event for event in await outbox.claim()}
    landed = [Landed(event=event, outcome=Delivered()) for event in events.values()]

    async with outbox.engine.connect() as business:
        await enqueue(business, [outbox.new("held", 2)])
        async with asyncio.timeout(5):
            settled = await outbox.settle_all(landed)
        assert [one.key for one in settled.written] == ["free"]
        assert [one.event.key for one in settled.busy] == ["held"]
        assert settled.lost == []
        await business.commit()

    settled = await outbox.settle_all(settled.busy)

    assert [(one.version, one.ending) for one in settled.written] == [(1, "delivered")]
    assert (await outbox.waiting("held")).version == 2


async def test_what_changes_while_it_is_settled_is_left_for_later(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A newer state that is committed after a flush began is busy, too; the next flush finds it.
    """
    event = await claimed(outbox, version=1)
    landed = [Landed(event=event, outcome=Delivered())]
    finding = "WHERE id = report.id"
    slow = finding + " AND (SELECT pg_advisory_xact_lock(71) IS NOT NULL)"
    statement = text(str(store.SETTLE).replace(finding, slow))

    async with outbox.engine.begin() as holding:
        await holding.execute(text("SELECT pg_advisory_xact_lock(71)"))
        with monkeypatch.context() as patched:
            patched.setattr(store, "SETTLE", statement)
            settling = asyncio.create_task(outbox.settle_all(landed))
            await until(outbox.waits_for_an_advisory_lock, seconds=5)
        await outbox.enqueue("a", 2)

    settled = await settling
    assert (settled.written, settled.busy, settled.lost) == ([], landed, [])
    assert await outbox.history() == []

    await outbox.settle_all(landed)
    assert await outbox.history() == [(1, "delivered")]
    assert (await outbox.waiting("a")).version == 2


async def test_a_business_transaction_that_meets_a_settlement_enqueues_anew(
    outbox: Outbox,
) -> None:
    """
    A state that comes while the old event is being removed is inserted as a new one; nobody
    gets an error and nothing is lost.
    """
    event = await claimed(outbox, version=1)
    async with outbox.engine.connect() as worker:
        await store.settle(worker, [Landed(event=event, outcome=Delivered())], doubt_seconds=150)
        business = asyncio.create_task(outbox.enqueue("a", 2))
        async with asyncio.timeout(20):
            while not await outbox.rows(
                "SELECT 1 FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            ):
                assert not business.done()
        await worker.commit()
        await business

    live = await outbox.waiting()
    assert (live.version, live.attempts, live.replaced) == (2, 0, 0)
    assert await outbox.history() == [(1, "delivered")]


async def test_a_rolled_back_settlement_leaves_the_claim(outbox: Outbox) -> None:
    """
    If what the application records fails, the event, its history and its doubts are as before:
    all of one event's writes are one transaction.
    """
    event = await claimed(outbox)
    before = await outbox.waiting()

    async with outbox.engine.connect() as connection:
        await store.settle(
            connection,
            [Landed(event=event, outcome=Retry(after_seconds=1, code="busy", doubtful=True))],
            doubt_seconds=150,
        )
        with pytest.raises(DBAPIError):
            await connection.execute(text("INSERT INTO outbox.no_such_table VALUES (1)"))
        await connection.rollback()

    after = await outbox.waiting()
    assert after[:-1] == before[:-1]
    assert await outbox.history() == []
    assert await outbox.doubts() == []
    assert len((await outbox.settle(event, Delivered())).written) == 1


async def test_history_that_cannot_be_written_keeps_the_event(outbox: Outbox) -> None:
    """
    One statement removes the event and writes its history: if the second fails, so does the
    first, even outside of any transaction.
    """
    event = await claimed(outbox)
    await outbox.execute("ALTER TABLE outbox.settled ADD CONSTRAINT broken CHECK (false)")
    try:
        autocommit = outbox.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with autocommit.connect() as connection:
            with pytest.raises(DBAPIError):
                await store.settle(
                    connection, [Landed(event=event, outcome=Delivered())], doubt_seconds=150
                )
    finally:
        await outbox.execute("ALTER TABLE outbox.settled DROP CONSTRAINT broken")

    assert (await outbox.waiting()).claim_token == event.claim_token


async def test_nothing_is_claimed_wholly_or_in_part_by_hand(outbox: Outbox) -> None:
    """
    The table itself refuses a claim without a token, without an attempt or of a future version.
    """
    await outbox.enqueue("a")
    for broken in (
        "claimed_by = gen_random_uuid()",
        "claimed_version = 1",
        "claim_token = gen_random_uuid()",
        "claim_token = gen_random_uuid(), claimed_version = 1, claimed_by = gen_random_uuid()",
        "claim_token = gen_random_uuid(), claimed_version = 2, claimed_by = gen_random_uuid(),"
        " attempts = 1, first_attempt_at = now()",
    ):
        with pytest.raises(DBAPIError, match="check constraint"):
            await outbox.execute(f"UPDATE outbox.events SET {broken}")  # noqa: S608
