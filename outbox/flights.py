"""
The attempts under way in this process: as many at once as the destination takes, and a few
that wait for a place, so that none stands empty until the next turn of the relay.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.attempt import attempt
from outbox.outcome import Deferred, Delivered, Skipped

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from outbox.destination import Destination
    from outbox.event import Event
    from outbox.outcome import Outcome

TURN_SECONDS = 0.05
"""What lands within this time is settled together, unless it is enough for a turn before."""

WORTH_A_TURN = 25
"""So many, or half of the places: a turn costs about as much as they do."""

CANCEL_SECONDS = 1.0
"""How long a handler may take to notice that it was cancelled."""


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """
    One attempt, from take-off on.

    Args:
        claimed_at: monotonic seconds, from before the claim was asked for.
        probe: token, if it probes a half-open gate.
        task: None as long as it waits for a place.
    """

    event: Event
    claimed_at: float
    probe: UUID | None
    task: asyncio.Task[Outcome] | None = None

    @property
    def outcome(self) -> Outcome:
        """
        Of a flight that is over.
        """
        if self.task is None:
            return Deferred(after_seconds=0, code="interrupted")
        if self.task.cancelled():
            # Whether the request got through is unknown; the state will be said again.
            return Deferred(after_seconds=0, code="interrupted", doubtful=True)
        return self.task.result()


class Flights:
    """
    Starts attempts, and hands out those that have landed.

    Args:
        call: told when it is time to collect what has landed.

    Attributes:
        grounded: who waits for a place gives up: the gate closes, or may close, or we stop.
    """

    def __init__(self, destination: Destination, *, call: Callable[[], None]) -> None:
        self.grounded = False
        self._destination = destination
        self._places = destination.concurrency
        self._call = call
        self._up: set[Flight] = set()
        self._waiting: deque[Flight] = deque()
        self._over: list[Flight] = []
        self._expected = 0
        self._counted = 0
        self._counted_since = self._collected_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._up) + len(self._waiting) + len(self._over)

    @property
    def room(self) -> int:
        """
        How many may take off: one for each free place, and for each that will soon be free.
        """
        return self._places + self._expected - len(self._up) - len(self._waiting)

    def take_off(self, event: Event, *, claimed_at: float, probe: UUID | None) -> None:
        """
        Begin an attempt, or let it wait for a place.

        Args:
            claimed_at: monotonic seconds, from before the claim was asked for.
        """
        flight = Flight(event=event, claimed_at=claimed_at, probe=probe)
        if len(self._up) < self._places:
            self._begin(flight)
        else:
            self._waiting.append(flight)

    def collect(self) -> list[Flight]:
        """
        The flights that are over since the last time.
        """
        over, self._over = self._over, []
        self._collected_at = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._expect(sum(flight.task is not None for flight in over))  # the others gave up waiting
        return over

    async def cancel(self) -> list[Flight]:
        """
        End what has not landed; returns the flights whose handler does not heed it.
        """
        self._give_up()
        tasks = [flight.task for flight in self._up if flight.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        deaf = [flight for flight in self._up if flight.task is None or not flight.task.done()]
        self._over += self._up.difference(deaf)
        self._up = set()
        return deaf

    def _begin(self, flight: Flight) -> None:
        flight.task = asyncio.create_task(
            attempt(flight.event, self._destination, claimed_at=flight.claimed_at),
            name=f"attempt {flight.event.id}",
        )
        flight.task.add_done_callback(lambda task: self._landed(flight, task))
        self._up.add(flight)

    def _landed(self, flight: Flight, task: asyncio.Task[Outcome]) -> None:
        if flight not in self._up:
            return  # it was given up as deaf
        self._up.remove(flight)
        self._over.append(flight)
        if not _went_well(task):
            self.grounded = True  # it may close the gate, and somebody waits for this place
        if self.grounded:
            self._give_up()
        elif self._waiting:
            self._begin(self._waiting.popleft())
        wait = self._collected_at + TURN_SECONDS - time.monotonic()
        enough = len(self._over) >= max(WORTH_A_TURN, self._places // 2)
        if enough or wait <= 0 or not self._up or self.grounded:
            self._call()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._call)

    def _give_up(self) -> None:
        self._over += self._waiting
        self._waiting.clear()

    def _expect(self, landed: int) -> None:
        """
        As many are going to land as did in the same time before. One less than there are places
        at most: what is in hand when a process dies is sent once more by another one.
        """
        self._counted += landed
        seconds = self._collected_at - self._counted_since
        if seconds >= TURN_SECONDS:
            share = TURN_SECONDS / seconds
            self._expected = min(round(self._counted * share), self._places - 1)
            self._counted, self._counted_since = 0, self._collected_at


def _went_well(task: asyncio.Task[Outcome]) -> bool:
    failed = task.cancelled() or task.exception() is not None
    return not failed and isinstance(task.result(), Delivered | Skipped)
