"""
The cron entry: `nightly`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from worker import bootstrap
from worker import nightly as night_run
from worker.cli.running import a_number
from worker.cli.session import EXIT_CODES, Session, command
from worker.errors import SettingsError, SyncError
from worker.nightly import Night, Outcome

if TYPE_CHECKING:
    from datetime import date, datetime


@click.command()
@click.option(
    "--today", type=click.DateTime(["%Y-%m-%d"]), help="Judge by this date instead of today's."
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    callback=a_number,
    help="Begin nothing more after this.",
)
@command
async def nightly(session: Session, today: datetime | None, max_seconds: float | None) -> int:
    """
    Expire, reconcile, try again and drain, each whatever becomes of the others; for cron.
    """
    async with bootstrap.open_ping() as (ping, trouble):
        await ping.start()
        try:
            night = await _run(session, today.date() if today else None, max_seconds)
        except Exception as error:
            said = str(error) if isinstance(error, SyncError) else "It ended unexpectedly."
            await ping.end(said, good=False)
            raise
        if trouble is not None:
            night = _with_trouble(night, trouble)
        await ping.end("\n".join(night.sentences()), good=night.ok)
    session.report(night.document(), *night.sentences())
    return EXIT_CODES[night.verdict]


async def _run(session: Session, today: date | None, max_seconds: float | None) -> Night:
    async with (
        bootstrap.open_database() as engine,
        bootstrap.open_nightly(
            engine, session.settings, today=today, max_seconds=max_seconds
        ) as tonight,
    ):
        return await night_run.run(tonight)


def _with_trouble(night: Night, trouble: SettingsError) -> Night:
    """
    Nobody outside hears of this run: it did its work, and somebody has to know.
    """
    unheard = Outcome(part="ping", verdict="configuration", why=str(trouble))
    return replace(night, outcomes=[*night.outcomes, unheard])
