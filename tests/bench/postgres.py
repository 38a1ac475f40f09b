"""
A PostgreSQL of the bench's own, and a fresh database for each turn.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from tests.chaos import server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from typing import LiteralString

    from tests.bench.contender import Contender

DEBIAN = Path("/usr/lib/postgresql/15/bin")

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "max_connections": "200",
    "jit": "off",
}
"""What is not said here is PostgreSQL's own default."""

BUSINESS = Path(__file__).with_name("business.sql")

END_ALL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = %s AND pid <> pg_backend_pid()
"""


def binaries() -> Path:
    """
    Of PostgreSQL 15, as hosted projects run it, if Debian's is here; else the embedded one.
    """
    return DEBIAN if (DEBIAN / "initdb").exists() else server.embedded_binaries()


@dataclass(frozen=True, slots=True, kw_only=True)
class Databases:
    """
    Databases on one server, each with a contender's tables and the business's.
    """

    server: server.Server
    _prepared: set[str] = field(default_factory=set)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @asynccontextmanager
    async def fresh(self, contender: Contender) -> AsyncIterator[str]:
        """
        The URL of a database that only has this contender's tables, until the block ends.
        """
        template = _name(contender)
        if template not in self._prepared:
            await self._prepare(contender, template)
            self._prepared.add(template)
        name = f"bench_{next(self._numbers)}"
        await self._admin(
            "CREATE DATABASE {} TEMPLATE {}", sql.Identifier(name), sql.Identifier(template)
        )
        try:
            yield self.server.url(name)
        finally:
            # It also makes a checkpoint, so that all turns begin alike.
            await self._admin("DROP DATABASE {} WITH (FORCE)", sql.Identifier(name))

    async def _prepare(self, contender: Contender, template: str) -> None:
        url = self.server.url(template)
        await self._admin("DROP DATABASE IF EXISTS {} WITH (FORCE)", sql.Identifier(template))
        await self._admin("CREATE DATABASE {}", sql.Identifier(template))
        await asyncio.to_thread(contender.prepare, url)
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.execute(BUSINESS.read_bytes())
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("VACUUM ANALYZE")
            await connection.execute(END_ALL, [template])

    async def _admin(self, statement: LiteralString, *names: sql.Identifier) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.server.url(), autocommit=True
        ) as connection:
            await connection.execute(sql.SQL(statement).format(*names))


def _name(contender: Contender) -> str:
    return "template_" + "".join(one if one.isalnum() else "_" for one in contender.name)


@asynccontextmanager
async def running() -> AsyncIterator[Databases]:
    """
    The server, until the block ends.
    """
    async with server.running(binaries(), settings=SETTINGS) as one:
        yield Databases(server=one)
