"""
The database: how to connect, which errors mean a dead connection, and transactions whose
COMMIT is certain.

A lost answer to COMMIT looks the same whether it happened or not, and after a crash of the
server `pg_xact_status` may speak of another transaction that got the same number: one whose
records never reached the disk gives it back. So each transaction leaves a receipt that is
nobody else's, a row of `outbox.commits`, and it is the receipt that is looked for.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import psycopg
from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from typing_extensions import override

from outbox.line import is_silent
from worker.errors import CommitUnknownError, SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from sqlalchemy.engine import Dialect
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

POOL_SIZE = 4
"""Connections at most; the smallest hosted project has 60 for everybody."""

TRANSACTION_SECONDS = 30.0
"""No transaction of ours takes longer: keepalives do not notice a black hole."""

READING_SECONDS = 10.0
"""How long to wait for whatever is only looked at."""

COMMIT_SECONDS = 10.0
"""How long to wait for the answer to COMMIT."""

RESOLVE_SECONDS = 10.0
"""How long to ask what became of a COMMIT whose answer was lost."""

CANCEL_SECONDS = 1.0
"""How long to try to call a statement off before its connection is given up."""

TRUST_SECONDS = 60.0
"""How long a connection that was used is trusted by whoever loses little if it is dead."""

WHOLE_TRANSACTIONS = "whole_transactions"
"""
Execution option of an engine that must not be used statement by statement: what holds on it
is set when a transaction begins.
"""

PREPARE_AFTER = 3
"""Executions on a direct connection, after which the server is to keep a statement parsed."""

NO_USE = {
    "25006",  # a failover made the node read-only: it answers a ping, but is no use
    "0A000",  # a migration changed what a prepared statement returns
    "26000",  # no such prepared statement: there is a pooler after all
    "42P05",  # the same, seen by the next one
}
"""SQLSTATEs of errors that a new connection mends, and nothing else."""

REFUSED = "42501"
"""SQLSTATE of a statement that this user may not run."""


def refusal(error: Exception) -> str | None:
    """
    A sentence for whoever logged in as a user who may not do this; None for any other error.
    """
    original = getattr(error, "orig", None)
    if not isinstance(original, psycopg.Error) or original.sqlstate != REFUSED:
        return None
    return (
        f"The database user may not do this: {original.diag.message_primary}. Log in as one whose "
        'part it is (README, "Who may do what"); `hlf-sync doctor` says whose part this one has.'
    )


NO_ANSWER = "does not answer: check DATABASE_URL, and that the server runs and lets this user in"
NO_PLACE = (
    "has no connection to spare: end something that holds one, or allow more (max_connections, "
    "CONNECTION LIMIT of the role or the database, the pooler's limit)"
)
NOT_UP = "is starting, stopping or recovering, and lets nobody in yet: give it a minute"

_NO_ENTRY = {
    "too many clients already": NO_PLACE,
    "connection slots are reserved": NO_PLACE,
    "too many connections for": NO_PLACE,  # a role, a database
    "no more connections allowed": NO_PLACE,  # PgBouncer
    "max clients reached": NO_PLACE,  # Supabase's pooler, of its sessions
    "max client connections reached": NO_PLACE,  # the same, of its transactions
    "the database system is": NOT_UP,
}
"""By what the server says: libpq keeps no SQLSTATE of a connection that it was refused."""


def no_entry(error: Exception) -> str | None:
    """
    Why a database that does answer lets nobody in now, and what to do, to go after "The database";
    None for any other error, and for what a server says in another language than English.
    """
    original = getattr(error, "orig", error)
    if not isinstance(original, psycopg.OperationalError):
        return None
    said = str(original).lower()
    return next((why for words, why in _NO_ENTRY.items() if words in said), None)


def parse_url(url: str, *, variable: str = "DATABASE_URL") -> URL:
    """
    A libpq or SQLAlchemy address, as one for psycopg.

    Args:
        variable: where it came from, for the sentence.

    Raises:
        SettingsError: it is no PostgreSQL address; it is not repeated, it holds a password.
    """
    refusal = f"{variable}: write it like postgresql://user:password@host:5432/database."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise SettingsError(refusal) from None
    if parsed.drivername.split("+")[0] not in {"postgres", "postgresql"}:
        raise SettingsError(refusal)
    return parsed.set(drivername="postgresql+psycopg")


class Cursor(psycopg.AsyncCursor[Any]):
    """
    A cursor that ends its connection by an error after which that is of no use. Only what it
    executes one by one is looked at, which is all that is done here.
    """

    @override
    async def execute(self, *arguments: Any, **options: Any) -> Self:
        try:
            return await super().execute(*arguments, **options)
        except psycopg.Error as error:
            if error.sqlstate in NO_USE:
                await self.connection.close()
            raise


class Connection(psycopg.AsyncConnection[Any]):
    """
    A connection whose deadlines hold when nothing comes through any more.

    psycopg gives a cancelled statement 5 s to be called off and 5 s more to end. Where even
    the calling off gets no answer, the connection is of no use, and is closed at once.
    """

    @override
    async def _try_cancel(self, *, timeout: float = CANCEL_SECONDS) -> None:
        await self.cancel_safe(timeout=min(timeout, CANCEL_SECONDS))


def connection_arguments(url: URL) -> dict[str, Any]:
    """
    What libpq is to be given, name by name: a URL that SQLAlchemy writes has a plus sign for a
    space, which libpq takes for a plus sign.
    """
    _, arguments = url.get_dialect()().create_connect_args(url)
    return dict(arguments)


def connect(
    url: str, *, application_name: str, pool_size: int = POOL_SIZE, relaying: bool = False
) -> AsyncEngine:
    """
    An engine that survives failovers and works behind a transaction pooler.

    Args:
        relaying: for relays, which try again anyway. For `TRUST_SECONDS` after its last use a
            pooled connection counts as alive without being asked, if nothing came in on it. And
            plans are by index: one that is kept may be of a moment when the queue was empty.
    """
    engine = create_async_engine(
        parse_url(url),
        isolation_level="READ COMMITTED",
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=10,
        pool_recycle=300,
        connect_args={
            "async_creator_fn": partial(_opened, by_index=relaying),
            "application_name": application_name,
            "connect_timeout": 5,
        },
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "checkin", _note_use)
    ask = partial(_ask_whether_alive, engine.dialect, TRUST_SECONDS if relaying else 0)
    event.listen(engine.sync_engine, "checkout", ask)
    return engine


async def _opened(
    conninfo: str = "",
    *,
    by_index: bool,
    **arguments: Any,  # noqa: ANN401 (whatever SQLAlchemy gives to psycopg)
) -> Connection:
    """
    A connection that prepares its statements if it leads to the server itself. A pooler may hand
    the next one to another server, which knows none of ours, and what we set to somebody else.
    """
    connection = await Connection.connect(conninfo, cursor_factory=Cursor, **arguments)
    try:
        await connection.set_autocommit(True)
        connection.prepare_threshold = None
        if await _is_direct(connection):
            connection.prepare_threshold = PREPARE_AFTER
            if by_index:
                await connection.execute("SET enable_seqscan = off")
        await connection.set_autocommit(False)
    except BaseException:
        await connection.close()
        raise
    return connection


async def _is_direct(connection: Connection) -> bool:
    """
    Whether the server that answers is the one that let us in just now: a pooler tells process
    ids of its own, because a request to cancel has to come back to it.
    """
    answer = await connection.execute(WHO_WAS_JUST_STARTED)
    return await answer.fetchone() == (connection.info.backend_pid,)


# Small numbers may be the same by chance; a server that was started for us is another matter.
WHO_WAS_JUST_STARTED = """
SELECT pid
  FROM pg_stat_activity
 WHERE pid = pg_backend_pid() AND backend_start > clock_timestamp() - interval '1 minute'
