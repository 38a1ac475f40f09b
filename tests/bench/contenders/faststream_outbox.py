"""
faststream-outbox, by SQLAlchemy and asyncpg, the driver with which it listens.

`:tuned` claims and deletes more rows at once. Measured side by side, at 10 requests at once: 0.45
of the CPU seconds of the default; larger claims, uvloop and doing without FastDepends save nothing
more.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from faststream import FastStream
from faststream_outbox import OutboxBroker, make_outbox_table, outbox_autovacuum_ddl
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine
from typing_extensions import override

from tests.bench.contenders import business
from tests.bench.contenders.python_peer import PythonPeer, main

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from typing import LiteralString

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from tests.bench.contenders.bare import Send
    from tests.bench.contenders.business import Transact

QUEUE = "hide"

CERTIFICATION = text(business.CERTIFICATION.replace("%s", ":row"))
MENTOR = text(business.MENTOR.replace("%s", ":row"))

METADATA = MetaData()
TABLE = make_outbox_table(METADATA)


@dataclass(kw_only=True)
class FastStreamOutbox(PythonPeer):
    """
    One subscriber, as many workers in it as requests at once.

    Args:
        fetched: rows in one claim; its own default is 10.
        unsettled: delivered rows that its workers together keep before they delete them; each
            its own row at once by default.
    """

    fetched: int = 10
    unsettled: int = 0

    LEFT: ClassVar[LiteralString] = "SELECT count(*) FROM outbox"

    @override
    async def make_tables(self, database_url: str) -> None:
        async with _engine(database_url) as engine, engine.begin() as connection:
            await connection.run_sync(METADATA.create_all)
            await connection.execute(text(outbox_autovacuum_ddl(TABLE.name)))

    @override
    async def enqueue(self, database_url: str, batches: Sequence[Sequence[str]]) -> None:
        async with _engine(database_url) as engine:
            for batch in batches:
                async with engine.begin() as connection:
                    await _broker(engine).publish_batch(*batch, queue=QUEUE, session=connection)

    @override
    async def work(self, database_url: str, send: Send, concurrency: int) -> None:
        async def hide(key: str) -> None:
            await send(key)

        async with _engine(database_url, connections=1 + concurrency) as engine:
            broker = _broker(engine)
            subscriber = broker.subscriber(
                QUEUE,
                max_workers=concurrency,
                fetch_batch_size=self.fetched,
                terminal_flush_batch_size=max(1, self.unsettled // concurrency),
            )
            subscriber(hide)
            await FastStream(broker, logger=None).run()

    @override
    @asynccontextmanager
    async def clients(self, database_url: str, count: int) -> AsyncIterator[Sequence[Transact]]:
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(_engine(database_url, connections=count))
            broker = _broker(engine)
            yield [
                _transact(broker, await stack.enter_async_context(engine.connect()))
                for _ in range(count)
            ]


CONTENDERS = (
    FastStreamOutbox(name="faststream-outbox"),
    FastStreamOutbox(name="faststream-outbox:tuned", fetched=100, unsettled=500),
    FastStreamOutbox(
        name="faststream-outbox:tuned:aiohttp", fetched=100, unsettled=500, http="aiohttp"
    ),
)


@asynccontextmanager
async def _engine(database_url: str, *, connections: int = 1) -> AsyncIterator[AsyncEngine]:
    url = database_url.replace("postgresql://", "postgresql+asyncpg://")
    engine = create_async_engine(url, pool_size=connections)
    try:
        yield engine
    finally:
        await engine.dispose()


def _broker(engine: AsyncEngine) -> Any:  # noqa: ANN401 (it may be absent)
    return OutboxBroker(engine, outbox_table=TABLE, logger=None)


def _transact(broker: Any, connection: AsyncConnection) -> Transact:  # noqa: ANN401
    async def transact(row: int, key: str | None) -> None:
        async with connection.begin():
            await connection.execute(CERTIFICATION, {"row": row})
            await connection.execute(MENTOR, {"row": row})
            if key is not None:
                await broker.publish(key, queue=QUEUE, session=connection)

    return transact


if __name__ == "__main__":
    main(CONTENDERS)
