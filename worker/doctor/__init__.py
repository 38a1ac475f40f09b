"""
The doctor: looks at everything a run depends on; each finding comes with its cure.

    database            server, clock, backlog, and what the rooms below find
    dynamics            Dynamics or the Edge Function, the token, the reminders' webhook
    session             whether a pooler stands in between, and whether wake-ups are heard
    grants              what the user and each role may do, of what it has to
    exposure            who else reaches our tables, and whether the app hears of failures
    rights              what each role has to be able to do
    finding             what was found, and what to do about it

Nothing is changed, and nothing but a token is asked of Microsoft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.doctor.database import examine_database
from worker.doctor.dynamics import examine_dynamics, examine_edge, examine_reminders
from worker.doctor.finding import Finding, broken, well
from worker.errors import SettingsError
from worker.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Finding", "examine"]


async def examine() -> AsyncIterator[Finding]:
    """
    Look at everything, in the order in which a run would meet it.
    """
    try:
        settings = Settings.load()
    except SettingsError as error:
        yield broken("settings", str(error), "Set it; the README lists every setting.")
        return
    yield well("settings", f"organisation {settings.organization_id}, {settings.timezone}")
    async for finding in examine_database(settings):
        yield finding
    over = examine_edge(settings) if settings.transport == "edge" else examine_dynamics()
    async for finding in over:
        yield finding
    async for finding in examine_reminders(settings):
        yield finding
