"""
For the coordinator's browser and the app: `dashboard`.
"""

from __future__ import annotations

import click

from worker import bootstrap
from worker.cli.session import OK, Session, actor, command


@click.command()
@command
async def dashboard(session: Session) -> int:
    """
    Serve the coordinator's page and the API until told to stop.
    """
    async with (
        bootstrap.open_database() as engine,
        bootstrap.open_dashboard(engine, session.settings, actor=actor()) as served,
    ):
        session.report({"url": served.url}, f"The page is at {served.url}")
        await served.serve()
    return OK
