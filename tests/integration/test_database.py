"""
The database: addresses, dead connections, and a COMMIT whose answer never comes.
"""

from __future__ import annotations

import asyncio
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from tests.chaos.pooler import PGBOUNCER, pooled
from tests.conftest import new_database, until
from tests.factories import NEXT_YEAR, TODAY, World
from worker import database
from worker.certifications import CertificationManagementService
from worker.database import NO_PLACE, NOT_UP, connect, no_entry, parse_url, transaction
from worker.errors import CommitUnknownError, SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

# ------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url",
    [
        "postgres://anna:secret@db.example:5433/hlf",
        "postgresql://anna:secret@db.example:5433/hlf",
        "postgresql+psycopg://anna:secret@db.example:5433/hlf",
        "postgresql+asyncpg://anna:secret@db.example:5433/hlf",
    ],
)
def test_every_spelling_of_a_postgresql_address_is_understood(url: str) -> None:
    """
    Whatever driver somebody wrote, psycopg is ours.
    """
    parsed = parse_url(url)

    assert parsed.drivername == "postgresql+psycopg"
    assert (parsed.username, parsed.password) == ("anna", "secret")
    assert (parsed.host, parsed.port, parsed.database) == ("db.example", 5433, "hlf")


def test_an_address_may_name_a_socket() -> None:
    """
    As libpq writes it: no host before the path, a folder among the options.
    """
    parsed = parse_url("postgresql://postgres@/hlf?host=/run/postgresql")

    assert parsed.host is None
    assert parsed.query["host"] == "/run/postgresql"


def test_options_of_an_address_are_kept() -> None:
    """
    Hosted databases are reached with sslmode and the like.
    """
    assert parse_url("postgres://db.example/hlf?sslmode=require").query["sslmode"] == "require"


def test_a_password_may_hold_any_character() -> None:
    """
    Percent-encoded, as in every address.
    """
    assert parse_url("postgres://anna:p%40ss%2Fword@db.example/hlf").password == "p@ss/word"  # noqa: S105 (made up)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "geheim",
        "host=db.example password=geheim",
        "mysql://anna:geheim@db.example/hlf",
        "sqlite:///geheim.db",
        "https://anna:geheim@db.example",
        "postgresql://anna:geheim@db.example:port/hlf",
        "postgresqlx://anna:geheim@db.example/hlf",
    ],
)
def test_what_is_no_postgresql_address_is_refused_without_being_repeated(url: str) -> None:
    """
    The sentence shows how to write it; what was written may hold a password.
    """
    with pytest.raises(SettingsError) as refusal:
        parse_url(url)

    assert "DATABASE_URL" in str(refusal.value)
    assert "postgresql://user:password@host" in str(refusal.value)
    assert "geheim" not in str(refusal.value)
    assert "geheim" not in "".join(traceback.format_exception(refusal.value))


def test_an_address_does_not_show_its_password() -> None:
    """
    Neither as text nor in a debugger.
    """
    parsed = parse_url("postgres://anna:geheim@db.example/hlf")

    assert "geheim" not in f"{parsed} {parsed!r}"


async def test_an_engine_does_not_show_its_password() -> None:
    """
    Nor does its pool.
    """
    engine = connect("postgres://anna:geheim@db.example/hlf", application_name="test")

    assert "geheim" not in f"{engine!r} {engine.sync_engine!r} {engine.pool!r} {engine.url}"
    await engine.dispose()


async def test_a_failed_statement_does_not_show_its_parameters(engine: AsyncEngine) -> None:
    """
    An error goes into a log; names of people do not.
    """
    async with engine.connect() as connection:
        with pytest.raises(DBAPIError) as error:
            await connection.execute(text("SELECT CAST(:name AS bytea) / 0"), {"name": "somebody"})

    assert "somebody" not in str(error.value)


async def test_an_engine_has_no_more_connections_than_it_was_given(database_url: str) -> None:
    """
    A hosted database has few, and they are everybody's.
    """
    engine = connect(database_url, application_name="test", pool_size=2)
    async with engine.connect(), engine.connect():
        assert engine.pool.status().startswith("Pool size: 2")
        assert "Current Overflow: 0" in engine.pool.status()
        third = asyncio.create_task(_one(engine))
        done, _ = await asyncio.wait([third], timeout=0.1)
        assert not done
    assert await third == 1
    await engine.dispose()


