"""
What the doctor says of the database.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from worker import bootstrap
from worker.coordinator import alerts
from worker.database import reading
from worker.doctor import grants
from worker.doctor.exposure import examine_exposure
from worker.doctor.finding import Finding, broken, unreachable, warning, well
from worker.doctor.rights import STATUS
from worker.doctor.session import pooler, wakeup
from worker.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from worker.doctor.finding import Verdict
    from worker.settings import Settings

OLDEST_POSTGRESQL = 15
TOLERABLE_CLOCK_SECONDS = 60.0

SERVER = text("""
SELECT CAST(current_setting('server_version_num') AS integer) / 10000 AS version,
       CAST(extract(epoch FROM clock_timestamp()) AS double precision) AS clock
""")

ORGANIZATION = text("""
SELECT EXISTS (SELECT FROM public.organizations WHERE id = :organization_id)
""")


async def examine_database(settings: Settings) -> AsyncIterator[Finding]:
    """
    Reach it, and look at all that our statements rely on.
    """
    try:
        async with bootstrap.open_database() as engine:
            yield well("database", "answers and is migrated")
            yield await _server(engine)
            yield await _clock(engine)
            yield await pooler()
            yield await wakeup(engine)
            may = await grants.of_this_user(engine)
            yield may
            yield await grants.of_the_roles(engine)
            async for finding in examine_exposure(engine):
                yield finding
            if may.verdict != "broken":
                yield await _organization(engine, settings)
                async for finding in _backlog(engine, settings):
                    yield finding
    except SyncError as error:
        verdict: Verdict = "unreachable" if error.exit_code == 69 else "broken"  # noqa: PLR2004
        yield Finding(about="database", verdict=verdict, says=str(error), cure="As it says.")
    except (SQLAlchemyError, TimeoutError) as error:
        name = type(error).__name__
        yield unreachable("database", f"stopped answering ({name})", "Run the doctor again.")


async def _server(engine: AsyncEngine) -> Finding:
    async with reading(engine) as connection:
        version = (await connection.execute(SERVER)).one().version
    if version < OLDEST_POSTGRESQL:
        return broken(
            "server",
            f"PostgreSQL {version}",
            f"PostgreSQL {OLDEST_POSTGRESQL} or newer is needed: upgrade the server.",
        )
    return well("server", f"PostgreSQL {version}")


async def _clock(engine: AsyncEngine) -> Finding:
    """
    Leases and waits use the database's clock alone; this one is for logs and tokens.
    """
    async with reading(engine) as connection:
        before = time.time()
        clock = (await connection.execute(SERVER)).one().clock
        seconds = abs(clock - (before + time.time()) / 2)
    if seconds > TOLERABLE_CLOCK_SECONDS:
        return warning(
            "clock",
            f"this machine and the database differ by {seconds:.0f} s",
            "Switch on time synchronisation; nothing goes wrong, but logs will mislead.",
        )
    return well("clock", f"differs from the database's by {seconds:.1f} s")


async def _organization(engine: AsyncEngine, settings: Settings) -> Finding:
    """
    For an id that is nobody's, every other command would find nothing to do.
    """
    parameters = {"organization_id": settings.organization_id}
    async with reading(engine) as connection:
        known = await connection.scalar(ORGANIZATION, parameters)
    if not known:
        return broken(
            "organisation", "the database has none with this id", "Mend HLF_ORGANIZATION_ID."
        )
    return well("organisation", "the database has it")


async def _backlog(engine: AsyncEngine, settings: Settings) -> AsyncIterator[Finding]:
    """
    What waits, if this user may count it: a producer and the page's own user may not.
    """
    if not await grants.may(engine, STATUS):
        return
    async with reading(engine) as connection:
        now = await alerts.status(connection, organization_id=settings.organization_id)
    if now.gate.state != "open":
        yield warning(
            "gate",
            f"{now.gate.state} ({now.gate.reason}): {now.gate.message}",
            "`hlf-sync status` says until when; `hlf-sync resume` opens it.",
        )
    if now.failed:
        yield warning("failures", f"{now.failed} to be seen to", "See `hlf-sync failures`.")
    if now.unaccounted:
        yield warning(
            "portal",
            f"{now.unaccounted} not confirmed, and nothing is on its way",
            "Run `hlf-sync resync`.",
        )
