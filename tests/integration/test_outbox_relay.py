"""
The relay at work: every event ends, each in its own way and none at another's cost.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs
from typing_extensions import override

from outbox import (
    Delivered,
    DeliveryError,
    Event,
    Observer,
    PermanentError,
    RetryPolicy,
    Settlement,
    Skipped,
    TransientError,
)
from tests.conftest import until
from tests.integration.outbox_builders import Outbox, Remote, run_to_the_end, running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox.outcome import Outcome


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


def busy(*, doubtful: bool = False) -> TransientError:
    """
    An error that passes.
    """
    return TransientError("busy", "Busy.", doubtful=doubtful)


async def test_what_is_due_is_delivered_and_recorded(outbox: Outbox, remote: Remote) -> None:
    """
    Each event once, urgent ones first, and the application hears of each.
    """
    await outbox.enqueue("later", priority=1)
    await outbox.enqueue("first", priority=0)

    drained = await outbox.relay(remote.deliver, concurrency=1).drain()

    assert remote.about() == ["first", "later"]
    assert (drained.ended, drained.tally["delivered"]) == ("done", 2)
    assert [(one.key, one.ending) for one in outbox.recorded] == [
        ("first", "delivered"),
        ("later", "delivered"),
    ]
    assert await outbox.rows("SELECT 1 FROM outbox.events") == []


async def test_transient_faults_are_retried_until_it_works(outbox: Outbox, remote: Remote) -> None:
    """
    Request by request: three failures, the same version each time, and the fourth is heard.
    """
    await outbox.enqueue("a", 5)
    remote.answers("a", busy(), busy(), busy())
    relay = outbox.relay(remote.deliver)

    await run_to_the_end(outbox, relay)

    assert [(call.version, call.attempts) for call in remote.calls] == [(5, n) for n in range(1, 5)]
    assert await outbox.history() == [(5, "delivered")]
    assert relay.tally["retry"] == 3
    assert outbox.recorded[-1].retries == 3


async def test_retries_keep_their_distance(outbox: Outbox) -> None:
    """
    Between two requests lies at least the delay of the policy.
    """
    moments: list[float] = []

    async def deliver(_event: Event, _seconds: float) -> Delivered:
        moments.append(time.monotonic())
        raise busy()

    await outbox.enqueue("a")
    policy = RetryPolicy(max_attempts=3, wait=lambda state: 0.05 * state.attempt_number)  # type: ignore[arg-type]
    await run_to_the_end(outbox, outbox.relay(deliver, policy=policy))

    first, second, third = moments
    assert second - first >= 0.05
    assert third - second >= 0.1


async def test_when_all_attempts_failed_the_event_is_dead(outbox: Outbox, remote: Remote) -> None:
    """
    Four requests, then a failure that a recovery may bring back; the outage it may mean closes
    the gate.
    """
    await outbox.enqueue("a")
    remote.broken = busy()

    await run_to_the_end(outbox, outbox.relay(remote.deliver))

    assert len(remote.calls) == 4
    assert await outbox.history() == [(1, "dead")]
    [dead] = [one for one in outbox.recorded if one.ending]
    assert (dead.ending, dead.retries) == ("dead", 3)
    assert dead.outcome.recoverable  # type: ignore[union-attr]
    assert (await outbox.gate()).reason == "outage"


async def test_a_permanent_error_is_dead_at_once(outbox: Outbox, remote: Remote) -> None:
    """
    One request; the others are not concerned, and the gate stays open.
    """
    await outbox.enqueue("gone")
    await outbox.enqueue("here")
    remote.answers("gone", PermanentError("gone", "There is no such record."))

    drained = await outbox.relay(remote.deliver).drain()

    assert sorted(remote.about()) == ["gone", "here"]
    assert drained.tally == Counter({"delivered": 1, "dead": 1, "lost": 0})
    assert (await outbox.gate()).state == "open"


async def test_what_was_skipped_is_over(outbox: Outbox, remote: Remote) -> None:
    """
    Nothing to send is an ending of its own, and no failure.
    """
    await outbox.enqueue("a")
    remote.answers("a", Skipped(reason="other_organization"))

    drained = await outbox.relay(remote.deliver).drain()

    assert drained.tally["skipped"] == 1
    assert await outbox.history() == [(1, "skipped")]


async def test_an_unforeseen_exception_is_retried_and_then_dead(
    outbox: Outbox, remote: Remote
) -> None:
    """
    A bug in a handler loses no event and stops no other one; what it says is stored nowhere.
    """
    await outbox.enqueue("bug")
    await outbox.enqueue("fine")
    remote.answers("bug", *[ValueError("s3cret")] * 4)

    with capture_logs() as logs:
        await run_to_the_end(outbox, outbox.relay(remote.deliver))

    assert remote.about().count("bug") == 4
    assert await outbox.history("bug") == [(1, "dead")]
    assert await outbox.history("fine") == [(1, "delivered")]
    [row] = await outbox.rows("SELECT error_code FROM outbox.settled WHERE outcome = 'dead'")
    assert row.error_code == "ValueError"
    assert "s3cret" not in repr(outbox.recorded)
    assert "s3cret" not in repr(logs)


@pytest.mark.parametrize(
    "error",
    [
        busy(),
        DeliveryError("odd", "Odd."),
        PermanentError("gone", "Gone."),
        RuntimeError("bug"),
        TimeoutError(),
        OverflowError("2.0 ** 1025"),
        ExceptionGroup("many", [ValueError("bug")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_no_error_ever_deletes_an_event(
    outbox: Outbox, remote: Remote, error: Exception
) -> None:
    """
    Whatever a handler raises, the event ends in the history as dead and with a code.
    """
    await outbox.enqueue("a")
    remote.broken = error

    await run_to_the_end(outbox, outbox.relay(remote.deliver))

    assert await outbox.history() == [(1, "dead")]
    [row] = await outbox.rows("SELECT error_code FROM outbox.settled")
    assert row.error_code


async def test_a_raising_wait_strategy_loses_nothing(outbox: Outbox, remote: Remote) -> None:
    """
    A policy with a bug stops the drain loudly, and the event is still there afterwards.
    """

    def wait(_state: object) -> float:
        raise ArithmeticError

    await outbox.enqueue("a")
    remote.answers("a", busy())

    with pytest.raises(ArithmeticError):
        await outbox.relay(remote.deliver, policy=RetryPolicy(wait=wait)).drain()  # type: ignore[arg-type]

    await outbox.pass_time(61)
    await outbox.relay(remote.deliver).drain()
    assert await outbox.history() == [(1, "delivered")]


async def test_a_handler_that_hangs_meets_its_deadline(outbox: Outbox, remote: Remote) -> None:
    """
    The request is given up long before the lease ends, its effect is unknown, and the retry
    goes out.
    """
    await outbox.enqueue("a")
    hold = remote.holds("a")

    relay = outbox.relay(remote.deliver, attempt_seconds=0.1)

    await run_to_the_end(outbox, relay)

    assert hold.arrived.is_set()
    assert [call.attempts for call in remote.calls] == [1, 2]
    assert relay.tally["retry"] == 1
    assert await outbox.doubts() == [1]
    assert await outbox.history() == [(1, "delivered")]


async def test_one_slow_request_holds_nobody_up(outbox: Outbox, remote: Remote) -> None:
    """
    While one key hangs, others go out, and whoever wants to change the hanging one can.
    """
    await outbox.enqueue("slow", 1)
    hold = remote.holds("slow")
    async with running(outbox.relay(remote.deliver, concurrency=2)):
        await hold.arrived.wait()
        for number in range(20):
            await outbox.enqueue(f"fast {number}")
        await until(lambda: len(remote.values) == 20)
        await outbox.enqueue("slow", 2)
        hold.let_go.set()
        await until(lambda: remote.values.get("slow") == 2)

    assert await outbox.history("slow") == [(1, "delivered"), (2, "delivered")]


async def test_no_more_is_in_flight_than_allowed(outbox: Outbox) -> None:
    """
    Concurrency is a limit. Of what is claimed fewer wait for a place than have one.
    """
    at_once, most, claimed = 0, 0, 0

    async def deliver(_event: Event, _seconds: float) -> Delivered:
        nonlocal at_once, most, claimed
        at_once += 1
        most = max(most, at_once)
        rows = await outbox.rows("SELECT 1 FROM outbox.events WHERE claim_token IS NOT NULL")
        claimed = max(claimed, len(rows))
        at_once -= 1
        return Delivered()

    for number in range(30):
        await outbox.enqueue(f"{number}")
    drained = await outbox.relay(deliver, concurrency=3).drain()

    assert drained.tally["delivered"] == 30
    assert most == 3
    assert claimed <= 3 + 2


async def test_what_comes_in_behind_a_backlog_is_found_too(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Claims go on after one another, and at the end of the backlog they look from the start.
    """
    monkeypatch.setattr("outbox.cursor.FULL_LOOK_SHARE", 1e-12)

    delivered = await with_a_late_comer(outbox, events=20)

    assert len(delivered) == 21


