"""
The composition root: the only place where settings, credentials and parts are joined.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from worker import credentials, portal, release, reminding
from worker.certifications.reconciliation import ReconciliationService
from worker.certifications.reminders import CertificationReminderService
from worker.certifications.transitions import CertificationManagementService, date_in
from worker.database import NO_ANSWER, no_entry, reading
from worker.dynamics import Batcher, DynamicsTarget, dynamics_client, edge_client
from worker.errors import SchemaError, SettingsError, UnreachableError
from worker.listening import bind
from worker.nightly import Tonight
from worker.ping import Ping
from worker.settings import DashboardSettings, DynamicsSettings, EdgeSettings
from worker.tracing import sending
from worker.webhook import ReminderWebhook

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import date

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Destination
    from worker.coordinator.serving import Served
    from worker.dynamics import EdgeClient, EntraAuth
    from worker.monitoring.serving import Monitor
    from worker.reporting import Reports
    from worker.settings import Settings, TargetSettings
    from worker.tracing import Trace

migration_url = credentials.migration_url
listening_connection = credentials.listening_connection
working_connection = credentials.working_connection

REVISION = "0007"
"""The migration that this release needs."""

MIGRATED = text("SELECT max(version_num) FROM outbox.alembic_version")


def error_reports() -> Reports | None:
    """
    Where errors go that nobody expected, if anywhere.

    Raises:
        SettingsError: it is set up wrongly.
    """
    return credentials.error_reports(release=f"{release.NAME}@{release.VERSION}")


@asynccontextmanager
async def open_database(*, relaying: bool = False) -> AsyncIterator[AsyncEngine]:
    """
    An engine on a database that answers and has this release's tables.

    Args:
        relaying: see `database.connect`.

    Raises:
        SettingsError, UnreachableError, SchemaError: one sentence each.
    """
    engine = credentials.database_engine(relaying=relaying)
    try:
        await require_schema(engine)
        yield engine
    finally:
        await engine.dispose()


async def require_schema(engine: AsyncEngine) -> None:
    """
    Check that the database answers and is migrated.

    Raises:
        UnreachableError, SchemaError: it does not, or is not.
    """
    host = engine.url.host or engine.url.query.get("host") or "localhost"
    try:
        async with reading(engine) as connection:
            revision = await connection.scalar(MIGRATED)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        sqlstate = getattr(getattr(error, "orig", None), "sqlstate", None)
        if sqlstate in {"42P01", "3F000"}:  # no such table, no such schema
            raise SchemaError(
                "The database has no tables of ours yet: run `make migrate` first."
            ) from None
        if sqlstate == "42501":
            raise SchemaError(
                "The database user may not read schema outbox: run the migrations with the "
                "same user, or grant it."
            ) from None
        why = no_entry(error) or NO_ANSWER
        raise UnreachableError(f"The database at {host} {why}.") from None
    if revision is None or revision < REVISION:
        raise SchemaError(
            f"The database is at migration {revision or 'none'}, and this release needs "
            f"{REVISION}: run `make migrate` first."
        )


@asynccontextmanager
async def open_certifications(
    engine: AsyncEngine, settings: Settings
) -> AsyncIterator[CertificationManagementService]:
    """
    The transitions, for this organisation.
    """
    service = CertificationManagementService(
        engine, organization_id=settings.organization_id, timezone=settings.timezone
    )
    async with aclosing(service):
        yield service


@asynccontextmanager
async def open_reminders(
    engine: AsyncEngine, settings: Settings
) -> AsyncIterator[CertificationReminderService]:
    """
    Who is to be reminded, for this organisation.
    """
    service = CertificationReminderService(
        engine,
        organization_id=settings.organization_id,
        timezone=settings.timezone,
        thresholds=settings.reminder_days,
    )
    async with aclosing(service):
        yield service


@asynccontextmanager
async def open_ping() -> AsyncIterator[tuple[Ping, SettingsError | None]]:
    """
    Where the night run is heard. A wrong address is no reason not to work: nobody hears then,
    and what is wrong comes beside it.
    """
    trouble = None
    try:
        ping = credentials.nightly_ping()
    except SettingsError as error:
        ping, trouble = Ping(), error
    async with ping:
        yield ping, trouble


@asynccontextmanager
async def open_nightly(
    engine: AsyncEngine, settings: Settings, *, today: date | None, max_seconds: float | None
) -> AsyncIterator[Tonight]:
    """
    What the night run works with.

    Args:
        today: the date to judge by; by default the database's, in the organisation's zone.
    """
    ends_at = None if max_seconds is None else time.monotonic() + max_seconds
    reconciliation = ReconciliationService(
        engine, organization_id=settings.organization_id, timezone=settings.timezone
    )
    async with (
        open_certifications(engine, settings) as certifications,
        open_reminders(engine, settings) as reminders,
        aclosing(reconciliation),
        open_tracing() as trace,
    ):
        if today is None:
            async with reading(engine) as connection:
                today = await date_in(connection, settings.timezone)
        yield Tonight(
            engine=engine,
            settings=settings,
            certifications=certifications,
            reconciliation=reconciliation,
            reminders=reminders,
            open_portal=partial(open_portal, engine, settings, trace=trace),
            open_reminding=(
                partial(open_reminding, engine, settings, trace=trace)
                if settings.reminder_url
                else None
            ),
            today=today,
            ends_at=ends_at,
        )


@asynccontextmanager
async def open_authentication() -> AsyncIterator[EntraAuth]:
    """
    What gets this organisation's tokens.

    Raises:
        SettingsError: something about Dynamics is missing or wrong.
    """
    try:
        auth = credentials.dynamics_auth(DynamicsSettings.load())
    except ValueError as error:
        raise SettingsError(str(error)) from None
    try:
        yield auth
    finally:
        await auth.aclose()


@asynccontextmanager
async def open_edge(settings: Settings) -> AsyncIterator[EdgeClient]:
    """
    The way through this organisation's Edge Function.

    Raises:
        SettingsError: something about the function or Dynamics is missing or wrong.
    """
    where = EdgeSettings.load()
    try:
        client = edge_client(
            dynamics_target(where),
            organization_id=settings.organization_id,
            url=where.edge_url,
            key=credentials.edge_key(where),
            connections=settings.concurrency,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
    async with client:
        yield client


def _untraced(destination: Destination) -> Destination:
    return destination


@asynccontextmanager
async def open_tracing() -> AsyncIterator[Trace]:
    """
    What makes a destination traced; nothing, where no traces are sent.

    Raises:
        SettingsError: what traces are sent with is wrong.
    """
    async with AsyncExitStack() as stack:
        try:
            trace: Trace = _untraced
            if exporter := credentials.trace_exporter():
                spans = sending(exporter, name=release.NAME, version=release.VERSION)
                trace = await stack.enter_async_context(spans)
        except ValueError as error:  # some are read as soon as the library is loaded
            raise SettingsError(f"A variable of OpenTelemetry's is wrong: {error}") from None
        yield trace


@asynccontextmanager
async def open_portal(
    engine: AsyncEngine, settings: Settings, *, trace: Trace = _untraced
) -> AsyncIterator[Destination]:
    """
    HLF's portal as a destination, with this organisation's credentials.

    Raises:
        SettingsError: something about Dynamics is missing or wrong.
    """
    if settings.transport == "edge":
        async with open_edge(settings) as edge:
            yield trace(portal.destination(engine, edge, settings))
        return
    async with (
        open_authentication() as auth,
        dynamics_client(
            dynamics_target(DynamicsSettings.load()), auth=auth, connections=settings.concurrency
        ) as client,
    ):
        if settings.batch == 1:
            yield trace(portal.destination(engine, client, settings))
            return
        async with aclosing(Batcher(client, size=settings.batch)) as batcher:
            yield trace(portal.destination(engine, batcher, settings))


@asynccontextmanager
async def open_webhook(settings: Settings) -> AsyncIterator[ReminderWebhook]:
    """
    What sends this organisation's reminders; for when there is an address.

    Raises:
        SettingsError: the address or the secret is missing or wrong.
    """
    try:
        webhook = ReminderWebhook(settings.reminder_url, sign=credentials.reminder_signature())
    except ValueError as error:
        raise SettingsError(str(error)) from None
    async with aclosing(webhook):
        yield webhook


@asynccontextmanager
async def open_reminding(
    engine: AsyncEngine, settings: Settings, *, trace: Trace = _untraced
) -> AsyncIterator[Destination]:
    """
    The webhook of reminders, for a relay; for when there is an address.

    Raises:
        SettingsError: the address or the secret is missing or wrong.
    """
    async with open_webhook(settings) as webhook:
        yield trace(reminding.destination(engine, webhook, settings))


@asynccontextmanager
async def open_destinations(
    engine: AsyncEngine, settings: Settings
) -> AsyncIterator[tuple[Destination, ...]]:
    """
    Everybody who is to be told: the portal, and the webhook if reminders have one.

    Raises:
        SettingsError: something about one of them is missing or wrong.
    """
    async with AsyncExitStack() as stack:
        trace = await stack.enter_async_context(open_tracing())
        opening = [open_portal(engine, settings, trace=trace)]
        if settings.reminder_url:
            opening.append(open_reminding(engine, settings, trace=trace))
        yield tuple([await stack.enter_async_context(one) for one in opening])


@asynccontextmanager
async def open_monitor(
    engine: AsyncEngine, settings: Settings, destinations: Sequence[Destination]
) -> AsyncIterator[Monitor | None]:
    """
    Where a worker tells how it is, with a socket that listens; None if it is to be nowhere.

    Raises:
        SettingsError: the port is not to be had.
    """
    if settings.metrics_port is None:
        yield None
        return
    # No other worker waits for a web server to be loaded.
    from worker.monitoring.serving import Monitor  # noqa: PLC0415

    variables = "HLF_METRICS_HOST and HLF_METRICS_PORT"
    with bind(settings.metrics_host, settings.metrics_port, variables=variables) as listener:
        yield Monitor(
            engine,
            organization_id=settings.organization_id,
            destinations=destinations,
            listener=listener,
            poll_seconds=settings.poll_seconds,
            version=release.VERSION,
            revision=REVISION,
        )


@asynccontextmanager
async def open_dashboard(
    engine: AsyncEngine, settings: Settings, *, actor: str
) -> AsyncIterator[Served]:
    """
    The coordinator's page and the API, with a socket that listens.

    Args:
        actor: whoever is at this machine, where nobody logs in.

    Raises:
        SettingsError, SchemaError: something about it is missing or wrong.
    """
    # No other command waits for a web server to be loaded.
    from worker.coordinator.serving import open_served  # noqa: PLC0415

    async with open_served(
        engine,
        settings,
        DashboardSettings.load(),
        actor=actor,
        secret=credentials.login_secret,
        connect_listener=listening_connection,
    ) as served:
        yield served


def dynamics_target(where: TargetSettings) -> DynamicsTarget:
    """
    Where in Dynamics the visibility is written.

    Raises:
        SettingsError: an address or a name is not usable.
    """
    try:
        return DynamicsTarget(
            url=where.url,
            entity_set=where.entity_set,
            key=where.key,
            column=where.column,
            operation=where.operation,
            action=where.action,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
