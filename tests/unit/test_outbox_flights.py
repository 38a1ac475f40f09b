"""
Attempts under way: places, who waits for one, and when it is time to collect them.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from outbox import Delivered, Destination, Event, RetryPolicy, ThrottledError, TransientError
from outbox.flights import Flights
from outbox.outcome import Deferred, Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from outbox import Settlement


class Airport:
    """
    Flights whose requests land when they are told to.

    Attributes:
        asked: keys, in the order in which their requests began.
        calls: how often it was time to collect.
    """

    def __init__(self, *, concurrency: int) -> None:
        self.asked: list[str] = []
        self.calls = 0
        self.called = asyncio.Event()
        self._answers: dict[str, asyncio.Future[Delivered]] = {}
        self.flights = Flights(
            Destination(
                name="xledger",
                organization_id=uuid4(),
                deliver=self._deliver,
                record=_record,
                redrive=_redrive,
                policy=RetryPolicy(),
                concurrency=concurrency,
            ),
            call=self._call,
        )

    def take_off(self, *keys: str) -> None:
        """
        Begin an attempt for each key.
        """
        for key in keys:
            self.flights.take_off(event(key), claimed_at=time.monotonic(), probe=None)

    async def land(self, key: str, error: Exception | None = None) -> None:
        """
        Let a request have its answer, and let everybody hear of it.
        """
        if error is None:
            self._answers[key].set_result(Delivered())
        else:
            self._answers[key].set_exception(error)
        await breathe()

    async def _deliver(self, event: Event, _seconds: float) -> Delivered:
        self.asked.append(event.key)
        self._answers[event.key] = asyncio.get_running_loop().create_future()
        return await self._answers[event.key]

    def _call(self) -> None:
        self.calls += 1
        self.called.set()


async def breathe() -> None:
    """
    Let every task do what it can do now.
    """
    for _ in range(10):
        await asyncio.sleep(0)


async def _record(_: AsyncConnection, settlements: Sequence[Settlement]) -> None:
    raise NotImplementedError


async def _redrive(limit: int | None) -> int:
    raise NotImplementedError


def event(key: str) -> Event:
    """
    A claimed event.
    """
    return Event(
        id=1,
        destination="xledger",
        key=key,
        organization_id=uuid4(),
        version=1,
        payload={},
        priority=0,
        created_at=datetime.now(UTC),
        attempts=1,
        elapsed_seconds=0.0,
        claim_token=uuid4(),
        last_error_code=None,
        traceparent=None,
    )


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """
    Lets time pass, which otherwise stands still for the flights.
    """
    now = time.monotonic()

    def let_pass(number: float) -> None:
        nonlocal now
        now += number

    monkeypatch.setattr("outbox.flights.time", SimpleNamespace(monotonic=lambda: now))
    return let_pass


async def test_who_has_no_place_waits_for_one() -> None:
    """
    And begins when one is free, in the order of take-off.
    """
    airport = Airport(concurrency=2)
    airport.take_off("a", "b", "c", "d")
    await breathe()
    assert airport.asked == ["a", "b"]
    await airport.land("b")
    assert airport.asked == ["a", "b", "c"]


async def test_who_waits_gives_up_when_all_are_grounded() -> None:
    """
    Nothing is sent for it, and no attempt is burnt; what was sent lands.
    """
    airport = Airport(concurrency=1)
    airport.take_off("a", "b")
    await breathe()
    airport.flights.grounded = True
    await airport.land("a")

    outcomes = {one.event.key: one.outcome for one in airport.flights.collect()}

    assert outcomes["a"] == Delivered()
    assert outcomes["b"] == Deferred(after_seconds=0, code="interrupted")
    assert airport.asked == ["a"]


@pytest.mark.parametrize(
    "error",
    [ThrottledError("throttled", "Wait.", retry_after=300), TransientError("busy", "Busy.")],
    ids=["throttled", "busy"],
)
async def test_an_answer_that_may_close_the_gate_grounds_who_waits(error: Exception) -> None:
    """
    Before the place of the one who got it is anybody else's.
    """
    airport = Airport(concurrency=1)
    airport.take_off("a", "b")
    await breathe()
    await airport.land("a", error)

    assert airport.flights.grounded
    assert airport.asked == ["a"]


async def test_who_waits_when_all_are_cancelled_was_never_sent() -> None:
    """
    So there is no doubt about it, as there is about who was under way.
    """
    airport = Airport(concurrency=1)
    airport.take_off("a", "b")
    await breathe()

    assert await airport.flights.cancel() == []

    outcomes = {one.event.key: one.outcome for one in airport.flights.collect()}
    assert outcomes == {
        "a": Deferred(after_seconds=0, code="interrupted", doubtful=True),
        "b": Deferred(after_seconds=0, code="interrupted"),
    }
    assert len(airport.flights) == 0


async def test_there_is_room_for_free_places_alone_while_nothing_is_known() -> None:
    """
    Nobody waits for a slow destination with an event in hand.
    """
    airport = Airport(concurrency=3)
    assert airport.flights.room == 3
    airport.take_off("a")
    assert airport.flights.room == 2


async def test_as_many_as_landed_are_expected_to_land(seconds: Callable[[float], None]) -> None:
    """
    So many may wait for a place; always less than have one.
    """
    airport = Airport(concurrency=2)
    airport.take_off("a", "b")
    await breathe()
    await airport.land("a")
    seconds(0.051)
    airport.flights.collect()
    assert airport.flights.room == 2
    airport.take_off("c", "d")
    await breathe()
    for key in "bcd":
        await airport.land(key)
    seconds(0.051)
    airport.flights.collect()
    assert airport.flights.room == 3


async def test_who_gave_up_waiting_has_not_landed(seconds: Callable[[float], None]) -> None:
    """
    So after a failure no more events are claimed than there will be places for.
    """
    airport = Airport(concurrency=3)
    airport.take_off("a", "b", "c", "d", "e")
    await breathe()
    await airport.land("a", TransientError(code="server_error", message="Broken."))
    seconds(0.051)

    assert {flight.event.key for flight in airport.flights.collect()} == {"a", "d", "e"}
    assert airport.flights.room == 2


async def test_with_one_place_nobody_waits_for_it(seconds: Callable[[float], None]) -> None:
    """
    So a process that dies has one event in hand.
    """
    airport = Airport(concurrency=1)
    airport.take_off("a")
    await breathe()
    await airport.land("a")
    seconds(0.051)
    airport.flights.collect()
    assert airport.flights.room == 1


async def test_a_slow_destination_is_expected_to_land_nothing(
    seconds: Callable[[float], None],
) -> None:
    """
    One answer in a second is less than one until the next turn.
    """
    airport = Airport(concurrency=2)
    airport.take_off("a", "b")
    await breathe()
    await airport.land("a")
    seconds(1.0)
    airport.flights.collect()
    assert airport.flights.room == 1


async def test_flights_that_land_one_after_the_other_are_collected_together(
    seconds: Callable[[float], None],
) -> None:
    """
    The first of them lets the others catch up.
    """
    airport = Airport(concurrency=3)
    airport.flights.collect()
    airport.take_off("a", "b", "c")
    await breathe()
    await airport.land("a")
    await airport.land("b")
    assert airport.calls == 0
    await asyncio.wait_for(airport.called.wait(), 10)
    assert {one.event.key for one in airport.flights.collect()} == {"a", "b"}


async def test_what_is_worth_a_turn_is_collected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Half of the places would stand empty if it waited any longer.
    """
    monkeypatch.setattr("outbox.flights.TURN_SECONDS", 60)  # or a slow machine ends the turn
    airport = Airport(concurrency=60)
    airport.flights.collect()
    keys = [str(number) for number in range(60)]
    airport.take_off(*keys)
    await breathe()
    for key in keys[:29]:
        await airport.land(key)
    assert airport.calls == 0
    await airport.land(keys[29])
    assert airport.calls == 1


async def test_the_last_flight_is_collected_at_once() -> None:
    """
    There is nobody to wait for.
    """
    airport = Airport(concurrency=3)
    airport.flights.collect()
    airport.take_off("a")
    await breathe()
    await airport.land("a")
    assert airport.calls == 1


async def test_a_failure_is_collected_at_once(seconds: Callable[[float], None]) -> None:
    """
    It may close the gate, for all the others.
    """
    airport = Airport(concurrency=3)
    airport.flights.collect()
    airport.take_off("a", "b")
    await breathe()
    await airport.land("a", TransientError("busy", "Busy."))
    assert airport.calls == 1
    [flight] = airport.flights.collect()
    assert isinstance(flight.outcome, Retry)
