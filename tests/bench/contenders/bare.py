"""
The limits: what is left when everything that makes a queue is taken away.

`bare:httpx` and `bare:aiohttp` send the same requests for ever and know no database.
`bare:claim100`, also with aiohttp, is the smallest worker there can be: it claims 100 rows, sends
each, deletes them 100 at a time. Nothing is retried, nothing is noticed, a crash loses what was
claimed.

    python -m tests.bench.contenders.bare send … | work … | produce … | tick …
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args
from uuid import uuid4

import aiohttp
import click
import httpx
import psycopg
from yarl import URL

from tests.bench.contenders import business
from tests.bench.processes import python

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    Send = Callable[[str], Awaitable[None]]

Library = Literal["httpx", "aiohttp"]
"""
httpx is what peers are measured with, as their users would write it; aiohttp is what we have, so
that it can be told what of a difference is the library's.
"""

MODULE = "tests.bench.contenders.bare"

SHARD = 10
"""Connections of one client: beyond, httpx's pool gets slower with each."""

HEADERS = {
    "Accept": "application/json",
    "Authorization": "Bearer " + "t" * 1200,
    "Content-Type": "application/json",
    "If-Match": "*",
    "OData-MaxVersion": "4.0",
    "OData-Version": "4.0",
}
BODY = b'{"hlf_portalvisible": false}'

CLAIMED = 100

TABLE = """
CREATE TABLE bare (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key text NOT NULL,
    claimed boolean NOT NULL DEFAULT false
);
CREATE INDEX bare_waiting ON bare (id) WHERE NOT claimed;
"""
INSERT = "INSERT INTO bare (key) VALUES (%s)"
CLAIM = """
UPDATE bare SET claimed = true
 WHERE id IN (SELECT id FROM bare WHERE NOT claimed
               ORDER BY id LIMIT %s FOR NO KEY UPDATE SKIP LOCKED)
RETURNING id, key
"""
SETTLE = "DELETE FROM bare WHERE id = ANY (%s)"


@dataclass(slots=True, kw_only=True)
class BareHttp:
    """
    The HTTP client alone: nobody who sends by it can be faster.
    """

    name: str
    library: Library

    def missing(self) -> str | None:
        """
        Never: who can import this module has both.
        """
        return None

    def prepare(self, database_url: str) -> None:
        """
        It keeps nothing.
        """

    def fill(self, database_url: str, keys: Sequence[str]) -> None:
        """
        It makes up its keys.
        """

    def left(self, database_url: str) -> int:  # noqa: ARG002 (asked of everybody)
        """
        What it sends needs no further doing.
        """
        return 0

    def worker(self, *, concurrency: int) -> list[str]:
        """
        Requests without end.
        """
        return python(MODULE, "send", self.library, concurrency)

    def producer(self, *, clients: int, seconds: float, slice_seconds: float) -> list[str]:
        """
        It has nothing to enqueue with, and is not asked to.
        """
        raise NotImplementedError

    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        """
        It waits for nobody, and is not asked to.
        """
        raise NotImplementedError


@dataclass(slots=True, kw_only=True)
class BareClaim:
    """
    The smallest worker, and one plain INSERT to enqueue.
    """

    name: str
    library: Library

    def missing(self) -> str | None:
        """
        Never: the product needs all of it, too.
        """
        return None

    def prepare(self, database_url: str) -> None:
        """
        One table.
        """
        with psycopg.connect(database_url) as connection:
            connection.execute(TABLE)

    def fill(self, database_url: str, keys: Sequence[str]) -> None:
        """
        One row for each.
        """
        with psycopg.connect(database_url) as connection:
            connection.execute(
                "INSERT INTO bare (key) SELECT key FROM unnest(%s::text[]) AS key", [list(keys)]
            )
            connection.execute("ANALYZE bare")

    def left(self, database_url: str) -> int:
        """
        The rows.
        """
        with psycopg.connect(database_url) as connection:
            [count] = connection.execute("SELECT count(*) FROM bare").fetchone() or [0]
        return int(count)

    def worker(self, *, concurrency: int) -> list[str]:
        """
        Claim, send, delete.
        """
        return python(MODULE, "work", self.library, concurrency)

    def producer(self, *, clients: int, seconds: float, slice_seconds: float) -> list[str]:
        """
        A plain INSERT, by psycopg.
        """
        return python(MODULE, "produce", clients, seconds, slice_seconds)

    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        """
        The same, and a NOTIFY from another connection after each commit.
        """
        return python(MODULE, "tick", per_second, seconds)


CONTENDERS = (
    BareHttp(name="bare:httpx", library="httpx"),
    BareHttp(name="bare:aiohttp", library="aiohttp"),
    BareClaim(name="bare:claim100", library="httpx"),
    BareClaim(name="bare:claim100:aiohttp", library="aiohttp"),
)


