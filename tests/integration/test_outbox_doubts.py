"""
Late writers: a slow request of an older state must not have the last word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from outbox import store
from outbox.destination import DOUBT_SECONDS
from outbox.outcome import Dead, Deferred, Delivered, Outcome, Retry, Skipped
from tests.integration.outbox_builders import Outbox

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Event

UNKNOWN = Retry(after_seconds=0, code="timeout", doubtful=True)


@pytest.fixture
def outbox(engine: AsyncEngine) -> Outbox:
    """
    An empty outbox.
    """
    return Outbox(engine)


async def claimed(outbox: Outbox, key: str = "a") -> Event:
    """
    The one event that is due.
    """
    [event] = await outbox.claim()
    assert event.key == key
    return event


async def timed_out(outbox: Outbox, version: int = 1) -> None:
    """
    An event whose first request ended without an answer.
    """
    await outbox.enqueue("a", version)
    await outbox.settle(await claimed(outbox), UNKNOWN)


@pytest.mark.parametrize(
    "outcome",
    [
        UNKNOWN,
        Deferred(after_seconds=0, code="interrupted", doubtful=True),
        Dead(code="timeout", message="No answer.", recoverable=True, doubtful=True),
    ],
    ids=["retry", "deferred", "dead"],
)
async def test_a_newer_state_is_said_again_after_an_older_request_could_land(
    outbox: Outbox, outcome: Outcome
) -> None:
    """
    If the slow request of the old state arrives last, the portal shows the old state; once it
    cannot arrive any more, the new state is said again and wins.
    """
    await outbox.enqueue("a", 1)
    await outbox.settle(await claimed(outbox), outcome)
    await outbox.enqueue("a", 2)
    settled = await outbox.settle(await claimed(outbox), Delivered())

    assert [one.ending for one in settled.written] == ["delivered"]
    assert (2, "delivered") in await outbox.history()
    live = await outbox.waiting()
    assert (live.version, live.attempts, live.claim_token) == (2, 0, None)
    assert DOUBT_SECONDS - 10 < live.waits <= DOUBT_SECONDS

    await outbox.pass_time(DOUBT_SECONDS + 1)
    again = await claimed(outbox)
    await outbox.settle(again, Delivered())

    assert (again.version, again.payload, again.attempts) == (2, {"value": 2}, 1)
    assert await outbox.live() is None


async def test_the_older_state_being_delivered_in_between_removes_no_doubt(
    outbox: Outbox,
) -> None:
    """
    The retry of the old state succeeded, but its first request is still on its way.
    """
    await timed_out(outbox, version=1)
    await outbox.settle(await claimed(outbox), Delivered())
    assert await outbox.live() is None

    await outbox.enqueue("a", 2)
    await outbox.settle(await claimed(outbox), Delivered())

    assert (await outbox.waiting()).version == 2


async def test_an_unknown_outcome_of_the_same_state_is_no_doubt(outbox: Outbox) -> None:
    """
    A late request that says the same as its successful retry can do no harm.
    """
    await timed_out(outbox, version=1)

    await outbox.settle(await claimed(outbox), Delivered())

    assert await outbox.live() is None


async def test_a_doubt_of_another_key_or_destination_is_none_of_ours(outbox: Outbox) -> None:
    """
    A late request touches its own key only.
    """
    await timed_out(outbox, version=1)
    await outbox.execute("UPDATE outbox.doubts SET key = 'b'")
    await outbox.enqueue("a", 2)
    await outbox.settle(await claimed(outbox), Delivered())
    assert await outbox.live() is None

    await outbox.execute("UPDATE outbox.doubts SET key = 'a', destination = 'bufdir'")
    await outbox.enqueue("a", 3)
    await outbox.settle(await claimed(outbox), Delivered())
    assert await outbox.live() is None


async def test_a_doubt_that_is_past_costs_no_second_request(outbox: Outbox) -> None:
    """
    After the longest time a request can take, nothing is said twice.
    """
    await timed_out(outbox, version=1)
    await outbox.pass_time(DOUBT_SECONDS + 1)
    await outbox.enqueue("a", 2)

    await outbox.settle(await claimed(outbox), Delivered())

    assert await outbox.live() is None


async def test_an_unknown_outcome_during_which_a_newer_state_came_is_remembered(
    outbox: Outbox,
) -> None:
    """
    The superseded flight is over for us, but not for the destination.
    """
    await outbox.enqueue("a", 1)
    event = await claimed(outbox)
    await outbox.enqueue("a", 2)
    await outbox.settle(event, UNKNOWN)

    await outbox.settle(await claimed(outbox), Delivered())

    assert await outbox.doubts() == [1]
    assert (await outbox.waiting()).waits > DOUBT_SECONDS - 10


async def test_a_claim_that_was_lost_is_a_doubt(outbox: Outbox) -> None:
    """
    A worker hangs while it sends the old state and loses its lease; another one sends the new
    state; then the first request arrives. The new state is said again afterwards.
    """
    await outbox.enqueue("a", 1)
    await outbox.claim(lease_seconds=60)
    await outbox.enqueue("a", 2)
    await outbox.pass_time(61)

    event = await claimed(outbox)
    assert event.version == 2
    await outbox.settle(event, Delivered())

    assert await outbox.doubts() == [1]
    assert (await outbox.waiting()).version == 2


async def test_a_newer_state_takes_the_place_of_one_that_waits_to_be_said_again(
    outbox: Outbox,
) -> None:
    """
    It goes at once, and is itself said again after the same doubt.
    """
    await timed_out(outbox, version=1)
    await outbox.enqueue("a", 2)
    await outbox.settle(await claimed(outbox), Delivered())

    await outbox.enqueue("a", 3)
    await outbox.settle(await claimed(outbox), Delivered())

    live = await outbox.waiting()
    assert live.version == 3
    assert live.waits > DOUBT_SECONDS - 10
    assert await outbox.history() == [(2, "delivered"), (3, "delivered")]


@pytest.mark.parametrize(
    "outcome", [Skipped(reason="other_organization"), Dead(code="gone", message="Gone.")]
)
async def test_only_what_was_delivered_is_said_again(outbox: Outbox, outcome: Outcome) -> None:
    """
    A skip has nothing to say and a dead event has its failure.
    """
    await timed_out(outbox, version=1)
    await outbox.enqueue("a", 2)

    await outbox.settle(await claimed(outbox), outcome)

    assert await outbox.live() is None


async def test_a_certain_outcome_is_no_doubt(outbox: Outbox) -> None:
    """
    A refusal that was answered cannot take effect later.
    """
    await outbox.enqueue("a", 1)
    await outbox.settle(await claimed(outbox), Retry(after_seconds=0, code="busy"))

    assert await outbox.doubts() == []


# ---------------------------------------------------------------------------------- prune


async def settled(outbox: Outbox, number: int, outcome: Outcome) -> None:
    """
    So many events with this ending.
    """
    for one in range(number):
        await outbox.enqueue(f"{type(outcome).__name__} {one}")
    for event in await outbox.claim(number):
        await outbox.settle(event, outcome)


async def prune(outbox: Outbox, *, limit: int = 1000, **keep_days: int) -> int:
    """
    Prune and commit.
    """
    async with outbox.engine.begin() as connection:
        return await store.prune(connection, keep_days=keep_days, limit=limit)


async def outcomes(outbox: Outbox) -> list[str]:
    """
    The endings that the history still knows.
    """
    rows = await outbox.rows("SELECT outcome FROM outbox.settled ORDER BY outcome")
    return [row.outcome for row in rows]


async def test_each_ending_is_kept_for_its_own_time(outbox: Outbox) -> None:
    """
    What is old goes, what is young or has no time set stays.
    """
    await settled(outbox, 2, Delivered())
    await settled(outbox, 2, Dead(code="gone", message="Gone."))
    await settled(outbox, 1, Skipped(reason="other"))
    await outbox.pass_time(10 * 86_400)

    assert await prune(outbox, delivered=30, dead=30) == 0
    assert await prune(outbox, delivered=7, dead=30) == 2
    assert await outcomes(outbox) == ["dead", "dead", "skipped"]


async def test_pruning_takes_a_limited_bite(outbox: Outbox) -> None:
    """
    Each call holds few locks; calling again gets the rest, the oldest first.
    """
    await settled(outbox, 2, Delivered())
    await outbox.pass_time(86_400)
    await settled(outbox, 3, Delivered())
    await outbox.pass_time(10 * 86_400)

    gone = [await prune(outbox, limit=2, delivered=7)]
    ages = await outbox.rows(
        "SELECT count(DISTINCT date_trunc('day', settled_at)) FROM outbox.settled"
    )
    gone += [await prune(outbox, limit=2, delivered=7) for _ in range(2)]

    assert ages[0][0] == 1
    assert gone == [2, 2, 1]


async def test_a_doubt_counts_that_stood_when_the_newer_state_was_sent(outbox: Outbox) -> None:
    """
    The answer was there in time, and could be written only when the doubt was past: the old
    request may have landed in between, so the new state is said again at once.
    """
    await timed_out(outbox, version=1)
    await outbox.enqueue("a", 2)
    sent = await claimed(outbox)
    await outbox.pass_time(DOUBT_SECONDS + 1)

    await outbox.settle(sent, Delivered())

    again = await claimed(outbox)
    assert again.version == 2
    await outbox.settle(again, Delivered())
    assert await outbox.live() is None


async def test_pruning_forgets_no_doubt_that_matters(outbox: Outbox) -> None:
    """
    A doubt goes when it is long past: what was sent while it stood may be settled later.
    """
    await timed_out(outbox, version=1)
    assert await prune(outbox) == 0
    assert await outbox.doubts() == [1]

    await outbox.pass_time(DOUBT_SECONDS + 1)
    assert await prune(outbox) == 0

    await outbox.pass_time(store.KEEP_DOUBTS_SECONDS)
    assert await prune(outbox) == 1
    assert (await outbox.rows("SELECT count(*) FROM outbox.doubts"))[0][0] == 0


async def test_pruning_touches_nothing_that_lives(outbox: Outbox) -> None:
    """
    However old a live event is, waiting or in flight, cleaning up leaves it alone.
    """
    await outbox.enqueue("in flight")
    await outbox.claim()
    await outbox.enqueue("waiting")
    await outbox.pass_time(1000 * 86_400)

    await prune(outbox, delivered=0, superseded=0, dead=0, skipped=0)

    assert await outbox.live("in flight") is not None
    assert await outbox.live("waiting") is not None


async def test_two_prunings_do_not_wait_for_each_other(outbox: Outbox) -> None:
    """
    What one is about to delete, the other skips.
    """
    await settled(outbox, 4, Delivered())
    await outbox.pass_time(10 * 86_400)

    async with outbox.engine.connect() as one:
        assert await store.prune(one, keep_days={"delivered": 7}, limit=3) == 3
        assert await prune(outbox, delivered=7) == 1
        await one.commit()

    assert await outcomes(outbox) == []
