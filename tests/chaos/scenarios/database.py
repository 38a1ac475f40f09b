"""
What else happens to a database: failover, a lack of connections, killed backends, a new schema,
a full disk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING, LiteralString

import psycopg

from tests.chaos.failpoints import Scale
from tests.chaos.ground import opened
from tests.chaos.scenarios.bout import Bout, Result
from tests.chaos.scenarios.load import under_load
from tests.conftest import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.chaos.ground import Ground

STANDING_SECONDS = 1.5
DISK_MEGABYTES = 160
BALLAST_BLOCK = 1 << 20

WORKERS = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'hlf-sync%'"
THROW_OUT: LiteralString = f"SELECT pg_terminate_backend(pid) FROM ({WORKERS}) AS workers"  # noqa: S608 (constants)


async def _read_only(ground: Ground) -> None:
    await _admin(ground, "ALTER SYSTEM SET default_transaction_read_only = on")
    await _admin(ground, "SELECT pg_reload_conf()")
    await asyncio.sleep(STANDING_SECONDS)
    async with await psycopg.AsyncConnection.connect(ground.server.url(), autocommit=True) as admin:
        await admin.execute("SET transaction_read_only = off")
        await admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
        await admin.execute("SELECT pg_reload_conf()")


async def _exhausted(ground: Ground) -> None:
    """
    Take every connection there is, those of the workers first.
    """
    taken: list[psycopg.AsyncConnection[object]] = []
    try:
        await _admin(ground, THROW_OUT)
        ends_at = asyncio.get_running_loop().time() + STANDING_SECONDS
        while asyncio.get_running_loop().time() < ends_at:
            try:
                taken.append(
                    await psycopg.AsyncConnection.connect(
                        ground.server.url("hlf"), connect_timeout=2
                    )
                )
            except psycopg.OperationalError:
                await asyncio.sleep(0.05)
    finally:
        for connection in taken:
            await connection.close()


async def _a_backend_killed(ground: Ground) -> None:
    """
    SIGKILL of one backend: PostgreSQL throws everybody out and recovers.
    """
    pids = await ground.world.rows(WORKERS)
    await ground.engine.dispose()
    pid = ground.luck.choice([row.pid for row in pids])
    ground.server.kill_backend(pid)
    # Before the postmaster has noticed, it lets people in whom it throws out a moment later.
    await until(lambda: not ground.server.has(pid))
    await until(ground.server.answers, seconds=30)


async def _workers_thrown_out(ground: Ground) -> None:
    await _admin(ground, THROW_OUT)


async def _listeners_thrown_out(ground: Ground) -> None:
    await _admin(
        ground,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'hlf-sync listen'",
    )


async def _migrated(ground: Ground) -> None:
    """
    What a next release would do first: expand, with a bound on how long it may wait for locks.
    """
    async with await psycopg.AsyncConnection.connect(
        ground.server.url("hlf"), autocommit=True
    ) as admin:
        await admin.execute("SET lock_timeout = '2s'")
        for change in (
            "ALTER TABLE outbox.events ADD COLUMN IF NOT EXISTS expanded text",
            "CREATE INDEX CONCURRENTLY expanded ON outbox.events (expanded)",
            "ALTER TABLE public.portal_visibility ADD COLUMN IF NOT EXISTS expanded text",
            "DROP INDEX CONCURRENTLY outbox.expanded",
            "ALTER TABLE outbox.events DROP COLUMN expanded",
            "ALTER TABLE public.portal_visibility DROP COLUMN expanded",
        ):
            await _patiently(admin, change)


async def _patiently(
    admin: psycopg.AsyncConnection[object], change: LiteralString, tries: int = 20
) -> None:
    for turn in range(tries):
        try:
            await admin.execute(change)
        except psycopg.errors.LockNotAvailable:
            if turn == tries - 1:
                raise
        else:
            return


KINDS: Mapping[str, Callable[[Ground], Awaitable[None]]] = {
    "read-only node": _read_only,
    "no connection left": _exhausted,
    "a backend killed": _a_backend_killed,
    "workers thrown out": _workers_thrown_out,
    "listeners thrown out": _listeners_thrown_out,
    "schema changed": _migrated,
}


async def run(bout: Bout) -> Result:
    """
    `count` of them, in turn.
    """
    scale = Scale(gate_factor=0.05, database_seconds=4.0)
    async with opened(bout.seed, binaries=bout.binaries, scale=scale) as ground:
        load = await under_load(ground, workers=3)
        for number in range(bout.count):
            name = list(KINDS)[number % len(KINDS)]
            await KINDS[name](ground)
            await ground.engine.dispose()
            await load.marker.delivered(name)
            bout.advance(1)
        return await load.end(bout)


async def run_full_disk(bout: Bout) -> Result:
    """
    Fill the disk `count` times; skipped where no file system can be mounted.
    """
    if os.getuid() or not shutil.which("unshare"):
        return Result(skipped="only root may mount the small file system that is to be filled")
    async with opened(bout.seed, binaries=bout.binaries, disk_megabytes=DISK_MEGABYTES) as ground:
        load = await under_load(ground)
        for _ in range(bout.count):
            ballast = ground.server.data.parent / "ballast"
            await asyncio.to_thread(_fill, ballast)
            await asyncio.sleep(STANDING_SECONDS)
            full = shutil.disk_usage(ballast.parent).free
            ballast.unlink()
            if not await ground.server.answers():
                # PostgreSQL gives up when it cannot write its log ahead; somebody restarts it.
                await ground.server.stop()
                await ground.server.start()
            await ground.engine.dispose()
            await load.marker.delivered("disk full")
            ground.measured["bytes left on the full disk"] = full
            bout.advance(1)
        return await load.end(bout)


def _fill(ballast: os.PathLike[str]) -> None:
    """
    Write until nothing goes any more.
    """
    block = b"\0" * BALLAST_BLOCK
    with open(ballast, "wb", buffering=0) as file:  # noqa: PTH123 (a path through /proc)
        try:
            while True:
                file.write(block)
        except OSError:
            return


async def _admin(ground: Ground, statement: LiteralString) -> None:
    async with await psycopg.AsyncConnection.connect(ground.server.url(), autocommit=True) as admin:
        await admin.execute(statement)
