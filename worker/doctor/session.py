"""
Whether a connection is a session of its own, or a pooler lends it a server for a transaction.

Nothing is guessed. PostgreSQL tells each client the process that serves it; a pooler tells
something else. Behind one, a connection asks for its process again and again while another takes
turns: two connections that are both open have one process, or one has several, only where a
server is lent for a transaction.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import text

from worker import bootstrap
from worker.doctor.finding import broken, warning, well
from worker.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.doctor.finding import Finding

    Client = psycopg.AsyncConnection[Any]

HEARD_SECONDS = 3.0
CONNECT_SECONDS = 5.0

TURNS = 5
"""A pooler with servers to spare may lend each turn another one, but not for long the same."""

Way = Literal["direct", "session pooler", "transaction pooler"]

SAYS: dict[Way, str] = {
    "direct": "none: connections go to the server itself",
    "session pooler": "one in session mode: each connection keeps its server",
    "transaction pooler": "one in transaction mode: made for, but wake-ups need another way",
}


async def pooler() -> Finding:
    """
    What stands between us and the database, on the way of `DATABASE_URL`.
    """
    try:
        way = await way_of(bootstrap.working_connection)
    except (psycopg.Error, OSError, TimeoutError):
        return warning(
            "pooler",
            "a second connection beside the first was not to be had",
            "Allow this user four connections at least: CONNECTION LIMIT, or the pooler's size.",
        )
    return well("pooler", SAYS[way])


async def way_of(connect: Callable[[], Awaitable[Client]]) -> Way:
    """
    How these connections reach the server.

    Raises:
        psycopg.Error, OSError, TimeoutError: one of them could not be opened.
    """
    async with asyncio.timeout(CONNECT_SECONDS), AsyncExitStack() as stack:
        first = await stack.enter_async_context(await connect())
        if await _process(first) == first.info.backend_pid:
            return "direct"
        second = await stack.enter_async_context(await connect())
        known = await _process(first)
        for _ in range(TURNS):
            async with second.transaction():
                # The first one is idle: its server is its own, or free to be lent.
                if await _process(second) == known or await _process(first) != known:
                    return "transaction pooler"
            # Twice: a pooler that lends in turns begins with the one it lent before.
            if await _process(first) != known or await _process(first) != known:
                return "transaction pooler"
        return "session pooler"


async def _process(client: Client) -> int:
    """
    Of the server that runs this statement.
    """
    cursor = await client.execute("SELECT pg_backend_pid()", prepare=False)
    [process] = await cursor.fetchone() or [0]
    return int(process)


async def wakeup(engine: AsyncEngine) -> Finding:
    """
    Send a notification the way a transition does, and expect to hear it.
    """
    channel = f"hlf_doctor_{uuid4().hex}"
    try:
        if await way_of(bootstrap.listening_connection) == "transaction pooler":
            return warning(
                "wake-up",
                "its connection goes through a pooler in transaction mode, where nobody is told",
                "Set LISTEN_DATABASE_URL to the direct address or to the pooler's session mode: "
                "on Supabase port 5432, not 6543. Until then, polling does the work.",
            )
        async with (
            asyncio.timeout(CONNECT_SECONDS + HEARD_SECONDS),
            await bootstrap.listening_connection() as listening,
        ):
            await listening.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
            async with engine.begin() as connection:
                await connection.execute(
                    text("SELECT pg_notify(:channel, '')"), {"channel": channel}
                )
            async for _ in listening.notifies(timeout=HEARD_SECONDS, stop_after=1):
                return well("wake-up", "notifications are heard")
    except SettingsError as error:
        return broken("wake-up", str(error), "Mend LISTEN_DATABASE_URL, or unset it.")
    except (psycopg.Error, OSError, TimeoutError):
        return warning(
            "wake-up",
            "the connection for it cannot be opened",
            "Check LISTEN_DATABASE_URL; until then, polling does the work.",
        )
    return warning(
        "wake-up",
        "no notification was heard, although its connection is a session of its own",
        "Does LISTEN_DATABASE_URL lead to the same database as DATABASE_URL, and not to a "
        "replica? Until it does, polling does the work.",
    )
