"""
LISTEN: a hint that there is something to claim. Polling is the truth, this only wakes it.

Whoever has committed a transition may notify. Never inside the business transaction: there a
notification queues all commits of the server behind one lock, and costs a third to two thirds
of them (measured; `make bench` shows what it costs outside).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import structlog
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from tenacity import wait_random_exponential

from outbox import RetryPolicy, driver
from worker.database import hinting
from worker.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    Connection = psycopg.AsyncConnection[Any]

log = structlog.get_logger(__name__)

CHANNEL = "hlf_sync"

PATIENCE = RetryPolicy(wait=wait_random_exponential(multiplier=0.5, max=30))
"""How long to leave a failing connection alone: up to 30 s, spread at random."""

SIGN_OF_LIFE_SECONDS = 30.0
"""How often a silent connection is asked whether it is still there."""

LISTEN = sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL))

NOTIFY = text("SELECT pg_notify(:channel, '')")

QUIET_SECONDS = 0.02
"""Between two notifications of a process at least: one wakes the workers for all before it."""

LONGEST_QUIET_SECONDS = 0.08
"""The same of a process that commits without end: whom it wakes has enough to do."""

MANY = 4
"""So many commits between two notifications, and the next one takes its time."""


class Notifier:
    """
    Wakes the workers on behalf of one process, off the path of whoever commits.

    The first commit is told at once, those that follow within `QUIET_SECONDS` together
    afterwards; as long as they are many, more and more time passes before the next ones are.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._untold = 0
        self._telling: asyncio.Task[None] | None = None
        self._quiet: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        """
        Something was committed; returns at once.
        """
        self._untold += 1
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell(), name=CHANNEL)

    async def aclose(self) -> None:
        """
        Return when everything has been told.
        """
        if self._telling is not None:
            if self._quiet is not None:
                self._quiet.cancel()
            await self._telling

    async def _tell(self) -> None:
        quiet = QUIET_SECONDS
        while self._untold:
            quiet = quiet_after(self._untold, before=quiet)
            self._untold = 0  # who commits from now on may not be seen by those who are woken
            await notify(self._engine)
            self._quiet = asyncio.create_task(asyncio.sleep(quiet))
            await asyncio.wait([self._quiet])
        self._telling = None


def quiet_after(commits: int, *, before: float) -> float:
    """
    Seconds until the next notification, after one for so many commits.

    Of how fast they come, not of how long: a steady few are told at once each, also after a moment
    in which two of them came together.

    Args:
        before: how long it was before this one.
    """
    return min(2 * before, LONGEST_QUIET_SECONDS) if commits >= MANY else QUIET_SECONDS


async def notify(engine: AsyncEngine) -> None:
    """
    Wake the workers; that it cannot be done is no error, they poll.
    """
    try:
        async with asyncio.timeout(2), hinting(engine) as connection:
            await driver.execute(connection, NOTIFY, {"channel": CHANNEL})
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        log.info("wakeup.notify_failed", error=type(error).__name__)


async def listen(connect: Callable[[], Awaitable[Connection]], wake: Callable[[], None]) -> None:
    """
    Call `wake` at each notification, and after each reconnection, until cancelled.

    Args:
        connect: opens a direct connection in autocommit mode; through a transaction pooler
            nothing would ever be heard.

    Raises:
        SettingsError: the address to listen at is wrong from the start.
    """
    failures, heard_before = 0, False
    while True:
        try:
            async with await connect() as connection:
                await connection.execute(LISTEN)
                failures, heard_before = 0, True
                await _hear(connection, wake)
        except (psycopg.Error, OSError, TimeoutError, SettingsError) as error:
            # A wrong setting is told at the start; a file that vanished later is a failure
            # like another, and polling goes on.
            if isinstance(error, SettingsError) and not heard_before:
                raise
            failures += 1
            log.info("wakeup.connection_lost", error=type(error).__name__)
        await asyncio.sleep(PATIENCE.delay_after(failures))


async def _hear(connection: Connection, wake: Callable[[], None]) -> None:
    wake()  # something may have come while nobody listened
    while True:
        async for _ in connection.notifies(timeout=SIGN_OF_LIFE_SECONDS):
            wake()
        async with asyncio.timeout(SIGN_OF_LIFE_SECONDS):
            await connection.execute("SELECT 1", prepare=False)
