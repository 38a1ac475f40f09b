"""
The two ways of running: until told to stop (`work`), and until nothing is due (`drain`).
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Literal

import structlog
from sqlalchemy.exc import SQLAlchemyError

from outbox import Relay
from outbox.store import prune
from worker.database import forget_receipts
from worker.errors import SyncError
from worker.wakeup import listen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Destination, Drained, Settlement
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


async def work(
    engine: AsyncEngine,
    destination: Destination,
    settings: Settings,
    *,
    connect_listener: Callable[[], Awaitable[Connection]],
) -> None:
    """
    Deliver until SIGTERM or SIGINT; a second one does not wait for flights.
    """
    relay = Relay(engine, destination, poll_seconds=settings.poll_seconds)
    _stop_on_signals(relay)
    log.info(
        "worker.started",
        worker_id=str(relay.worker_id),
        organization_id=str(settings.organization_id),
        concurrency=destination.concurrency,
    )
    # A side task that dies takes the process with it: better restarted than half alive.
    try:
        async with asyncio.TaskGroup() as side_tasks:
            listening = side_tasks.create_task(listen(connect_listener, relay.wake))
            pruning = side_tasks.create_task(_prune_now_and_then(engine))
            await relay.run(grace_seconds=settings.grace_seconds)
            listening.cancel()
            pruning.cancel()
    except ExceptionGroup as group:
        # What a person can mend is said in its own sentence, not as part of a group.
        if isinstance(first := group.exceptions[0], SyncError):
            raise first from None
        raise
    log.info("worker.stopped", **relay.tally)


async def drain(
    engine: AsyncEngine,
    destination: Destination,
    settings: Settings,
    *,
    max_seconds: float | None,
    on_settled: Callable[[Sequence[Settlement]], None] | None = None,
) -> Drained:
    """
    Deliver until nothing is due, the gate closes, or the time is over.
    """
    relay = Relay(engine, destination, poll_seconds=settings.poll_seconds, on_settled=on_settled)
    _stop_on_signals(relay)
    drained = await relay.drain(seconds=max_seconds)
    await _prune(engine)
    return drained


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


def _stop_on_signals(relay: Relay) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, relay.stop)


async def _prune_now_and_then(engine: AsyncEngine) -> None:
    while True:
        await asyncio.sleep(PRUNE_SECONDS)
        await _prune(engine)


async def _prune(engine: AsyncEngine) -> None:
    """
    Forget old history, page by page; what cannot be done now is done next time.
    """
    try:
        async with asyncio.timeout(LONGEST_PRUNE_SECONDS):
            while await _prune_page(engine) >= PRUNE_PAGE:
                pass
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        log.warning("history.prune_failed", error=type(error).__name__)


async def _prune_page(engine: AsyncEngine) -> int:
    async with engine.begin() as connection:
        gone = await prune(connection, keep_days=KEEP_DAYS, limit=PRUNE_PAGE)
        await forget_receipts(connection)
    return gone
