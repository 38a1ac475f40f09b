"""
The long runs: `worker` and `drain`.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from typing_extensions import override

from outbox import Observer
from worker import bootstrap, process
from worker.certifications import visibility
from worker.certifications.reminders import DESTINATION
from worker.cli.session import EXIT_CODES, OK, Session, command, many
from worker.cli.words import (
    reminder_sentences,
    reminders_document,
    status_document,
    status_sentences,
)
from worker.coordinator import alerts
from worker.database import reading
from worker.doctor import grants
from worker.doctor.rights import DELIVERY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from outbox import Drained, Settlement

TALLY = ("delivered", "superseded", "skipped", "dead", "retry", "deferred", "lost")
"""What a drain counts, in the order it is reported."""


def a_number(_context: object, _option: object, value: float | None) -> float | None:
    """
    Refuse "nan", which no range does.
    """
    if value is not None and math.isnan(value):
        raise click.BadParameter("that is no number of seconds.")
    return value


@click.command()
@command
async def worker(session: Session) -> int:
    """
    Deliver for ever; SIGTERM lets flights land, a second one does not wait for them.
    """
    async with (
        bootstrap.open_database(relaying=True) as engine,
        bootstrap.open_destinations(engine, session.settings) as destinations,
        bootstrap.open_monitor(engine, session.settings, destinations) as monitor,
    ):
        await grants.require(engine, DELIVERY)
        await process.work(
            engine,
            monitor.destinations if monitor else destinations,
            session.settings,
            connect_listener=bootstrap.listening_connection,
            monitor=monitor,
        )
    return OK


@click.command()
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    callback=a_number,
    help="Claim no longer than this.",
)
@command
async def drain(session: Session, max_seconds: float | None) -> int:
    """
    Deliver until nothing is due, then exit; for cron.
    """
    async with (
        bootstrap.open_database(relaying=True) as engine,
        bootstrap.open_destinations(engine, session.settings) as destinations,
    ):
        where = {"organization_id": session.organization_id}
        async with reading(engine) as connection:
            before = await alerts.status(connection, **where)
            expected = before.waiting
            if session.settings.reminder_url:
                expected += (await alerts.reminders(connection, **where)).waiting
        with _progress(session, total=expected) as bar:
            drained = await process.drain(
                engine,
                destinations,
                session.settings,
                max_seconds=max_seconds,
                observer=bar,
            )
        async with reading(engine) as connection:
            after = await alerts.status(connection, **where)
            reminders = await alerts.reminders(connection, **where)
    portal, mail = drained[visibility.DESTINATION], drained.get(DESTINATION)
    session.report(
        {
            **_drained_document(portal),
            "reminders": _drained_document(mail) | reminders_document(reminders),
            "status": status_document(after),
        },
        _drained_sentence(portal, mail),
        *status_sentences(session, after),
        *reminder_sentences(session, reminders),
    )
    verdicts = process.judge(portal, after), process.judge_reminders(mail, reminders)
    return EXIT_CODES[process.worst(verdicts)]


def _drained_document(drained: Drained | None) -> dict[str, Any]:
    """
    Why it ended and what it did; nothing was even tried without an address to send to.
    """
    if drained is None:
        return {"ended": None, **dict.fromkeys(TALLY, 0)}
    return {"ended": drained.ended, **{name: drained.tally[name] for name in TALLY}}


def _drained_sentence(portal: Drained, mail: Drained | None) -> str:
    """
    The sum, and each if there is more than one.
    """
    number = portal.tally["delivered"]
    delivered = str(number)
    if mail and (reminders := mail.tally["delivered"]):
        delivered = f"{number + reminders} ({many(reminders, 'reminder')})"
    ended = portal.ended if mail is None or portal.ended != "done" else mail.ended
    match ended:
        case "done":
            return f"Delivered {delivered}; nothing more is due."
        case "time":
            return f"Delivered {delivered}; then the time was over, or it was told to stop."
        case "gate":
            return f"Delivered {delivered}; then sending had to stop."


class _Bar(Observer):
    """
    A bar that grows with each event that ended.
    """

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("Delivering", total=total or None)

    @override
    def settled(self, settlements: Sequence[Settlement]) -> None:
        self._progress.advance(self._task, sum(one.ending is not None for one in settlements))


@contextmanager
def _progress(session: Session, *, total: int) -> Iterator[Observer | None]:
    """
    A bar on a terminal, nothing elsewhere.
    """
    if session.as_json or not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress, total=total)
