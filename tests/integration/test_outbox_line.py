"""
The line: one connection, held as long as it works, and nothing of it left behind.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from outbox.line import Line, UndoError
from tests.conftest import new_database, until
from worker import database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import QueuePool

NAME = "line under test"

PROCESS = text("SELECT pg_backend_pid()")
HANG = text("SELECT pg_sleep(60)")
NAMELESS = text("INSERT INTO public.organizations (id) VALUES (gen_random_uuid())")
ADD = text("INSERT INTO public.organizations (id, name) VALUES (gen_random_uuid(), 'Added')")


@asynccontextmanager
async def opened(url: str, *, seconds: float = 5) -> AsyncIterator[tuple[Line, list[object]]]:
    """
    A line whose pool has one place, and what was opened for it.
    """
    engine = database.connect(url, application_name=NAME, pool_size=1)
    opens: list[object] = []
    event.listen(engine.sync_engine, "connect", lambda *connection: opens.append(connection))
    line = Line(engine, seconds=seconds)
    yield line, opens
    await line.aclose()
    pool = cast("QueuePool", engine.sync_engine.pool)
    assert pool.checkedout() == 0
    await engine.dispose()


async def process(line: Line) -> int:
    """
    The server's process at its other end.
    """
    async with line.statements() as connection:
        return int((await connection.execute(PROCESS)).scalar_one())


async def added(line: Line) -> int:
    """
    How many rows stayed.
    """
    query = text("SELECT count(*) FROM public.organizations WHERE name = 'Added'")
    async with line.statements() as connection:
        return int((await connection.execute(query)).scalar_one())


async def states(url: str) -> list[str]:
    """
    What the line's connections are doing.
    """
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as admin:
        rows = await admin.execute(
            "SELECT state FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s",
            [NAME],
        )
        return [state for (state,) in await rows.fetchall()]


@pytest.mark.usefixtures("engine")
async def test_a_line_is_one_connection_however_often_it_is_used(database_url: str) -> None:
    """
    For single statements and for transactions alike.
    """
    async with opened(database_url) as (line, opens):
        first = await process(line)
        async with line.transaction() as connection:
            await connection.execute(ADD)
        assert await process(line) == first
        assert await added(line) == 1

    assert len(opens) == 1


@pytest.mark.usefixtures("engine")
async def test_what_is_undone_did_not_happen_and_costs_no_connection(database_url: str) -> None:
    """
    It is a way to say so, not an error.
    """
    async with opened(database_url) as (line, opens):
        async with line.transaction() as connection:
            await connection.execute(ADD)
            raise UndoError
        assert await added(line) == 0

    assert len(opens) == 1


@pytest.mark.usefixtures("engine")
async def test_what_fails_did_not_happen_and_is_raised(database_url: str) -> None:
    """
    The connection is closed, so the server undoes what was begun.
    """
    async with opened(database_url) as (line, opens):

        async def fail() -> None:
            async with line.transaction() as connection:
                await connection.execute(ADD)
                await connection.execute(NAMELESS)

        with pytest.raises(IntegrityError):
            await fail()
        assert await added(line) == 0

    assert len(opens) == 2


@pytest.mark.usefixtures("engine")
async def test_a_line_that_was_cut_while_idle_is_replaced_unnoticed(database_url: str) -> None:
    """
    A server that restarted, or a pooler that tidied up, costs nobody an error.
    """
    async with opened(database_url) as (line, _):
        first = await process(line)
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin:
            await admin.execute("SELECT pg_terminate_backend(%s)", [first])

            async def is_gone() -> bool:
                return not await states(database_url)

            await until(is_gone)
        assert await process(line) != first


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("way", ["its time is over", "it is cancelled"])
async def test_whatever_hangs_is_given_up_whole(database_url: str, way: str) -> None:
    """
    Nothing stays in a transaction, and the one place of the pool is free.
    """
    seconds = 0.3 if way == "its time is over" else 30
    async with opened(database_url, seconds=seconds) as (line, _):

        async def hang() -> None:
            async with line.transaction() as connection:
                await connection.execute(ADD)
                await connection.execute(HANG)

        hanging = asyncio.create_task(hang())
        if way == "it is cancelled":

            async def hangs() -> bool:
                return await states(database_url) == ["active"]

            await until(hangs)
            hanging.cancel()
        with pytest.raises((TimeoutError, asyncio.CancelledError, DBAPIError)):
            await hanging

        assert await added(line) == 0
        assert await states(database_url) == ["idle"]


async def test_a_transaction_sees_what_was_committed_before_each_statement(
    server_url: str,
) -> None:
    """
    Also where the database was told to begin others.
    """
    with new_database(server_url) as url:
        name = sql.Identifier(str(make_url(url).database))
        with psycopg.connect(server_url, autocommit=True) as admin:
            admin.execute(
                sql.SQL(
                    "ALTER DATABASE {} SET default_transaction_isolation = serializable"
                ).format(name)
            )
        async with opened(url) as (line, _), line.transaction() as connection:
            isolation = text("SELECT current_setting('transaction_isolation')")
            assert await connection.scalar(isolation) == "read committed"
