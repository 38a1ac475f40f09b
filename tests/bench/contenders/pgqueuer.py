"""
pgqueuer, by asyncpg, which is what its own documentation begins with.

Psycopg was tried: its one connection is so busy listening that next to nothing is delivered. A
pool and uvloop were tried: no faster.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import asyncpg
from pgqueuer import PgQueuer, Queries
from typing_extensions import override

from tests.bench.contenders import business
from tests.bench.contenders.python_peer import PythonPeer, main

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from typing import LiteralString

    from tests.bench.contenders.bare import Send
    from tests.bench.contenders.business import Transact

ENTRYPOINT = "hide"

CERTIFICATION = business.CERTIFICATION.replace("%s", "$1")
MENTOR = business.MENTOR.replace("%s", "$1")

CLAIMED_PER_REQUEST = 4
"""Jobs in hand for each request at once, so that none waits for the next claim."""


@dataclass(kw_only=True)
class Pgqueuer(PythonPeer):
    """
    One worker process.

    Args:
        batch: jobs in one claim, and in one settlement.
    """

    batch: int = 10

    LEFT: ClassVar[LiteralString] = "SELECT count(*) FROM pgqueuer"

    @override
    async def make_tables(self, database_url: str) -> None:
        async with _connected(database_url) as connection:
            await Queries.from_asyncpg_connection(connection).install()

    @override
    async def enqueue(self, database_url: str, batches: Sequence[Sequence[str]]) -> None:
        async with _connected(database_url) as connection:
            queries = Queries.from_asyncpg_connection(connection)
            for batch in batches:
                count = len(batch)
                await queries.enqueue(
                    [ENTRYPOINT] * count, [key.encode() for key in batch], [0] * count
                )

    @override
    async def work(self, database_url: str, send: Send, concurrency: int) -> None:
        async def hide(job: Any) -> None:  # noqa: ANN401 (it may be absent)
            await send(job.payload.decode())

        async with _connected(database_url) as connection:
            queuer = PgQueuer.from_asyncpg_connection(connection)
            queuer.entrypoint(ENTRYPOINT)(hide)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queuer.shutdown.set)
            claimed = max(2 * self.batch, CLAIMED_PER_REQUEST * concurrency)
            await queuer.run(batch_size=self.batch, max_concurrent_tasks=claimed)

    @override
    @asynccontextmanager
    async def clients(self, database_url: str, count: int) -> AsyncIterator[Sequence[Transact]]:
        async with AsyncExitStack() as stack:
            yield [
                _transact(await stack.enter_async_context(_connected(database_url)))
                for _ in range(count)
            ]


CONTENDERS = (
    Pgqueuer(name="pgqueuer"),
    Pgqueuer(name="pgqueuer:b100", batch=100),
    Pgqueuer(name="pgqueuer:aiohttp", http="aiohttp"),
    Pgqueuer(name="pgqueuer:b100:aiohttp", batch=100, http="aiohttp"),
)


@asynccontextmanager
async def _connected(database_url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(database_url)
    try:
        yield connection
    finally:
        await connection.close()


def _transact(connection: Any) -> Transact:  # noqa: ANN401 (it may be absent)
    queries = Queries.from_asyncpg_connection(connection)

    async def transact(row: int, key: str | None) -> None:
        async with connection.transaction():
            await connection.execute(CERTIFICATION, row)
            await connection.execute(MENTOR, row)
            if key is not None:
                await queries.enqueue(ENTRYPOINT, key.encode())

    return transact


if __name__ == "__main__":
    main(CONTENDERS)