async def _one(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT 1"))).scalar_one())


async def test_the_server_knows_who_is_connected(database_url: str) -> None:
    """
    The name shows in the list of connections.
    """
    engine = connect(database_url, application_name="hlf-sync test")
    async with engine.connect() as connection:
        name = await connection.scalar(text("SELECT current_setting('application_name')"))
    await engine.dispose()

    assert name == "hlf-sync test"


NUMBER = text("SELECT CAST(:number AS int)")


async def kept(connection: AsyncConnection) -> tuple[int, str]:
    """
    How many statements the server keeps for this connection, and whether it may read whole tables.
    """
    for _ in range(10):
        await connection.execute(NUMBER, {"number": 1})
    row = await connection.execute(
        text(
            "SELECT count(*) FILTER (WHERE statement LIKE '%AS int)'),"
            " current_setting('enable_seqscan') FROM pg_prepared_statements"
        )
    )
    return tuple(row.one())


@pytest.mark.parametrize(("relaying", "seqscan"), [(False, "on"), (True, "off")])
async def test_the_server_keeps_what_it_is_often_asked(
    database_url: str, *, relaying: bool, seqscan: str
) -> None:
    """
    On a direct way to it; and for a relay it uses indexes, however empty the queue was once.
    """
    engine = connect(database_url, application_name="test", relaying=relaying)
    async with engine.connect() as connection:
        assert await kept(connection) == (1, seqscan)
    await engine.dispose()


@pytest.mark.skipif(PGBOUNCER is None, reason="PgBouncer is not installed.")
async def test_nothing_is_kept_or_set_through_a_pooler(database_url: str) -> None:
    """
    The next statement is another server's, and what is set stays with this one.
    """
    async with pooled(database_url) as url:
        engine = connect(url, application_name="test", relaying=True)
        async with engine.connect() as connection:
            assert await kept(connection) == (0, "on")
        await engine.dispose()


async def test_a_statement_that_the_server_does_not_keep_ends_the_connection_alone(
    database_url: str,
) -> None:
    """
    As through a pooler that looks like a server; whoever tries again has another connection.
    """
    engine = connect(database_url, application_name="test", pool_size=1)
    async with engine.connect() as connection:
        await kept(connection)
        await connection.execute(text("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"))
        with pytest.raises(DBAPIError) as error:
            await connection.execute(NUMBER, {"number": 2})
    assert error.value.connection_invalidated

    async with engine.connect() as connection:
        assert await connection.scalar(NUMBER, {"number": 3}) == 3
    await engine.dispose()


# ----------------------------------------------------------------------- transactions

ADD = text("INSERT INTO public.organizations (id, name) VALUES (:id, 'Added')")


async def added(engine: AsyncEngine) -> int:
    """
    How many rows stayed.
    """
    async with engine.connect() as connection:
        result = await connection.execute(
            text("SELECT count(*) FROM public.organizations WHERE name = 'Added'")
        )
        return int(result.scalar_one())


async def add(engine: AsyncEngine) -> None:
    """
    A transaction with one row in it.
    """
    async with transaction(engine) as connection:
        await connection.execute(ADD, {"id": uuid4()})


async def test_a_transaction_is_committed_at_its_end(engine: AsyncEngine) -> None:
    """
    Without an error, the row is there.
    """
    await add(engine)

    assert await added(engine) == 1


async def test_a_transaction_is_rolled_back_on_any_error(engine: AsyncEngine) -> None:
    """
    The error is the caller's own, and nothing stays.
    """

    async def fail() -> None:
        async with transaction(engine) as connection:
            await connection.execute(ADD, {"id": uuid4()})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()

    assert await added(engine) == 0


async def test_a_transaction_is_rolled_back_when_its_task_is_cancelled(
    engine: AsyncEngine,
) -> None:
    """
    A process that is told to stop leaves nothing half done, and no connection behind.
    """
    inside = asyncio.Event()

    async def slow() -> None:
        async with transaction(engine) as connection:
            await connection.execute(ADD, {"id": uuid4()})
            inside.set()
            await connection.execute(text("SELECT pg_sleep(60)"))

    task = asyncio.create_task(slow())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await added(engine) == 0


async def test_a_transaction_that_takes_too_long_is_given_up(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whoever waits for a lock that is never released does not wait for ever.
    """
    monkeypatch.setattr(database, "TRANSACTION_SECONDS", 0.1)

    async def sleep() -> None:
        async with transaction(engine) as connection:
            await connection.execute(ADD, {"id": uuid4()})
            await connection.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(TimeoutError):
        await sleep()

    assert await added(engine) == 0


async def test_a_transaction_that_fails_at_its_commit_raises(engine: AsyncEngine) -> None:
    """
    A constraint that is checked at the end is an error like any other.
    """
    async with engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE public.late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        )

    async def add_late() -> None:
        async with transaction(engine) as connection:
            await connection.execute(ADD, {"id": uuid4()})
            await connection.execute(text("INSERT INTO public.late VALUES (1), (1)"))

    try:
        with pytest.raises(IntegrityError):
            await add_late()
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE public.late"))

    assert await added(engine) == 0


# --------------------------------------------------------------------- a broken line

Fault = Literal["lose the answer", "lose the request", "hold the request", "go silent"]


class Line:
    """
    A line to PostgreSQL that breaks once, at the next COMMIT, as ordered.

    Attributes:
        fault: what to do; None lets everything through.
        dead: no connection is let through any more.
        opened: how many connections were made.
        release: ends the waiting of `hold the request`.
    """

    def __init__(self, server_url: str) -> None:
        url = make_url(server_url)
        self._host = str(url.query.get("host") or url.host or "localhost")
        self._port = url.port or int(str(url.query.get("port") or 5432))
        self._tasks: set[asyncio.Task[None]] = set()
        self.fault: Fault | None = None
        self.dead = False
        self.opened = 0
        self.release = asyncio.Event()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        return await asyncio.open_connection(self._host, self._port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """
        One connection, until one of its ends is closed.
        """
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.opened += 1
        try:
            if not self.dead:
                await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end may go at any time, and the test's end ends all
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await self._open()
        try:
            async with asyncio.TaskGroup() as both:
                back = both.create_task(self._copy(server_reader, writer))
                await self._forward(reader, server_reader, server_writer, back)
                back.cancel()
        finally:
            server_writer.close()

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
        back: asyncio.Task[None],
    ) -> None:
        while data := await reader.read(65536):
            fault = self.fault if b"COMMIT\0" in data else None
            if fault is None:
                server_writer.write(data)
                await server_writer.drain()
                continue
            self.fault = None
            back.cancel()
            await asyncio.wait([back])
            if fault in {"lose the answer", "go silent"}:
                server_writer.write(data)
                await server_reader.readexactly(1)  # the answer has come, and goes nowhere
            if fault == "go silent":
                await asyncio.Event().wait()
            if fault == "hold the request":
                await self._hang_up_and_hold(reader)
            return

    async def _hang_up_and_hold(self, reader: asyncio.StreamReader) -> None:
        """
        Gone for the client, while the server has not noticed.
        """
        self.hung_up(reader)
        await self.release.wait()

    @staticmethod
    def hung_up(reader: asyncio.StreamReader) -> None:
        """
        Close the client's end of a connection at once.
        """
        transport = reader._transport  # type: ignore[attr-defined]  # the only way to the other half
        transport.abort()

    async def close(self) -> None:
        """
        End every connection.
        """
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def breakable(server_url: str) -> AsyncIterator[tuple[Line, str]]:
    """
    A line, and the address of its near end.
    """
    line = Line(server_url)
    listener = await asyncio.start_server(line.serve, "127.0.0.1", 0)
    url = make_url(server_url)
    near = url.set(
        host="127.0.0.1",
        port=listener.sockets[0].getsockname()[1],
        query={"sslmode": "disable", "gssencmode": "disable"},
    )
    try:
        yield line, near.render_as_string(hide_password=False)
    finally:
        listener.close()
        await line.close()
        await listener.wait_closed()


@pytest.fixture
async def line(engine: AsyncEngine, database_url: str) -> AsyncIterator[tuple[Line, AsyncEngine]]:
    """
    A line that can be broken, and an engine at its near end; `engine` does not use it.
    """
    async with breakable(database_url) as (line, url):
        near = connect(url, application_name="test", pool_size=2)
        async with near.connect():
            pass  # the first connection of an engine says more than its own part
        yield line, near
        await near.dispose()


async def test_a_lost_answer_to_a_commit_that_happened_is_no_error(
    line: tuple[Line, AsyncEngine], engine: AsyncEngine
) -> None:
    """
    The transaction is looked up over a new connection: it was committed, and is done.
    """
    wire, near = line
    wire.fault = "lose the answer"

    await add(near)

    assert wire.fault is None
    assert wire.opened >= 2
    assert await added(engine) == 1


async def test_a_commit_that_never_arrived_is_an_error_and_changed_nothing(
    line: tuple[Line, AsyncEngine], engine: AsyncEngine
) -> None:
    """
    The transaction is looked up: it was rolled back, and the caller gets the first error.
    """
    wire, near = line
    wire.fault = "lose the request"

    with pytest.raises(OperationalError):
        await add(near)

    assert wire.fault is None
    assert await added(engine) == 0


async def test_a_commit_is_looked_up_until_the_server_noticed_too(
    line: tuple[Line, AsyncEngine], engine: AsyncEngine
) -> None:
    """
    While the old connection lives on, the transaction is neither done nor undone.
    """
    wire, near = line
    wire.fault = "hold the request"
    adding = asyncio.create_task(add(near))
    await until(lambda: wire.opened >= 2)
    done, _ = await asyncio.wait([adding], timeout=0.2)
    assert not done

    wire.release.set()

    with pytest.raises(OperationalError):
        await adding
    assert await added(engine) == 0


async def test_nobody_is_told_a_guess_when_the_database_stays_away(
    line: tuple[Line, AsyncEngine], engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Not known is an answer of its own, with what to do next.
    """
    monkeypatch.setattr(database, "RESOLVE_SECONDS", 0.2)
    wire, near = line
    wire.fault = "lose the answer"

    async def adding() -> None:
        async with transaction(near) as connection:
            await connection.execute(ADD, {"id": uuid4()})
            wire.dead = True

    with pytest.raises(CommitUnknownError, match="Run the same command again") as unknown:
        await adding()

    assert unknown.value.exit_code == 69
    assert await added(engine) == 1


@pytest.mark.timeout(60)
async def test_a_database_that_goes_silent_at_the_commit_is_left_after_a_while(
    line: tuple[Line, AsyncEngine], engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    No answer and no error: the deadline ends it, and the look-up tells that it happened.
    """
    monkeypatch.setattr(database, "COMMIT_SECONDS", 0.2)
    wire, near = line
    wire.fault = "go silent"

    async with asyncio.timeout(30):
        await add(near)

    assert await added(engine) == 1


async def test_a_renewal_whose_commit_was_answered_into_the_void_is_done(
    line: tuple[Line, AsyncEngine], world: World
) -> None:
    """
    What the caller of a transition sees: a transition, once.
    """
    wire, near = line
    mentor = await world.mentor()
    service = CertificationManagementService(
        near, organization_id=world.hlf, timezone="Europe/Oslo"
    )
    wire.fault = "lose the answer"

    done = await service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    await service.aclose()
    assert wire.fault is None
    event = await world.row("SELECT version FROM outbox.events")
    assert event.version == done.version == 1


async def test_a_transaction_that_wrote_nothing_is_not_looked_up(
    line: tuple[Line, AsyncEngine],
) -> None:
    """
    There is nothing to tell apart, so the error stands.
    """
    wire, near = line
    wire.fault = "lose the answer"

    with pytest.raises(OperationalError):
        async with transaction(near) as connection:
            await connection.execute(text("SELECT 1"))

    assert wire.opened == 1


async def test_the_next_transaction_after_a_broken_line_has_a_new_connection(
    line: tuple[Line, AsyncEngine], engine: AsyncEngine
) -> None:
    """
    Nothing that broke goes back to the pool.
    """
    wire, near = line
    wire.fault = "lose the request"
    with pytest.raises(OperationalError):
        await add(near)

    await add(near)

    assert await added(engine) == 1


# --------------------------------------------------------------- who is not let in


TLS_WANTED = (80877103).to_bytes(4)


async def packet(reader: asyncio.StreamReader) -> bytes:
    """
    One of those with which a client begins.
    """
    size = int.from_bytes(await reader.readexactly(4))
    return await reader.readexactly(size - 4)


@asynccontextmanager
async def turning_away(sqlstate: str, said: str) -> AsyncIterator[str]:
    """
    The address of a server that tells everybody this, in PostgreSQL's protocol, and hangs up.
    """
    fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{said}\0\0".encode()
    refusal = b"E" + (4 + len(fields)).to_bytes(4) + fields

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await packet(reader) == TLS_WANTED:
            writer.write(b"N")
        writer.write(refusal)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"postgresql://somebody@127.0.0.1:{port}/hlf"


@pytest.mark.parametrize(
    ("sqlstate", "said", "why"),
    [
        ("53300", "sorry, too many clients already", NO_PLACE),
        ("53300", "remaining connection slots are reserved for roles with SUPERUSER", NO_PLACE),
        ("53300", 'too many connections for role "somebody"', NO_PLACE),
        ("53300", 'too many connections for database "hlf"', NO_PLACE),
        ("08P01", "no more connections allowed (max_client_conn)", NO_PLACE),
        ("XX000", "MaxClientsInSessionMode: max clients reached", NO_PLACE),
        ("XX000", "(EMAXCONN) max client connections reached, limit: 200", NO_PLACE),
        ("57P03", "the database system is starting up", NOT_UP),
        ("57P03", "the database system is not yet accepting connections", NOT_UP),
        ("57P03", "the database system is in recovery mode", NOT_UP),
        ("28P01", 'password authentication failed for user "somebody"', None),
    ],
)
async def test_a_server_that_lets_nobody_in_now_is_told_from_one_that_is_not_there(
    sqlstate: str, said: str, why: str | None
) -> None:
    """
    Whoever reads it has something else to do than to check the address.
    """
    async with turning_away(sqlstate, said) as url:
        engine = connect(url, application_name="test")
        with pytest.raises(OperationalError) as error:
            await added(engine)
        await engine.dispose()

    assert no_entry(error.value) == why


# --------------------------------------------------------------------------- failovers


@pytest.fixture
def own_database(server_url: str) -> Iterator[str]:
    """
    A database that may be made read-only.
    """
    with new_database(server_url) as url:
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("CREATE TABLE public.organizations (id uuid, name text)")
            admin.execute("CREATE SCHEMA outbox")
            admin.execute(
                "CREATE TABLE outbox.commits (id uuid PRIMARY KEY, committed_at timestamptz)"
            )
        yield url


def set_read_only(server_url: str, url: str, *, read_only: bool) -> None:
    """
    What new connections find, as after a failover; those that are open keep what they have.
    """
    name = sql.Identifier(str(make_url(url).database))
    change = sql.SQL(
        "ALTER DATABASE {} SET default_transaction_read_only = on"
        if read_only
        else "ALTER DATABASE {} RESET default_transaction_read_only"
    )
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute(change.format(name))


async def test_a_connection_to_a_read_only_node_is_a_dead_connection(
    server_url: str, own_database: str
) -> None:
    """
    It answers a ping and is no use, so it is thrown away and the next one is the new node's.
    """
    set_read_only(server_url, own_database, read_only=True)
    engine = connect(own_database, application_name="test", pool_size=1)

    with pytest.raises(DBAPIError) as error:
        await add(engine)
    assert error.value.connection_invalidated

    set_read_only(server_url, own_database, read_only=False)
    await add(engine)
    assert await added(engine) == 1
    await engine.dispose()


async def test_all_idle_connections_to_a_read_only_node_are_dropped(
    server_url: str, own_database: str
) -> None:
    """
    One write that failed tells about all of them: none has to fail again.
    """
    set_read_only(server_url, own_database, read_only=True)
    engine = connect(own_database, application_name="test", pool_size=3)
    async with engine.connect(), engine.connect(), engine.connect():
        pass
    with pytest.raises(DBAPIError):
        await add(engine)
    set_read_only(server_url, own_database, read_only=False)

    async with asyncio.TaskGroup() as writers:
        for _ in range(3):
            writers.create_task(add(engine))

    assert await added(engine) == 3
    await engine.dispose()


async def test_an_ordinary_error_leaves_the_connection_alive(engine: AsyncEngine) -> None:
    """
    Only a read-only node is treated so; a wrong statement is not.
    """
    with pytest.raises(DBAPIError) as error:
        async with transaction(engine) as connection:
            await connection.execute(text("SELECT 1 / 0"))

    assert not error.value.connection_invalidated


async def test_a_connection_that_was_ended_while_idle_is_replaced_unnoticed(
    engine: AsyncEngine, database_url: str
) -> None:
    """
    A server that restarted costs nobody an error.
    """
    await add(engine)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as admin:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'test'"
        )

    await add(engine)

    assert await added(engine) == 2
