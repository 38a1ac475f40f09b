"""
The two ways of running: until told to stop (`work`), and until nothing is due (`drain`).

Each destination has a relay of its own, with its own gate and pace: reminders never wait for
Dynamics, nor Dynamics for them.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from outbox import Drained, Observer, Relay
from outbox.store import prune
from worker.database import forget_receipts
from worker.errors import SyncError
from worker.wakeup import listen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Destination
    from worker.coordinator import alerts
    from worker.settings import Settings
    from worker.wakeup import Connection

log = structlog.get_logger(__name__)

KEEP_DAYS = {"delivered": 30, "superseded": 30, "skipped": 30, "dead": 365}
"""How long the history of each outcome is kept; open failures are kept for ever."""

PRUNE_SECONDS = 3600.0
"""From one time to the next."""

PRUNE_PAGE = 1000
"""Rows of one kind that go in one transaction: its locks are held for milliseconds."""

LONGEST_PRUNE_SECONDS = 30.0
"""What is left then goes the next time."""


Verdict = Literal[
    "done", "needs_a_person", "unreachable", "work_left", "configuration", "unexpected"
]
"""How a run ended, by who can do something about it."""

WORST_FIRST: Sequence[Verdict] = (
    "configuration",
    "unreachable",
    "work_left",
    "needs_a_person",
    "unexpected",
    "done",
)


class Monitor(Protocol):
    """
    Who lets the world see how a worker is.
    """

    def done(self, job: str) -> None:
        """
        A job beside the deliveries succeeded just now.
        """

    async def serve(self) -> None:
        """
        Answer whoever asks, until cancelled.
        """


async def work(
    engine: AsyncEngine,
    destinations: Sequence[Destination],
    settings: Settings,
    *,
    connect_listener: Callable[[], Awaitable[Connection]],
    monitor: Monitor | None = None,
) -> None:
    """
    Deliver until SIGTERM or SIGINT; a second one does not wait for flights.
    """
    relays = [
        Relay(engine, destination, poll_seconds=settings.poll_seconds)
        for destination in destinations
    ]
    _stop_on_signals(relays)
    for relay, destination in zip(relays, destinations, strict=True):
        log.info(
            "worker.started",
            worker_id=str(relay.worker_id),
            destination=destination.name,
            organization_id=str(settings.organization_id),
            concurrency=destination.concurrency,
        )

    def wake() -> None:
        for relay in relays:
            relay.wake()

    # A task that dies takes the process with it: better restarted than half alive.
    with _first_sentence():
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(relay.run(grace_seconds=settings.grace_seconds))
                for relay in relays
            ]
            beside = [
                tasks.create_task(listen(connect_listener, wake)),
                tasks.create_task(_prune_now_and_then(engine, monitor)),
            ]
            if monitor is not None:
                beside.append(tasks.create_task(monitor.serve()))
            await asyncio.wait(running)
            for task in beside:
                task.cancel()
    log.info("worker.stopped", **total(relay.tally for relay in relays))


def total(tallies: Iterable[Counter[str]]) -> Counter[str]:
    """
    How many attempts ended how, wherever they went.
    """
    return sum(tallies, Counter())


@contextmanager
def _first_sentence() -> Iterator[None]:
    """
    What a person can mend is said in its own sentence, not as part of a group.
    """
    try:
        yield
    except ExceptionGroup as group:
        if isinstance(first := group.exceptions[0], SyncError):
            raise first from None
        raise


async def drain(
    engine: AsyncEngine,
    destinations: Sequence[Destination],
    settings: Settings,
    *,
    max_seconds: float | None,
    observer: Observer | None = None,
) -> dict[str, Drained]:
    """
    Deliver until nothing is due, the gate closes, or the time is over: for each destination,
    by its name.

    Args:
        observer: of all of them.
    """
    if observer is not None:
        destinations = [replace(destination, observer=observer) for destination in destinations]
    relays = {
        destination.name: Relay(engine, destination, poll_seconds=settings.poll_seconds)
        for destination in destinations
    }
    _stop_on_signals(list(relays.values()))
    # An error of one ends none of the others: what they have in flight still lands.
    ends = await asyncio.gather(
        *(relay.drain(seconds=max_seconds) for relay in relays.values()), return_exceptions=True
    )
    for error in ends:
        if isinstance(error, BaseException):
            raise error
    await _prune(engine)
    return {name: end for name, end in zip(relays, ends, strict=True) if isinstance(end, Drained)}


def judge(drained: Drained, after: alerts.Status) -> Verdict:
    """
    How a drain ended, seen with what it left behind.
    """
    if drained.ended == "gate" and after.waiting:
        match after.gate.reason:
            case "configuration":
                return "configuration"
            case "outage" if not drained.tally["delivered"]:
                return "unreachable"
            case _:
                return "work_left"
    if drained.ended == "time" and after.waiting:
        return "work_left"
    return "needs_a_person" if after.failed else "done"


def judge_reminders(drained: Drained | None, after: alerts.Reminders) -> Verdict:
    """
    The same of reminders. What was given up is told, and needs nobody; what waits for an
    address is nothing that this run could have done.
    """
    if drained is None or drained.ended == "done" or not after.waiting:
        return "done"
    if drained.ended == "gate" and after.gate.reason == "configuration":
        return "configuration"
    return "work_left"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """
    That of several parts which somebody has to see first.
    """
    return min(verdicts, key=WORST_FIRST.index)


def _stop_on_signals(relays: Sequence[Relay]) -> None:
    def stop() -> None:
        for relay in relays:
            relay.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


async def _prune_now_and_then(engine: AsyncEngine, monitor: Monitor | None) -> None:
    while True:
        await asyncio.sleep(PRUNE_SECONDS)
        if await _prune(engine) and monitor is not None:
            monitor.done("prune")


async def _prune(engine: AsyncEngine) -> bool:
    """
    Forget old history, page by page; what cannot be done now is done next time.

    Returns whether everything old is gone.
    """
    try:
        async with asyncio.timeout(LONGEST_PRUNE_SECONDS):
            while await _prune_page(engine) >= PRUNE_PAGE:
                pass
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        log.warning("history.prune_failed", error=type(error).__name__)
        return False
    return True


async def _prune_page(engine: AsyncEngine) -> int:
    async with engine.begin() as connection:
        gone = await prune(connection, keep_days=KEEP_DAYS, limit=PRUNE_PAGE)
        await forget_receipts(connection)
    return gone
