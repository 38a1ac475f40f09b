"""
From one release to the next and back, while mentors expire: the schema goes first and comes
back last, and in between the releases work side by side.

The release before is the last one that was tagged; before there is a tag, the commit before the
newest migration. Where the history is not to be had, these tests say so and are skipped.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from alembic.script import ScriptDirectory

from tests.acceptance.site import NEXT_YEAR, Command, Run, Site, open_site
from tests.conftest import ROOT, alembic_config, new_database, until
from tests.factories import World
from worker import database
from worker.bootstrap import REVISION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.factories import Mentor

RELEASE = ("worker", "outbox", "alembic", "alembic.ini")

NOWHERE = "postgresql://127.0.0.1:9/x"

WAIT = """
    SELECT count(*) = :number FROM pg_locks JOIN pg_database ON pg_database.oid = database
     WHERE NOT granted AND datname = current_database()
"""

LOCK = "LOCK TABLE public.mentor_pauses IN ACCESS SHARE MODE"
LOCK_BEFORE = "LOCK TABLE public.certifications IN ACCESS SHARE MODE"


def _git(*arguments: str) -> bytes | None:
    """
    What git says; None if it has nothing to say.
    """
    if (git := shutil.which("git")) is None:
        return None
    done = subprocess.run([git, *arguments], cwd=ROOT, check=False, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def _commit_before() -> str | None:
    if tag := _git("describe", "--tags", "--abbrev=0", "HEAD^"):
        return tag.decode().strip()
    newest = ScriptDirectory.from_config(alembic_config()).get_revision(REVISION)
    file = Path(newest.path).relative_to(ROOT)
    added = _git("log", "--diff-filter=A", "--format=%H", "-1", "--", str(file))
    return f"{added.decode().strip()}^" if added else None


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A folder with the code of the release before.
    """
    commit = _commit_before()
    archive = commit and _git("archive", commit, *RELEASE)
    if not archive:
        pytest.skip("the history of this checkout does not reach back to the release before")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def _python(*arguments: str, at: Path) -> str:
    """
    Ask the code in a folder.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=at,
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(at)},
    ).stdout.strip()


@pytest.fixture(scope="module")
def revision(before: Path) -> str:
    """
    The migration that the release before needs.
    """
    said = _python(
        "-c", "from worker import bootstrap as b; print(b.REVISION, b.__file__)", at=before
    )
    revision, file = said.split()
    assert Path(file).is_relative_to(before)
    return revision


@pytest.fixture
def address(server_url: str) -> Iterator[str]:
    """
    A database with nothing in it.
    """
    with new_database(server_url) as url:
        yield url


@pytest.fixture
async def site(address: str, before: Path, revision: str) -> AsyncIterator[Site]:
    """
    An installation of the release before.
    """
    await alembic("upgrade", revision, address=address, at=before)
    engine: AsyncEngine = database.connect(address, application_name="test", pool_size=10)
    world = World(engine)
    await world.settle_in()
    async with open_site(world, address) as site:
        yield site
    await engine.dispose()


async def alembic(*arguments: str, address: str, at: Path = ROOT) -> Run:
    """
    Migrate by the scripts in a folder, in another process.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "alembic", *arguments),
        cwd=at,
        env={"DATABASE_URL": address, "PYTHONPATH": str(at)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Run(code=process.returncode, stdout=stdout.decode(), stderr=stderr.decode())


def with_code_of(folder: Path, site: Site) -> Site:
    """
    The same site, with the commands of the release in this folder.
    """
    code = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    return replace(site, environment=site.environment | code, cold=True)


async def stop(worker: Command) -> None:
    """
    End a worker kindly.
    """
    worker.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        _, log = await worker.communicate()
    assert worker.returncode == 0, log.decode()


async def expired(site: Site) -> list[Mentor]:
    """
    Mentors who have run out, and a night run of some release that noticed.
    """
    mentors = await site.world.mentors(30)
    site.link(mentors)
    run = await site.run("expire", "--json")
    assert run.code == 0, run.stderr
    return mentors


async def everybody_is_right(site: Site, hidden: list[Mentor], shown: list[Mentor]) -> None:
    """
    The portal shows what is to be shown, and nobody was given up.
    """
    await site.confirmed()
    assert [site.shows(mentor) for mentor in hidden] == [False] * len(hidden)
    assert [site.shows(mentor) for mentor in shown] == [True] * len(shown)
    assert await site.wrongs() == []
    assert await site.world.rows("SELECT * FROM public.dynamics_sync_failures") == []


async def renewed(site: Site, mentor: Mentor) -> None:
    """
    A mentor who is certified again, by some release.
    """
    run = await site.run("renew", str(mentor.certification_id), "--until", str(NEXT_YEAR))
    assert run.code == 0, run.stderr


async def test_the_schema_goes_first_and_the_releases_work_side_by_side(
    site: Site, address: str, before: Path
) -> None:
    """
    A worker of the release before lives through the migration, delivers beside one of this
    release, and each delivers what the other's transitions wrote.
    """
    old = with_code_of(before, site)
    worker_before = await old.start_worker()
    site.sandbox.adjust(latency_seconds=0.02)

    expiring = asyncio.create_task(expired(old))
    migrated = await alembic("upgrade", "head", address=address)
    mentors = await expiring
    assert migrated.code == 0, migrated.stderr
    await everybody_is_right(site, mentors, [])

    worker = await site.start_worker()
    mentors += await expired(site)
    await renewed(old, mentors[0])
    await everybody_is_right(site, mentors[1:], mentors[:1])

    await stop(worker_before)
    await renewed(old, mentors[1])
    await everybody_is_right(site, mentors[2:], mentors[:2])
    await stop(worker)


async def test_code_and_then_schema_go_back(
    site: Site, address: str, before: Path, revision: str
) -> None:
    """
    The release before works on this release's schema, with what this release left behind; then
    the schema goes back under it, and this release says that it is too new.
    """
    await alembic("upgrade", "head", address=address)
    mentors = await expired(site)  # and nobody delivers it

    old = with_code_of(before, site)
    worker_before = await old.start_worker()
    await everybody_is_right(site, mentors, [])

    back = await alembic("downgrade", revision, address=address)
    assert back.code == 0, back.stderr
    await renewed(old, mentors[0])
    await everybody_is_right(site, mentors[1:], mentors[:1])
    await stop(worker_before)

    if revision != REVISION:
        refused = await site.run("drain")
        assert refused.code == 78
        assert f"this release needs {REVISION}" in refused.stderr


async def test_a_migration_that_is_held_up_gives_way_and_says_so(site: Site, address: str) -> None:
    """
    Somebody reads a table for long: nobody queues behind the migration for longer than its
    patience, and nothing of it stays.
    """
    await alembic("upgrade", "head", address=address)
    async with await psycopg.AsyncConnection.connect(address) as reader:
        await reader.execute(LOCK)
        run = await alembic("downgrade", "base", address=address)

    assert run.code != 0
    assert "held a table that has to be changed, so nothing was migrated" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert await site.world.value("SELECT max(version_num) FROM outbox.alembic_version") == REVISION


async def test_a_migration_that_meets_another_transaction_head_on_begins_again(
    site: Site, address: str
) -> None:
    """
    Each holds a table that the other needs next, and the migration is the one that is refused:
    it comes to wait last, however slow the machine, and so finds the circle when it looks.
    """
    await alembic("upgrade", "head", address=address)
    async with (
        await psycopg.AsyncConnection.connect(address) as other,
        await psycopg.AsyncConnection.connect(address) as doorkeeper,
    ):
        await other.execute("SET deadlock_timeout = '1min'")
        await other.execute(LOCK)
        await doorkeeper.execute(LOCK_BEFORE)
        migrating = asyncio.create_task(alembic("downgrade", "0005", address=address))
        await until(partial(site.world.value, WAIT, number=1))
        meeting = asyncio.create_task(other.execute("SELECT FROM public.organizations"))
        await until(partial(site.world.value, WAIT, number=2))
        await doorkeeper.rollback()
        await meeting
    run = await migrating

    assert run.code == 0, run.stdout + run.stderr
    assert await site.world.value("SELECT max(version_num) FROM outbox.alembic_version") == "0005"


async def test_a_migration_that_takes_too_long_gives_up_and_says_how_to_allow_it(
    site: Site, address: str
) -> None:
    """
    A table so large that a step of the migration takes longer than it may.
    """
    await alembic("upgrade", "head", address=address)
    # A trigger in the migration's way stands for a table that takes hours.
    await site.world.execute(
        "CREATE FUNCTION public.slow() RETURNS event_trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_sleep(30); END'"
    )
    await site.world.execute(
        "CREATE EVENT TRIGGER slow ON ddl_command_start EXECUTE FUNCTION public.slow()"
    )
    try:
        run = await alembic("-x", "statement_seconds=1", "downgrade", "base", address=address)
    finally:
        await site.world.execute("DROP EVENT TRIGGER slow")

    assert run.code != 0
    assert "took longer than it may, so nothing was migrated" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize("seconds", ["soon", "0", "nan", "1e9", ""])
async def test_a_limit_that_is_none_is_refused(seconds: str) -> None:
    """
    With a sentence, before anybody is connected to.
    """
    run = await alembic("-x", f"statement_seconds={seconds}", "upgrade", "head", address=NOWHERE)

    assert run.code != 0
    assert "write a number of seconds from 1 to 86400" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
