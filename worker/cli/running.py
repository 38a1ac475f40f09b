"""
The long runs: `worker` and `drain`.
"""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import Progress

from worker import bootstrap, process
from worker.cli.session import EXIT_CODES, OK, Session, command
from worker.cli.words import status_document, status_sentences
from worker.coordinator import alerts
from worker.database import TRUST_SECONDS, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
        bootstrap.open_database(trust_seconds=TRUST_SECONDS) as engine,
        bootstrap.open_portal(engine, session.settings) as destination,
    ):
        await process.work(
            engine,
            destination,
            session.settings,
            connect_listener=bootstrap.listening_connection,
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
        bootstrap.open_database(trust_seconds=TRUST_SECONDS) as engine,
        bootstrap.open_portal(engine, session.settings) as destination,
    ):
        async with reading(engine) as connection:
            before = await alerts.status(connection, organization_id=session.organization_id)
        with _progress(session, total=before.waiting) as advance:
            drained = await process.drain(
                engine,
                destination,
                session.settings,
                max_seconds=max_seconds,
                on_settled=advance,
            )
        async with reading(engine) as connection:
            after = await alerts.status(connection, organization_id=session.organization_id)
    session.report(
        {
            "ended": drained.ended,
            **{name: drained.tally[name] for name in TALLY},
            "status": status_document(after),
        },
        _drained_sentence(drained),
        *status_sentences(session, after),
    )
    return EXIT_CODES[process.judge(drained, after)]


def _drained_sentence(drained: Drained) -> str:
    delivered = drained.tally["delivered"]
    match drained.ended:
        case "done":
            return f"Delivered {delivered}; nothing more is due."
        case "time":
            return f"Delivered {delivered}; then the time was over, or it was told to stop."
        case "gate":
            return f"Delivered {delivered}; then sending had to stop."


@contextmanager
def _progress(
    session: Session, *, total: int
) -> Iterator[Callable[[Sequence[Settlement]], None] | None]:
    """
    A bar on a terminal, nothing elsewhere.
    """
    if session.as_json or not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Delivering", total=total or None)

        def advance(settlements: Sequence[Settlement]) -> None:
            ended = sum(1 for one in settlements if one.ending is not None)
            progress.advance(task, ended)

        yield advance
