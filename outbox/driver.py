"""
The driver beneath SQLAlchemy, for statements that run for every event, or that somebody waits for.

To go through SQLAlchemy costs a process that was just woken 0.6 ms for each statement, a third of
a claim (measured). What it is for stays: the pool, transactions, and one kind of errors.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

_DIALECT = make_url("postgresql+psycopg://").get_dialect()()


async def execute(
    connection: AsyncConnection, statement: TextClause, parameters: Mapping[str, object]
) -> list[Any]:
    """
    The rows of a statement in the transaction that SQLAlchemy has begun, or would begin for it.

    A cancellation costs the connection, as nobody knows what it still says.

    Args:
        statement: one that stays, as what the driver is given is kept for each.

    Raises:
        DBAPIError: the statement failed. If its connection is dead, it leaves the pool, and so
            does what rests there.
    """
    if not connection.in_transaction():
        await connection.begin()  # or its owner's COMMIT would not be one
    driver = beneath(connection)
    try:
        result = await driver.execute(as_sent(statement), parameters)
        return await result.fetchall() if result.description else []
    except psycopg.Error as error:
        if driver.closed:
            with suppress(SQLAlchemyError):
                await connection.exec_driver_sql("SELECT")  # so that SQLAlchemy sees it, too
        raise DBAPIError.instance(
            str(statement),
            parameters,
            error,
            psycopg.Error,
            hide_parameters=True,
            connection_invalidated=driver.closed,
        ) from error
    except BaseException:
        with suppress(SQLAlchemyError, OSError):
            await connection.invalidate()
        raise


def beneath(connection: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """
    The connection that SQLAlchemy's is made of.
    """
    return cast("Any", connection.sync_connection).connection.driver_connection  # type: ignore[no-any-return]


@cache
def as_sent(statement: TextClause) -> bytes:
    """
    A statement in the driver's own words.
    """
    return str(statement.compile(dialect=_DIALECT)).encode()
