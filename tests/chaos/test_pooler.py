"""
Behind a transaction pooler: the outbox works, and the pooler is what it claims to be.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.chaos.pooler import PGBOUNCER, pooled
from tests.chaos.proxy import LoseReply, listening
from tests.conftest import until
from tests.integration.outbox_builders import Outbox, Remote, running
from worker import database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    Client = psycopg.AsyncConnection[Any]

pytestmark = pytest.mark.skipif(
    PGBOUNCER is None, reason="PgBouncer is not installed: no pooler to be tested behind."
)

SERVERS = 3
EVENTS = 300

ADD = text("INSERT INTO public.organizations (id, name) VALUES (gen_random_uuid(), 'Added')")


@pytest.fixture
async def through(engine: AsyncEngine, database_url: str) -> AsyncIterator[str]:
    """
    The address of the tests' database, through a pooler with few connections.
    """
    async with pooled(database_url, servers=SERVERS) as url:
        yield url


async def test_two_relays_behind_a_pooler_deliver_what_producers_enqueue(
    engine: AsyncEngine, through: str
) -> None:
    """
    All of it, once each, with more connections of ours than the pooler has, and no
    statement is looked for on a server that does not know it.
    """
    engines = [
        database.connect(through, application_name=name, pool_size=SERVERS)
        for name in ("producer", "first", "second")
    ]
    outbox, remote = Outbox(engine), Remote()
    producer = Outbox(engines[0])
    producer.organization_id = outbox.organization_id
    relays = [outbox.relay(remote.deliver, engine=one) for one in engines[1:]]

    async def over() -> bool:
        return not await outbox.rows("SELECT 1 FROM outbox.events")

    async def produce(first: int) -> None:
        for number in range(first, EVENTS, SERVERS):
            await producer.enqueue(f"key {number}")

    async with running(*relays):
        await asyncio.gather(*(produce(first) for first in range(SERVERS)))
        await until(over)
    for one in engines:
        await one.dispose()

    ended = await outbox.rows("SELECT key, outcome, attempts FROM outbox.settled")
    assert sorted(row.key for row in ended) == sorted(f"key {n}" for n in range(EVENTS))
    assert {(row.outcome, row.attempts) for row in ended} == {("delivered", 1)}
    assert sorted(remote.about()) == sorted(row.key for row in ended)
    assert sum(relay.tally["delivered"] for relay in relays) == EVENTS
    assert all(relay.tally["delivered"] for relay in relays)


async def test_a_lost_commit_answer_is_looked_up_behind_a_pooler(
    engine: AsyncEngine, through: str
) -> None:
    """
    Whatever server is asked then, it knows.
    """
    url = make_url(through)
    assert url.port is not None
    async with listening("127.0.0.1", url.port) as proxy:
        near = database.connect(
            url.set(port=proxy.port).render_as_string(hide_password=False),
            application_name="near",
            pool_size=2,
        )
        async with database.transaction(near) as connection:
            await connection.execute(ADD)
        proxy.order(LoseReply(after=b"COMMIT"))
        async with database.transaction(near) as connection:
            await connection.execute(ADD)
        await near.dispose()

    assert proxy.used == {LoseReply: 1}
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM public.organizations")) == 2


async def test_more_clients_than_servers_are_served(through: str) -> None:
    """
    A server is a client's for one transaction, so a few serve many.
    """
    async with clients(through, 5 * SERVERS) as many:
        pids = set(await asyncio.gather(*(value(one, "SELECT pg_backend_pid()") for one in many)))

    assert 1 <= len(pids) <= SERVERS


async def test_what_a_session_sets_is_somebody_else_s_afterwards(database_url: str) -> None:
    """
    One server, two clients: the setting stays with the server and not with who made it.
    """
    async with pooled(database_url, servers=1) as url, clients(url, 2) as (one, other):
        await one.execute("SET statement_timeout = '54321ms'")

        assert await value(other, "SHOW statement_timeout") == "54321ms"


async def test_a_prepared_statement_does_not_survive_a_pooler(database_url: str) -> None:
    """
    Which is why ours are prepared on the direct way only: the next server knows nothing of it.
    """
    async with pooled(database_url, servers=2) as url, clients(url, 2) as (one, other):
        one.prepare_threshold = 1
        await one.execute("SELECT 1", prepare=True)
        async with other.transaction():
            assert await value(other, "SELECT count(*) FROM pg_prepared_statements") == 1

            with pytest.raises(psycopg.errors.InvalidSqlStatementName):
                await one.execute("SELECT 1", prepare=True)


@asynccontextmanager
async def clients(url: str, number: int) -> AsyncIterator[list[Client]]:
    """
    So many connections, until the block ends.
    """
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=None)
            )
            for _ in range(number)
        ]


async def value(client: Client, query: str) -> Any:  # noqa: ANN401 (what the query returns)
    """
    The one value of a query.
    """
    row = await (await client.execute(query)).fetchone()
    assert row is not None
    return row[0]
