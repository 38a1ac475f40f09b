"""
LISTEN: a hint that there is something to claim. Polling is the truth, this only wakes it.

Whoever commits a transition may notify (`notify`), after the commit and off its path: a
notification inside the business transaction would queue all commits behind one lock.
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

from outbox import RetryPolicy
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


async def notify(engine: AsyncEngine) -> None:
    """
    Wake the workers; that it cannot be done is no error, they poll.
    """
    try:
        async with asyncio.timeout(2), engine.begin() as connection:
            await connection.execute(NOTIFY, {"channel": CHANNEL})
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
