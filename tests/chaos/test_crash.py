"""
What a crash of PostgreSQL takes with it, and what nobody may conclude from what is left.
"""

from __future__ import annotations

from uuid import uuid4

from sqlalchemy import text

from tests.chaos import server
from worker import database
from worker.database import LEAVE_RECEIPT, transaction

NUMBER = text("SELECT CAST(CAST(pg_current_xact_id() AS text) AS bigint)")
STATUS = text("SELECT pg_xact_status(CAST(CAST(:number AS text) AS xid8))")


async def test_a_number_that_another_transaction_got_after_a_crash_proves_nothing() -> None:
    """
    The number of a transaction that died with the server is given again, and "committed" then
    speaks of somebody else's. The receipt does not.
    """
    async with server.running(settings={"wal_writer_delay": "10s"}) as postgres:
        engine = database.connect(postgres.url(), application_name="test")
        async with engine.begin() as connection:
            await connection.execute(text("CREATE SCHEMA outbox"))
            await connection.execute(
                text(
                    "CREATE TABLE outbox.commits"
                    " (id uuid PRIMARY KEY, committed_at timestamptz DEFAULT now())"
                )
            )
        receipt = uuid4()
        connection = await engine.connect()
        number = await connection.scalar(NUMBER)
        await connection.execute(LEAVE_RECEIPT, {"id": receipt})
        await postgres.crash()
        await connection.invalidate()
        await connection.close()
        await postgres.start()

        given = 0
        while given < number:
            async with transaction(engine) as connection:
                given = await connection.scalar(NUMBER)

        assert given == number
        async with engine.connect() as connection:
            assert await connection.scalar(STATUS, {"number": number}) == "committed"
        assert not await database._was_committed(engine, receipt)
        await engine.dispose()