"""


def _note_use(_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _ask_whether_alive(
    dialect: Dialect,
    trust_seconds: float,
    connection: DBAPIConnection,
    record: ConnectionPoolEntry,
    _proxy: PoolProxiedConnection,
) -> None:
    """
    Ping a connection that comes out of the pool, unless it may be trusted.

    Raises:
        InvalidatePoolError: it is dead, and so is what rests beside it; others are opened.
    """
    used_at = record.info.get("used_at")
    if used_at is None:  # it was opened a moment ago
        return
    if _may_be_lost.get():
        trust_seconds = TRUST_SECONDS
    # A server that ends a connection says why, so a silent one is probably whole.
    if time.monotonic() - used_at < trust_seconds and is_silent(record.driver_connection):
        return
    try:
        alive = dialect.do_ping(connection)
    except psycopg.Error:
        alive = False
    if not alive:
        raise InvalidatePoolError


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """
    A connection for reading, for no longer than a person would wait.

    Each statement stands alone, as READ COMMITTED has it anyway: no round trips around it.

    Raises:
        DBAPIError, TimeoutError: the database does not answer.
    """
    async with asyncio.timeout(READING_SECONDS), single_statements(engine) as connection:
        yield connection


@asynccontextmanager
async def single_statements(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """
    A connection on which each statement is a transaction of its own, unless the engine needs
    whole ones.
    """
    if engine.get_execution_options().get(WHOLE_TRANSACTIONS):
        async with engine.begin() as connection:
            yield connection
        return
    async with engine.connect() as connection:
        yield await connection.execution_options(isolation_level="AUTOCOMMIT")


_may_be_lost: ContextVar[bool] = ContextVar("may_be_lost", default=False)


@asynccontextmanager
async def hinting(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """
    A connection for a statement that may be lost; it is sent without asking first whether a
    connection that was used lately is still alive.
    """
    before = _may_be_lost.set(True)
    try:
        async with single_statements(engine) as connection:
            yield connection
    finally:
        _may_be_lost.reset(before)


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """
    A transaction that either happened or raised: a lost answer to COMMIT is looked up.

    Raises:
        CommitUnknownError: the database stayed away too long to tell.
        DBAPIError, TimeoutError: it did not happen.
    """
    receipt = uuid4()
    async with AsyncExitStack() as stack:
        async with asyncio.timeout(TRANSACTION_SECONDS):
            connection = await stack.enter_async_context(engine.connect())
            work = await connection.begin()
            yield connection
            changed = (await connection.execute(LEAVE_RECEIPT, {"id": receipt})).rowcount
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                await work.commit()
        except (DBAPIError, OSError, TimeoutError) as error:
            await connection.invalidate()
            lost = error
        else:
            return
    if not changed or not await _was_committed(engine, receipt):
        raise lost


LEAVE_RECEIPT = text("""
INSERT INTO outbox.commits (id)
SELECT :id WHERE pg_current_xact_id_if_assigned() IS NOT NULL
""")

# Waits for a transaction that has left this receipt and has not ended yet.
TAKE_RECEIPT = text("INSERT INTO outbox.commits (id) VALUES (:id) ON CONFLICT DO NOTHING")

FORGET_RECEIPTS = text("""
DELETE FROM outbox.commits WHERE committed_at < now() - make_interval(secs => :seconds)
""")

RECEIPT_SECONDS = 3600.0
"""Far longer than anybody looks for one."""


async def _was_committed(engine: AsyncEngine, receipt: UUID) -> bool:
    """
    Ask until there is an answer: whoever can leave the same receipt knows that none is there.
    """
    ends_at = time.monotonic() + RESOLVE_SECONDS
    pause = 0.05
    while (left := ends_at - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(left), engine.connect() as connection:
                taken = await connection.execute(TAKE_RECEIPT, {"id": receipt})
                await connection.rollback()
        except (SQLAlchemyError, OSError, TimeoutError):
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2)
        else:
            return not taken.rowcount
    raise CommitUnknownError(
        "The connection broke while the change was saved, and the database cannot be asked "
        "whether it was. Run the same command again when it is back: that is harmless."
    )


async def forget_receipts(connection: AsyncConnection) -> None:
    """
    Remove receipts that nobody looks for any more, in the caller's transaction.
    """
    await connection.execute(FORGET_RECEIPTS, {"seconds": RECEIPT_SECONDS})
