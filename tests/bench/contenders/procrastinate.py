"""
procrastinate, by psycopg 3.

Its best configuration by CPU time: statements without a transaction of their own around them, no
round trip to check a pooled connection before each, jobs deleted when they are done. Together
that saves about a quarter of the CPU seconds; uvloop saves nothing more.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import psycopg
from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool
from typing_extensions import override

from tests.bench.contenders import business
from tests.bench.contenders.python_peer import PythonPeer, main

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from typing import LiteralString

    from tests.bench.contenders.bare import Send
    from tests.bench.contenders.business import Transact

TASK = "hide"

SPARE_CONNECTIONS = 4
"""To fetch, to beat, to look for aborted jobs."""


class Procrastinate(PythonPeer):
    """
    One worker process, as many jobs at once as asked for.
    """

    LEFT: ClassVar[LiteralString] = (
        "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
    )

    @override
    async def make_tables(self, database_url: str) -> None:
        async with _app(database_url).open_async() as app:
            await app.schema_manager.apply_schema_async()

    @override
    async def enqueue(self, database_url: str, batches: Sequence[Sequence[str]]) -> None:
        async with _app(database_url).open_async() as app:
            for batch in batches:
                await app.configure_task(TASK).batch_defer_async(*({"key": key} for key in batch))

    @override
    async def work(self, database_url: str, send: Send, concurrency: int) -> None:
        app = _app(database_url, connections=concurrency + SPARE_CONNECTIONS)
        app.task(name=TASK)(send)
        async with app.open_async():
            await app.run_worker_async(concurrency=concurrency, delete_jobs="successful")

    @override
    @asynccontextmanager
    async def clients(self, database_url: str, count: int) -> AsyncIterator[Sequence[Transact]]:
        async with AsyncExitStack() as stack:
            app = await stack.enter_async_context(_app(database_url).open_async())
            yield [
                _transact(app, await stack.enter_async_context(await _connect(database_url)))
                for _ in range(count)
            ]


CONTENDERS = (Procrastinate(name="procrastinate"),)


def _app(database_url: str, *, connections: int = 2) -> Any:  # noqa: ANN401 (it may be absent)
    connector = PsycopgConnector(
        conninfo=database_url,
        min_size=1,
        max_size=connections,
        configure=_autocommit,
        pool_factory=_pool,
    )
    return App(connector=connector)


def _pool(**options: Any) -> AsyncConnectionPool:  # noqa: ANN401 (the pool's own)
    return AsyncConnectionPool(**options | {"check": None})


async def _autocommit(connection: psycopg.AsyncConnection) -> None:
    await connection.set_autocommit(True)


async def _connect(database_url: str) -> psycopg.AsyncConnection:
    return await psycopg.AsyncConnection.connect(database_url, autocommit=True)


def _transact(app: Any, connection: psycopg.AsyncConnection) -> Transact:  # noqa: ANN401
    task = app.configure_task(TASK, connection=connection)

    async def transact(row: int, key: str | None) -> None:
        async with connection.transaction():
            await connection.execute(business.CERTIFICATION, [row])
            await connection.execute(business.MENTOR, [row])
            if key is not None:
                await task.defer_async(key=key)

    return transact


if __name__ == "__main__":
    main(CONTENDERS)
