"""
The rows of the tests' database: deleted before each test, because claims need committed rows that
two connections can see, and searched for secrets after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from tests import canaries
from worker.tables import metadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import Table


class Rows:
    """
    All rows of one migrated database, by one connection that lasts.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[tuple[str]] | None = None
        tables = metadata.sorted_tables
        self._sweep = sql.SQL("; ").join(map(_deleting, reversed(tables)))
        self._search = sql.SQL(" UNION ALL ").join(map(_searching, tables))

    def sweep(self) -> None:
        """
        Delete all of them.
        """
        self._run(self._sweep)

    def with_canaries(self) -> Sequence[str]:
        """
        Those that hold a secret, with the names of their tables.
        """
        return [row for (row,) in self._run(self._search)]

    def close(self) -> None:
        """
        End the connection.
        """
        if self._connection:
            self._connection.close()

    def _run(self, query: sql.Composed) -> Iterable[tuple[str]]:
        try:
            return self._try(query)
        except psycopg.OperationalError:  # some tests end every connection there is
            self.close()
            self._connection = None
            return self._try(query)

    def _try(self, query: sql.Composed) -> Iterable[tuple[str]]:
        if self._connection is None:
            self._connection = psycopg.connect(self._url, autocommit=True, prepare_threshold=None)
        cursor = self._connection.execute(query)
        return cursor.fetchall() if cursor.description else ()


def _named(table: Table) -> sql.Identifier:
    return sql.Identifier(str(table.schema), table.name)


def _deleting(table: Table) -> sql.Composed:
    return sql.SQL("DELETE FROM {}").format(_named(table))


def _searching(table: Table) -> sql.Composed:
    return sql.SQL(
        "SELECT {place} || left(to_jsonb(t)::text, 300) FROM {table} AS t"
        " WHERE to_jsonb(t)::text ~ {pattern}"
    ).format(
        place=sql.Literal(f"{table}: "),
        table=_named(table),
        pattern=sql.Literal(canaries.PATTERN),
    )
