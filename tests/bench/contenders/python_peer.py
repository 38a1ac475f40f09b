"""
What the Python peers share: their commands, and the requests they send.

    python -m tests.bench.contenders.procrastinate NAME work … | produce … | tick …
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from uuid import uuid4

import click
import psycopg

from tests.bench.contenders import business
from tests.bench.contenders.bare import senders
from tests.bench.processes import python

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import LiteralString

    from tests.bench.contenders.bare import Library, Send
    from tests.bench.contenders.business import Transact

FILL_AT_ONCE = 5_000
"""Events in one transaction of `fill`."""


@dataclass(kw_only=True)
class PythonPeer(ABC):
    """
    One library in one configuration, used as its documentation shows.

    Args:
        http: what it sends requests with.
    """

    name: str
    http: Library = "httpx"

    LEFT: ClassVar[LiteralString]
    """The statement that counts what is not durably done."""

    @abstractmethod
    async def make_tables(self, database_url: str) -> None:
        """
        In an empty database.
        """

    @abstractmethod
    async def enqueue(self, database_url: str, batches: Sequence[Sequence[str]]) -> None:
        """
        One event for each key, one transaction for each batch of them.
        """

    @abstractmethod
    async def work(self, database_url: str, send: Send, concurrency: int) -> None:
        """
        Deliver until SIGTERM.
        """

    @abstractmethod
    def clients(
        self, database_url: str, count: int
    ) -> AbstractAsyncContextManager[Sequence[Transact]]:
        """
        So many connections and their transactions, until the block ends.
        """

    def missing(self) -> str | None:
        """
        Never: who can import its module has it.
        """
        return None

    def prepare(self, database_url: str) -> None:
        """
        By its own means.
        """
        asyncio.run(self.make_tables(database_url))

    def fill(self, database_url: str, keys: Sequence[str]) -> None:
        """
        By its own means for many at once.
        """
        starts = range(0, len(keys), FILL_AT_ONCE)
        batches = [keys[start : start + FILL_AT_ONCE] for start in starts]
        asyncio.run(self.enqueue(database_url, batches))
        with closing(psycopg.connect(database_url, autocommit=True)) as connection:
            connection.execute("ANALYZE")

    def left(self, database_url: str) -> int:
        """
        What its own tables say.
        """
        with closing(psycopg.connect(database_url)) as connection:
            [count] = connection.execute(self.LEFT).fetchone() or [0]
        return int(count)

    def worker(self, *, concurrency: int) -> list[str]:
        """
        Its own worker.
        """
        return self._command("work", concurrency)

    def producer(self, *, clients: int, seconds: float, slice_seconds: float) -> list[str]:
        """
        Its way to enqueue in a transaction that is open.
        """
        return self._command("produce", clients, seconds, slice_seconds)

    def ticker(self, *, per_second: float, seconds: float) -> list[str]:
        """
        The same; each of them notifies its worker by itself.
        """
        return self._command("tick", per_second, seconds)

    def _command(self, role: str, *arguments: object) -> list[str]:
        return python(type(self).__module__, self.name, role, *arguments)


@asynccontextmanager
async def limited(concurrency: int, library: Library) -> AsyncIterator[Send]:
    """
    Sends so many at once and no more, however many a library may hand over.

    Several clients of httpx share the connections, as they do for `bare:httpx`. A single one with
    all 50 was measured side by side, median of 3: pgqueuer sent 0.53 times as many events a second,
    faststream-outbox:tuned 0.49, procrastinate 0.86. Up to 10 it is a single client anyway.
    """
    free: asyncio.LifoQueue[Send] = asyncio.LifoQueue()

    async def send(key: str) -> None:
        sender = await free.get()
        try:
            await sender(key)
        finally:
            free.put_nowait(sender)

    async with senders(concurrency, library) as every:
        for one in every:
            free.put_nowait(one)
        yield send


def main(contenders: Sequence[PythonPeer]) -> None:
    """
    Be a process of one of them.
    """
    cli(obj={one.name: one for one in contenders})


@click.group()
@click.argument("name")
@click.pass_context
def cli(context: click.Context, name: str) -> None:
    """
    Be one of its processes.
    """
    context.obj = context.obj[name]


@cli.command()
@click.argument("concurrency", type=int)
@click.pass_obj
def work(peer: PythonPeer, concurrency: int) -> None:
    """
    Be its worker.
    """
    asyncio.run(_work(peer, concurrency))


async def _work(peer: PythonPeer, concurrency: int) -> None:
    async with limited(concurrency, peer.http) as send:
        await peer.work(_database_url(), send, concurrency)


@cli.command()
@click.argument("clients", type=int)
@click.argument("seconds", type=float)
@click.argument("slice_seconds", type=float)
@click.pass_obj
def produce(peer: PythonPeer, clients: int, seconds: float, slice_seconds: float) -> None:
    """
    Measure what its enqueue costs.
    """
    asyncio.run(_produce(peer, clients, seconds, slice_seconds))


async def _produce(peer: PythonPeer, clients: int, seconds: float, slice_seconds: float) -> None:
    async with peer.clients(_database_url(), clients) as every:
        await business.produce(every, seconds=seconds, slice_seconds=slice_seconds)


@cli.command()
@click.argument("per_second", type=float)
@click.argument("seconds", type=float)
@click.pass_obj
def tick(peer: PythonPeer, per_second: float, seconds: float) -> None:
    """
    Commit events at a steady pace.
    """
    asyncio.run(_tick(peer, per_second, seconds))


async def _tick(peer: PythonPeer, per_second: float, seconds: float) -> None:
    keys = [str(uuid4()) for _ in range(round(per_second * seconds))]
    async with peer.clients(_database_url(), 1) as [transact]:
        await business.tick(keys, transact=transact, wake=_notified, per_second=per_second)


async def _notified() -> None:
    """
    The transaction has already done it.
    """


def _database_url() -> str:
    return os.environ["BENCH_DATABASE_URL"]
