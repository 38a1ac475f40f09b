"""
The attempts under way in this process: as many at once as the destination takes, and a few
that wait for a place, so that none stands empty until the next turn of the relay.
"""

from __future__ import annotations

import asyncio
import time
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
"""What lands within this time is settled together."""

CANCEL_SECONDS = 1.0
"""How long a handler may take to notice that it was cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flight:
    """
    One attempt, from take-off on.

    Args:
        probe: token, if it probes a half-open gate.
    """

    event: Event
    task: asyncio.Task[Outcome]
    probe: UUID | None


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
        self._call = call
        self._places = asyncio.Semaphore(destination.concurrency)
        self._all: set[Flight] = set()
        self._up = 0
        self._expected = 0
        self._counted = 0
        self._counted_since = self._collected_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def room(self) -> int:
        """
        How many may take off: one for each free place, and for each that will soon be free.
        """
        return self._destination.concurrency + self._expected - self._up

    def take_off(self, event: Event, *, claimed_at: float, probe: UUID | None) -> None:
        """
        Begin an attempt.

        Args:
            claimed_at: monotonic seconds, from before the claim was asked for.
        """
        waits = self._up >= self._destination.concurrency
        task = asyncio.create_task(
            self._fly(event, claimed_at=claimed_at, waits=waits), name=f"attempt {event.id}"
        )
        task.add_done_callback(self._landed)
        self._up += 1
        self._all.add(Flight(event=event, task=task, probe=probe))

    def collect(self) -> list[Flight]:
        """
        The flights that have landed since the last time.
        """
        landed = [flight for flight in self._all if flight.task.done()]
        self._all.difference_update(landed)
        self._collected_at = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._expect(len(landed))
        return landed

    async def cancel(self) -> list[Flight]:
        """
        End what has not landed; returns the flights whose handler does not heed it.
        """
        tasks = {flight.task for flight in self._all}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
        deaf = [flight for flight in self._all if not flight.task.done()]
        self._all.difference_update(deaf)
        return deaf

    async def _fly(self, event: Event, *, claimed_at: float, waits: bool) -> Outcome:
        async with self._places:
            if waits and self.grounded:
                return Deferred(after_seconds=0, code="interrupted")
            outcome = await attempt(event, self._destination, claimed_at=claimed_at)
            if not isinstance(outcome, Delivered | Skipped):
                self.grounded = True  # it may close the gate, and somebody waits for this place
            return outcome

    def _landed(self, task: asyncio.Task[Outcome]) -> None:
        self._up -= 1
        wait = self._collected_at + TURN_SECONDS - time.monotonic()
        if wait <= 0 or not self._up or not _went_well(task):
            self._call()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._call)

    def _expect(self, landed: int) -> None:
        """
        As many are going to land in the next turn as did in the last. One less than there are
        places at most: what is in hand when a process dies is sent once more by another one.
        """
        self._counted += landed
        seconds = self._collected_at - self._counted_since
        if seconds >= TURN_SECONDS:
            share = TURN_SECONDS / seconds
            self._expected = min(round(self._counted * share), self._destination.concurrency - 1)
            self._counted, self._counted_since = 0, self._collected_at


def _went_well(task: asyncio.Task[Outcome]) -> bool:
    """
    What did not may close the gate, so it is not kept back.
    """
    failed = task.cancelled() or task.exception() is not None
    return not failed and isinstance(task.result(), Delivered | Skipped)
