"""
The doctor: looks at everything a run depends on; each finding comes with its cure.

Nothing is changed, and nothing but a token is asked of Microsoft.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from outbox.errors import ConfigurationError, DeliveryError
from worker import bootstrap
from worker.coordinator import alerts
from worker.database import reading
from worker.errors import SettingsError, SyncError
from worker.settings import DynamicsSettings, EdgeSettings, Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

OLDEST_POSTGRESQL = 15
TOLERABLE_CLOCK_SECONDS = 60.0
HEARD_SECONDS = 3.0
CONNECT_SECONDS = 5.0

Verdict = Literal["ok", "warning", "broken", "unreachable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """
    One thing that was looked at.

    Args:
        says: what was found, one sentence.
        cure: what to do about it; "" if it is well.
    """

    about: str
    verdict: Verdict
    says: str
    cure: str = ""


async def examine() -> AsyncIterator[Finding]:
    """
    Look at everything, in the order in which a run would meet it.
    """
    try:
        settings = Settings.load()
    except SettingsError as error:
        yield _broken("settings", str(error), "Set it; the README lists every setting.")
        return
    yield _well("settings", f"organisation {settings.organization_id}, {settings.timezone}")
    async for finding in _examine_database(settings):
        yield finding
    over = _examine_edge(settings) if settings.transport == "edge" else _examine_dynamics()
    async for finding in over:
        yield finding
    async for finding in _examine_reminders(settings):
        yield finding


def _well(about: str, says: str) -> Finding:
    return Finding(about=about, verdict="ok", says=says)


def _broken(about: str, says: str, cure: str) -> Finding:
    return Finding(about=about, verdict="broken", says=says, cure=cure)


def _unreachable(about: str, says: str, cure: str) -> Finding:
    return Finding(about=about, verdict="unreachable", says=says, cure=cure)


def _warning(about: str, says: str, cure: str) -> Finding:
    return Finding(about=about, verdict="warning", says=says, cure=cure)


# ------------------------------------------------------------------------------ database

SERVER = text("""
SELECT CAST(current_setting('server_version_num') AS integer) / 10000 AS version,
       CAST(extract(epoch FROM clock_timestamp()) AS double precision) AS clock
""")

MISSING_GRANTS = text("""
SELECT privilege || ' on ' || needed.table_name AS missing
  FROM (VALUES ('public.organizations', 'SELECT'),
               ('public.mentors', 'SELECT'),
               ('public.certifications', 'SELECT,UPDATE'),
               ('public.mentor_pauses', 'SELECT,INSERT,UPDATE'),
               ('public.portal_visibility', 'SELECT,INSERT,UPDATE'),
               ('public.portal_confirmations', 'SELECT,INSERT,UPDATE'),
               ('public.dynamics_sync_failures', 'SELECT,INSERT,UPDATE'),
               ('public.cert_notification_log', 'SELECT,INSERT,UPDATE'),
               ('outbox.events', 'SELECT,INSERT,UPDATE,DELETE'),
               ('outbox.settled', 'SELECT,INSERT,DELETE'),
               ('outbox.gates', 'SELECT,INSERT,UPDATE'),
               ('outbox.doubts', 'SELECT,INSERT,UPDATE,DELETE'),
               ('outbox.nightly_runs', 'SELECT,INSERT,UPDATE,DELETE'))
           AS needed (table_name, wanted),
       unnest(string_to_array(needed.wanted, ',')) AS privilege
 WHERE NOT has_table_privilege(needed.table_name, privilege)
 ORDER BY 1
""")


UNSEEN = text("""
SELECT CAST(CAST(tables.oid AS regclass) AS text)
  FROM pg_class AS tables
 WHERE relnamespace IN (CAST('public' AS regnamespace), CAST('outbox' AS regnamespace))
   AND relname IN ('organizations', 'mentors', 'certifications', 'mentor_pauses',
                   'portal_visibility', 'portal_confirmations', 'dynamics_sync_failures',
                    'cert_notification_log', 'events', 'settled', 'gates', 'doubts', 'nightly_runs')
   AND row_security_active(oid)
   AND NOT EXISTS (SELECT FROM pg_policy, unnest(polroles) AS role
                    WHERE polrelid = tables.oid
                      AND (role = 0 OR pg_has_role(role, 'USAGE')))
 ORDER BY 1
