"""
Past SQLAlchemy, and still in its transaction and with its errors.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from outbox import driver
from tests.conftest import until

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine

ADD = text("INSERT INTO public.organizations (id, name) VALUES (gen_random_uuid(), :name)")
NAMELESS = text(
    "INSERT INTO public.organizations (name) SELECT NULL WHERE CAST(:said AS text) > ''"
)
COUNT = text("SELECT count(*) FROM public.organizations WHERE name = 'Added'")
SAY = text("SELECT CAST(:said AS text), '100 %', '12:30'")
UNREADABLE = text("SELECT CAST('infinity' AS timestamptz)")
HANG = text("SELECT pg_sleep(60)")
END_MYSELF = text("SELECT pg_terminate_backend(pg_backend_pid())")
BARRED_BY_THE_NODE = text(
    "DO $$ BEGIN RAISE EXCEPTION 'read-only' USING ERRCODE = 'read_only_sql_transaction'; END $$"
)


async def added(engine: AsyncEngine) -> int:
    """
    How many rows stayed.
    """
    async with engine.connect() as connection:
        return int((await connection.execute(COUNT)).scalar_one())


async def test_a_statement_is_given_on_as_it_is_written(engine: AsyncEngine) -> None:
    """
    What means something to the driver or to SQLAlchemy means nothing more.
    """
    async with engine.begin() as connection:
        said = await driver.execute(connection, SAY, {"said": "%(said)s :said"})
        assert said == [("%(said)s :said", "100 %", "12:30")]


async def test_what_is_executed_first_is_part_of_the_transaction(engine: AsyncEngine) -> None:
    """
    One that nobody has begun in so many words, too.
    """
    async with engine.connect() as connection:
        await driver.execute(connection, ADD, {"name": "Added"})
        await connection.rollback()
        assert await added(engine) == 0
        await driver.execute(connection, ADD, {"name": "Added"})
        await connection.commit()

    assert await added(engine) == 1


async def test_what_fails_is_an_error_of_sqlalchemys_without_what_was_sent(
    engine: AsyncEngine,
) -> None:
    """
    The transaction is undone, and the connection goes on.
    """
    async with engine.connect() as connection:
        await driver.execute(connection, ADD, {"name": "Added"})
        with pytest.raises(IntegrityError) as raised:
            await driver.execute(
                connection,
                NAMELESS,
                {"said": "what was sent"},
            )
        assert not raised.value.connection_invalidated
        assert "what was sent" not in str(raised.value)
        await connection.rollback()
        [[said, *_]] = await driver.execute(connection, SAY, {"said": "still here"})
        assert said == "still here"

    assert await added(engine) == 0


async def test_a_row_that_cannot_be_read_is_an_error_of_sqlalchemys(engine: AsyncEngine) -> None:
    """
    Whatever is wrong with what somebody wrote into the table by hand.
    """
    async with engine.connect() as connection:
        with pytest.raises(DataError):
            await driver.execute(connection, UNREADABLE, {})


async def test_a_statement_that_is_cancelled_takes_its_connection_along(
    engine: AsyncEngine,
) -> None:
    """
    And it is cancelled, whatever becomes of the connection.
    """
    async with engine.connect() as connection:
        used = driver.beneath(connection)
        hanging = asyncio.create_task(driver.execute(connection, HANG, {}))
        await until(lambda: used.pgconn.transaction_status == TransactionStatus.ACTIVE)
        hanging.cancel()
        await asyncio.wait([hanging])
        assert hanging.cancelled()
        assert used.closed
        assert connection.invalidated


@pytest.mark.parametrize("death", [END_MYSELF, BARRED_BY_THE_NODE])
async def test_a_connection_that_died_of_a_statement_takes_along_those_that_rest(
    engine: AsyncEngine, death: TextClause
) -> None:
    """
    Whether the server ended it, or we do because it is of no more use: neither are the others.
    """
    async with engine.connect() as connection:
        async with engine.connect() as beside:
            resting = driver.beneath(beside)
        dying = driver.beneath(connection)
        with pytest.raises(DBAPIError) as raised:
            await driver.execute(connection, death, {})
        assert raised.value.connection_invalidated
        assert connection.invalidated

    async with engine.connect() as connection:
        assert driver.beneath(connection) not in {dying, resting}
        await driver.execute(connection, SAY, {"said": "hello"})