@asynccontextmanager
async def senders(number: int, library: Library) -> AsyncIterator[list[Send]]:
    """
    So many senders, each library's in the way that suits it best: at most `SHARD` share a client
    of httpx, and all of them one of aiohttp.
    """
    api = os.environ["BENCH_API_URL"]
    if library == "aiohttp":
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=number),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=HEADERS,
        ) as session:
            yield [_aiohttp_sender(session, api)] * number
        return
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=api, headers=HEADERS, trust_env=False)
            )
            for _ in range(0, number, SHARD)
        ]
        yield [_httpx_sender(clients[one // SHARD]) for one in range(number)]


def _aiohttp_sender(session: aiohttp.ClientSession, api: str) -> Send:
    async def send(key: str) -> None:
        url = URL(f"{api}/api/data/v9.2/contacts({key})", encoded=True)
        async with session.patch(url, data=BODY) as response:
            response.raise_for_status()
            await response.read()

    return send


def _httpx_sender(client: httpx.AsyncClient) -> Send:
    async def send(key: str) -> None:
        response = await client.patch(f"/api/data/v9.2/contacts({key})", content=BODY)
        response.raise_for_status()

    return send


class Worker:
    """
    Claims as long as something is there; sleeps until somebody notifies.
    """

    def __init__(self, connection: psycopg.AsyncConnection) -> None:
        self._connection = connection
        self._claimed: asyncio.Queue[tuple[int, str]] = asyncio.Queue(CLAIMED)
        self._sent: list[int] = []
        self._awake = asyncio.Event()
        self._lock = asyncio.Lock()

    async def listen(self, connection: psycopg.AsyncConnection) -> None:
        """
        Wake at each notification.
        """
        await connection.execute("LISTEN bare")
        async for _ in connection.notifies():
            self._awake.set()

    async def claim(self) -> None:
        """
        Keep the senders supplied.
        """
        while True:
            async with self._lock:
                rows = await (await self._connection.execute(CLAIM, [CLAIMED])).fetchall()
            for row in sorted(rows):
                await self._claimed.put(row)
            if not rows:
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await self._awake.wait()
                self._awake.clear()

    async def send(self, send: Send) -> None:
        """
        Send what is claimed; whoever is the hundredth, or the last, settles for all.
        """
        while True:
            number, key = await self._claimed.get()
            await send(key)
            self._sent.append(number)
            if len(self._sent) >= CLAIMED or self._claimed.empty():
                await self._settle()

    async def _settle(self) -> None:
        async with self._lock:
            settled, self._sent = self._sent, []
            if settled:
                await self._connection.execute(SETTLE, [settled])


@click.group()
def cli() -> None:
    """
    Be one of its processes.
    """


@cli.command()
@click.argument("library", type=click.Choice(get_args(Library)))
@click.argument("concurrency", type=int)
def send(library: Library, concurrency: int) -> None:
    """
    Send for ever.
    """
    asyncio.run(until_terminated(_send(library, concurrency)))


async def _send(library: Library, concurrency: int) -> None:
    async def for_ever(send: Send) -> None:
        while True:
            await send(str(uuid4()))

    async with senders(concurrency, library) as every, asyncio.TaskGroup() as group:
        for one in every:
            group.create_task(for_ever(one))


@cli.command()
@click.argument("library", type=click.Choice(get_args(Library)))
@click.argument("concurrency", type=int)
def work(library: Library, concurrency: int) -> None:
    """
    Be the smallest worker.
    """
    asyncio.run(until_terminated(_work(library, concurrency)))


async def _work(library: Library, concurrency: int) -> None:
    async with (
        await _connect() as listening,
        await _connect() as connection,
        senders(concurrency, library) as every,
        asyncio.TaskGroup() as group,
    ):
        worker = Worker(connection)
        group.create_task(worker.listen(listening))
        group.create_task(worker.claim())
        for one in every:
            group.create_task(worker.send(one))


@cli.command()
@click.argument("clients", type=int)
@click.argument("seconds", type=float)
@click.argument("slice_seconds", type=float)
def produce(clients: int, seconds: float, slice_seconds: float) -> None:
    """
    Measure what an INSERT costs.
    """
    asyncio.run(_produce(clients, seconds, slice_seconds))


async def _produce(clients: int, seconds: float, slice_seconds: float) -> None:
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(await _connect()) for _ in range(clients)]
        await business.produce(
            [_transact(one) for one in connections], seconds=seconds, slice_seconds=slice_seconds
        )


@cli.command()
@click.argument("per_second", type=float)
@click.argument("seconds", type=float)
def tick(per_second: float, seconds: float) -> None:
    """
    Commit rows at a steady pace.
    """
    asyncio.run(_tick(per_second, seconds))


async def _tick(per_second: float, seconds: float) -> None:
    keys = [str(uuid4()) for _ in range(round(per_second * seconds))]
    async with await _connect() as connection, await _connect() as notifying:

        async def wake() -> None:
            await notifying.execute("NOTIFY bare")

        await business.tick(keys, transact=_transact(connection), wake=wake, per_second=per_second)


def _transact(connection: psycopg.AsyncConnection) -> business.Transact:
    async def transact(row: int, key: str | None) -> None:
        async with connection.transaction():
            await connection.execute(business.CERTIFICATION, [row])
            await connection.execute(business.MENTOR, [row])
            if key:
                await connection.execute(INSERT, [key])

    return transact


async def _connect() -> psycopg.AsyncConnection:
    return await psycopg.AsyncConnection.connect(os.environ["BENCH_DATABASE_URL"], autocommit=True)


async def until_terminated(work: Coroutine[None, None, None]) -> None:
    """
    Work until SIGTERM.
    """
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    cli()