""")

ORGANIZATION = text("""
SELECT EXISTS (SELECT FROM public.organizations WHERE id = :organization_id)
""")


async def _examine_database(settings: Settings) -> AsyncIterator[Finding]:
    try:
        async with bootstrap.open_database() as engine:
            yield _well("database", "answers and is migrated")
            yield await _server(engine)
            yield await _clock(engine)
            yield await _wakeup(engine)
            grants = await _grants(engine)
            yield grants
            if grants.verdict == "ok":
                yield await _organization(engine, settings)
                async for finding in _backlog(engine, settings):
                    yield finding
    except SyncError as error:
        verdict: Verdict = "unreachable" if error.exit_code == 69 else "broken"  # noqa: PLR2004
        yield Finding(about="database", verdict=verdict, says=str(error), cure="As it says.")
    except (SQLAlchemyError, TimeoutError) as error:
        name = type(error).__name__
        yield _unreachable("database", f"stopped answering ({name})", "Run the doctor again.")


async def _server(engine: AsyncEngine) -> Finding:
    async with reading(engine) as connection:
        version = (await connection.execute(SERVER)).one().version
    if version < OLDEST_POSTGRESQL:
        return _broken(
            "server",
            f"PostgreSQL {version}",
            f"PostgreSQL {OLDEST_POSTGRESQL} or newer is needed: upgrade the server.",
        )
    return _well("server", f"PostgreSQL {version}")


async def _clock(engine: AsyncEngine) -> Finding:
    """
    Leases and waits use the database's clock alone; this one is for logs and tokens.
    """
    async with reading(engine) as connection:
        before = time.time()
        clock = (await connection.execute(SERVER)).one().clock
        seconds = abs(clock - (before + time.time()) / 2)
    if seconds > TOLERABLE_CLOCK_SECONDS:
        return _warning(
            "clock",
            f"this machine and the database differ by {seconds:.0f} s",
            "Switch on time synchronisation; nothing goes wrong, but logs will mislead.",
        )
    return _well("clock", f"differs from the database's by {seconds:.1f} s")


async def _grants(engine: AsyncEngine) -> Finding:
    try:
        async with reading(engine) as connection:
            missing = list((await connection.execute(MISSING_GRANTS)).scalars())
            unseen = list((await connection.execute(UNSEEN)).scalars())
    except DBAPIError:
        return _broken(
            "grants", "a table or schema cannot be seen", "Run the migrations as this user."
        )
    if missing:
        return _broken("grants", "missing: " + ", ".join(missing), "Grant these to this user.")
    if unseen:
        return _broken(
            "grants",
            "row level security hides every row of " + ", ".join(unseen),
            "Run the migrations as this user, give it BYPASSRLS, or write policies for it.",
        )
    return _well("grants", "this user may do all that is needed")


async def _organization(engine: AsyncEngine, settings: Settings) -> Finding:
    """
    For an id that is nobody's, every other command would find nothing to do.
    """
    parameters = {"organization_id": settings.organization_id}
    async with reading(engine) as connection:
        known = await connection.scalar(ORGANIZATION, parameters)
    if not known:
        return _broken(
            "organisation", "the database has none with this id", "Mend HLF_ORGANIZATION_ID."
        )
    return _well("organisation", "the database has it")


async def _wakeup(engine: AsyncEngine) -> Finding:
    """
    Send a notification the way a transition does, and expect to hear it.
    """
    channel = f"hlf_doctor_{uuid4().hex}"
    try:
        async with (
            asyncio.timeout(CONNECT_SECONDS + HEARD_SECONDS),
            await bootstrap.listening_connection() as listening,
        ):
            await listening.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
            async with engine.begin() as connection:
                await connection.execute(
                    text("SELECT pg_notify(:channel, '')"), {"channel": channel}
                )
            async for _ in listening.notifies(timeout=HEARD_SECONDS, stop_after=1):
                return _well("wake-up", "notifications are heard")
    except SettingsError as error:
        return _broken("wake-up", str(error), "Mend LISTEN_DATABASE_URL, or unset it.")
    except (psycopg.Error, OSError, TimeoutError):
        return _warning(
            "wake-up",
            "the connection for it cannot be opened",
            "Check LISTEN_DATABASE_URL; until then, polling does the work.",
        )
    return _warning(
        "wake-up",
        "no notification was heard: a transaction pooler seems to be in between",
        "Set LISTEN_DATABASE_URL to a direct connection; until then, polling does the work.",
    )


async def _backlog(engine: AsyncEngine, settings: Settings) -> AsyncIterator[Finding]:
    async with reading(engine) as connection:
        now = await alerts.status(connection, organization_id=settings.organization_id)
    if now.gate.state != "open":
        yield _warning(
            "gate",
            f"{now.gate.state} ({now.gate.reason}): {now.gate.message}",
            "`hlf-sync status` says until when; `hlf-sync resume` opens it.",
        )
    if now.failed:
        yield _warning("failures", f"{now.failed} to be seen to", "See `hlf-sync failures`.")
    if now.unaccounted:
        yield _warning(
            "portal",
            f"{now.unaccounted} not confirmed, and nothing is on its way",
            "Run `hlf-sync resync`.",
        )


# ------------------------------------------------------------------------------ Dynamics


async def _examine_dynamics() -> AsyncIterator[Finding]:
    async with AsyncExitStack() as stack:
        try:
            where = DynamicsSettings.load()
            bootstrap.dynamics_target(where)
            auth = await stack.enter_async_context(bootstrap.open_authentication())
        except SettingsError as error:
            yield _broken("Dynamics settings", str(error), "Set it; the README lists them.")
            return
        yield _well("Dynamics settings", f"{where.operation} at {where.url}")
        yield await _reach(where.url, about="Dynamics", variable="HLF_DYNAMICS_URL")
        try:
            await auth.prove()
        except ConfigurationError as error:
            yield _broken("token", error.message, "Check tenant, client id and secret in Entra ID.")
        except DeliveryError as error:
            yield _unreachable("token", error.message, "Check HLF_DYNAMICS_AUTHORITY and network.")
        else:
            yield _well("token", f"{where.authority} gave one")


async def _examine_reminders(settings: Settings) -> AsyncIterator[Finding]:
    if not settings.reminder_url:
        yield _well("reminders' settings", "no HLF_REMINDER_URL: reminders wait")
        return
    try:
        async with bootstrap.open_webhook(settings):
            days = ", ".join(map(str, settings.reminder_days))
            yield _well("reminders' settings", f"{days} days before the end, signed")
    except SettingsError as error:
        yield _broken("reminders' settings", str(error), "Set it; the README lists them.")
        return
    yield await _reach(settings.reminder_url, about="webhook", variable="HLF_REMINDER_URL")


async def _examine_edge(settings: Settings) -> AsyncIterator[Finding]:
    """
    The function is asked whether it takes our key, has our target and can get a token.
    """
    async with AsyncExitStack() as stack:
        try:
            where = EdgeSettings.load()
            edge = await stack.enter_async_context(bootstrap.open_edge(settings))
        except SettingsError as error:
            yield _broken("Dynamics settings", str(error), "Set it; the README lists them.")
            return
        yield _well("Dynamics settings", f"{where.operation} at {where.url}, by {where.edge_url}")
        yield await _reach(where.edge_url, about="Edge Function", variable="HLF_EDGE_URL")
        try:
            await edge.prove(seconds=CONNECT_SECONDS)
        except ConfigurationError as error:
            yield _broken("token", error.message, "Compare the function's secrets with these.")
        except DeliveryError as error:
            yield _unreachable("token", error.message, "See the function's log, then try again.")
        else:
            yield _well("token", "the Edge Function knows us and got one")


async def _reach(url: str, *, about: str, variable: str) -> Finding:
    """
    Open a connection and close it: nothing is read there, not even for this.
    """
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc}"  # a webhook's path may be a secret of its own
    port = parts.port or (443 if parts.scheme == "https" else 80)
    context = ssl.create_default_context() if parts.scheme == "https" else None
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
            writer.close()
            await writer.wait_closed()
    except ssl.SSLCertVerificationError:
        return _broken(
            about, "its certificate is not trusted", "Install the CA, or mend the address."
        )
    except (OSError, TimeoutError):
        return _unreachable(about, f"{shown} does not answer", f"Check {variable} and the network.")
    return _well(about, f"{shown} can be reached")