async def test_an_urgent_event_does_not_wait_for_the_end_of_a_backlog(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Now and then a claim looks from the start.
    """
    monkeypatch.setattr("outbox.cursor.FULL_LOOK_SHARE", 1)

    delivered = await with_a_late_comer(outbox, events=100)

    assert delivered.index("urgent") < 60


async def with_a_late_comer(outbox: Outbox, *, events: int) -> list[str]:
    """
    The keys in the order of delivery, when an urgent event comes with the tenth request.
    """
    delivered: list[str] = []

    async def deliver(event: Event, _seconds: float) -> Delivered:
        delivered.append(event.key)
        if len(delivered) == 10:
            await outbox.enqueue("urgent", priority=0)
        return Delivered()

    for number in range(events):
        await outbox.enqueue(f"{number}", priority=1)
    await outbox.relay(deliver, concurrency=2).drain()
    return delivered


async def test_a_newer_state_during_a_flight_causes_exactly_one_follow_up(
    outbox: Outbox, remote: Remote
) -> None:
    """
    However many states come during a flight, and whether it fails or not, one request follows.
    """
    await outbox.enqueue("a", 1)
    hold = remote.holds("a")
    async with running(outbox.relay(remote.deliver)):
        await hold.arrived.wait()
        for version in (2, 3, 4):
            await outbox.enqueue("a", version)
        hold.let_go.set()
        await until(lambda: remote.values.get("a") == 4)
        await until(lambda: not_alive(outbox))

    assert [call.version for call in remote.calls] == [1, 4]
    assert await outbox.history() == [(1, "delivered"), (4, "delivered")]


async def test_a_failed_flight_does_not_come_back_before_a_newer_state(
    outbox: Outbox, remote: Remote
) -> None:
    """
    After an outage nothing old is sent after something newer: the failed version is gone.
    """
    await outbox.enqueue("a", 1)
    remote.answers("a", busy())
    slow = RetryPolicy(wait=lambda _: 3600, window_seconds=9999)  # type: ignore[arg-type]
    async with running(outbox.relay(remote.deliver, policy=slow)):
        await until(lambda: outbox.recorded)
        await outbox.enqueue("a", 2)
        await until(lambda: not_alive(outbox))

    assert [call.version for call in remote.calls] == [1, 2]
    assert remote.values == {"a": 2}


async def not_alive(outbox: Outbox) -> bool:
    """
    Whether the key has no live event.
    """
    return await outbox.live() is None


async def test_a_newer_state_that_dies_leaves_a_failure(outbox: Outbox, remote: Remote) -> None:
    """
    The state it replaced is not sent in its place; the key is known as failed.
    """
    await outbox.enqueue("a", 1)
    hold = remote.holds("a")
    remote.answers("a", PermanentError("gone", "Gone."))
    async with running(outbox.relay(remote.deliver)):
        await hold.arrived.wait()
        await outbox.enqueue("a", 2)
        hold.let_go.set()
        await until(lambda: not_alive(outbox))

    assert await outbox.history() == [(1, "delivered"), (2, "dead")]
    assert outbox.recorded[-1].version == 2


async def test_the_relay_is_woken_and_need_not_poll(outbox: Outbox, remote: Remote) -> None:
    """
    Whoever knows of a new event can say so, and it goes out at once.
    """
    relay = outbox.relay(remote.deliver)
    relay._poll_seconds = 3600
    turns = 0
    turn = relay._turn

    async def counted() -> bool:
        nonlocal turns
        more = await turn()
        turns += 1
        return more

    relay._turn = counted  # type: ignore[method-assign]
    async with running(relay):
        await until(lambda: turns)
        await outbox.enqueue("a")
        relay.wake()
        await until(lambda: remote.values)


async def test_without_being_woken_the_relay_looks_for_itself(
    outbox: Outbox, remote: Remote
) -> None:
    """
    A wake-up that gets lost costs one poll and no event.
    """
    async with running(outbox.relay(remote.deliver)):
        await outbox.enqueue("a")
        await until(lambda: remote.values)


async def test_an_idle_relay_does_not_spin(outbox: Outbox, remote: Remote) -> None:
    """
    With nothing due, also with events waiting for later, it looks once per poll.
    """
    await outbox.enqueue("later")
    await outbox.execute("UPDATE outbox.events SET available_at = now() + interval '1 hour'")
    relay = outbox.relay(remote.deliver)
    turns = 0
    turn = relay._turn

    async def counted() -> bool:
        nonlocal turns
        turns += 1
        return await turn()

    relay._turn = counted  # type: ignore[method-assign]
    started = time.monotonic()
    async with running(relay):
        await until(lambda: turns >= 10)
    lasted = time.monotonic() - started

    assert turns <= lasted / (0.02 * 0.9) + 3


async def test_our_own_database_failing_a_handler_burns_nothing(
    outbox: Outbox, remote: Remote
) -> None:
    """
    A handler that could not read what it needs is tried again, with all its attempts.
    """
    await outbox.enqueue("a")
    remote.answers("a", *[OperationalError("SELECT", None, Exception("gone"))] * 6)
    async with running(outbox.relay(remote.deliver)):
        for count in range(1, 7):
            await until(lambda count=count: len(outbox.recorded) == count)
            await outbox.pass_time(2)
        await until(lambda: remote.values)

    assert {call.attempts for call in remote.calls} == {1}
    assert (await outbox.gate()).state == "open"


async def test_a_handler_that_is_cancelled_from_inside_does_not_spin(
    outbox: Outbox, remote: Remote
) -> None:
    """
    An awaited task that was cancelled is a failure like another: it burns attempts, waits
    between them and ends.
    """
    await outbox.enqueue("a")
    remote.broken = asyncio.CancelledError()

    drained = await outbox.relay(remote.deliver).drain(seconds=1)

    assert len(remote.calls) == 4
    assert drained.tally["dead"] == 1


# ------------------------------------------------------------------------------ recording


async def test_one_event_that_cannot_be_recorded_does_not_block_the_others(
    outbox: Outbox, remote: Remote
) -> None:
    """
    The batch is settled one by one: the odd one stays claimed and comes back later, loudly.
    """

    def record(settlement: Settlement) -> None:
        if settlement.key == "odd":
            raise LookupError("no such column")

    outbox.record = record
    for key in ("a", "odd", "z"):
        await outbox.enqueue(key)

    with capture_logs() as logs:
        drained = await outbox.relay(remote.deliver).drain()

    assert drained.tally["delivered"] == 2
    assert await outbox.history("odd") == []
    live = await outbox.waiting("odd")
    assert live.claim_token is not None
    assert [line["key"] for line in logs if line["event"] == "outbox.settle_failed"] == ["odd"]

    outbox.record = lambda _: None
    await outbox.pass_time(61)
    await outbox.relay(remote.deliver).drain()
    assert await outbox.history("odd") == [(1, "delivered")]


async def test_a_failure_that_cannot_be_recorded_is_not_lost(
    outbox: Outbox, remote: Remote
) -> None:
    """
    If the application's table of failures is broken, the dead event stays alive until its
    failure can be written.
    """

    def record(settlement: Settlement) -> None:
        if settlement.ending == "dead":
            raise LookupError("no such table")

    outbox.record = record
    await outbox.enqueue("a")
    remote.answers("a", PermanentError("gone", "Gone."), PermanentError("gone", "Gone."))
    await outbox.relay(remote.deliver).drain()
    assert await outbox.history() == []
    assert await outbox.live() is not None

    outbox.record = lambda _: None
    await outbox.pass_time(61)
    await outbox.relay(remote.deliver).drain()

    assert await outbox.history() == [(1, "dead")]


async def test_settlements_are_told_after_they_are_committed(
    outbox: Outbox, remote: Remote
) -> None:
    """
    Progress that is shown has happened: others see the row when the callback runs.
    """
    told: list[tuple[str, str | None]] = []

    class Listener(Observer):
        @override
        def settled(self, settlements: Sequence[Settlement]) -> None:
            told.extend((one.key, one.ending) for one in settlements)

    await outbox.enqueue("a")
    remote.answers("a", busy())

    await run_to_the_end(outbox, outbox.relay(remote.deliver, observer=Listener()))

    assert told == [("a", None), ("a", "delivered")]


class Ears(Observer):
    """
    Notes what it is told.
    """

    def __init__(self) -> None:
        self.claimed: list[int] = []
        self.outcomes: list[str] = []
        self.again: list[int] = []
        self.stopped = 0

    @override
    def turned(self, *, seconds: float, claimed: int) -> None:
        assert 0 < seconds < 20
        self.claimed.append(claimed)

    @override
    def attempted(self, outcome: Outcome, *, seconds: float) -> None:
        assert 0 <= seconds < 20
        self.outcomes.append(type(outcome).__name__)

    @override
    def redriven(self, keys: int) -> None:
        self.again.append(keys)

    @override
    def stopping(self) -> None:
        self.stopped += 1


async def test_an_idle_relay_tells_of_its_turns(outbox: Outbox, remote: Remote) -> None:
    """
    That there was nothing to claim is an answer of the database too.
    """
    ears = Ears()
    await outbox.relay(remote.deliver, observer=ears).drain()

    assert ears.claimed == [0]


async def test_what_is_claimed_and_what_came_of_it_is_told(outbox: Outbox, remote: Remote) -> None:
    """
    Each attempt, also one that failed; and the end.
    """
    ears = Ears()
    await outbox.enqueue("a")
    remote.answers("a", busy())
    relay = outbox.relay(remote.deliver, observer=ears)

    await run_to_the_end(outbox, relay)

    assert sum(ears.claimed) == 2
    assert ears.outcomes == ["Retry", "Delivered"]
    assert ears.stopped == 1


async def test_the_claim_of_a_probe_is_told_like_any_other(outbox: Outbox, remote: Remote) -> None:
    """
    Else more attempts would have ended than were ever claimed.
    """
    ears = Ears()
    await outbox.enqueue("a")
    await outbox.half_open_gate()
    await run_to_the_end(outbox, outbox.relay(remote.deliver, observer=ears))

    assert sum(ears.claimed) == len(ears.outcomes) == 1


async def test_what_goes_again_after_an_outage_is_told(outbox: Outbox, remote: Remote) -> None:
    """
    When the application has enqueued it.
    """

    async def redrive(_limit: int | None) -> int:
        return 3

    ears = Ears()
    outbox.redrive = redrive
    await outbox.half_open_gate()
    async with running(outbox.relay(remote.deliver, observer=ears)):
        await until(lambda: ears.again)

    assert ears.again[0] == 3


async def test_a_request_that_was_accepted_before_a_crash_is_repeated_once(
    outbox: Outbox, remote: Remote
) -> None:
    """
    The worker dies between the destination's yes and the write-back: the state is sent again
    after the lease, to the same effect, and ends once.
    """
    await outbox.enqueue("a")
    crashed = asyncio.Event()

    def record(_settlement: Settlement) -> None:
        crashed.set()
        raise asyncio.CancelledError  # as if the process were gone: no handler of errors runs

    outbox.record = record
    with pytest.raises(asyncio.CancelledError):
        await outbox.relay(remote.deliver).drain()
    assert crashed.is_set()
    assert await outbox.history() == []

    outbox.record = lambda _: None
    await outbox.pass_time(61)
    await outbox.relay(remote.deliver).drain()

    assert [(call.version, call.attempts) for call in remote.calls] == [(1, 1), (1, 2)]
    assert remote.values == {"a": 1}
    assert await outbox.history() == [(1, "delivered")]
