"""
For the operator: `pause`, `resume`, `resync` and `doctor`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from outbox.gate import close_by_hand, look, open_again
from worker import bootstrap, logs
from worker.certifications.visibility import DESTINATION
from worker.cli.session import (
    CONFIGURATION,
    OK,
    UNREACHABLE,
    WORK_LEFT,
    Session,
    actor,
    command,
    many,
    one_line,
)
from worker.cli.words import gate_sentence
from worker.coordinator import retry
from worker.database import transaction
from worker.doctor import examine
from worker.wakeup import notify

if TYPE_CHECKING:
    from outbox.gate import Where


@click.command()
@click.option("--reason", default="", help="Shown to everybody meanwhile.")
@command
async def pause(session: Session, reason: str) -> int:
    """
    Send nothing to Dynamics until `resume`; states wait and are not lost.
    """
    async with bootstrap.open_database() as engine, transaction(engine) as connection:
        await close_by_hand(
            connection,
            destination=DESTINATION,
            organization_id=session.organization_id,
            message=_sentence(one_line(reason) or "no reason was given"),
            closed_by=actor(),
        )
    session.report({"paused": True}, "Paused: nothing is sent to Dynamics until `hlf-sync resume`.")
    return OK


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else f"{words}."


@click.command()
@command
async def resume(session: Session) -> int:
    """
    Send again, after a pause, an outage or a mended configuration.
    """
    where: Where = {"destination": DESTINATION, "organization_id": session.organization_id}
    async with bootstrap.open_database() as engine:
        async with transaction(engine) as connection:
            opened = await open_again(
                connection, **where, reasons=("operator", "outage", "configuration")
            )
            gate = await look(connection, **where)
        await notify(engine)
    if gate.state == "closed":
        session.report({"resumed": False}, gate_sentence(session, gate))
        return WORK_LEFT
    session.report(
        {"resumed": opened},
        "Sending goes on." if opened else "Nothing was paused: sending goes on.",
    )
    return OK


@click.command()
@command
async def resync(session: Session) -> int:
    """
    Assert every mentor's state again, whatever Dynamics confirmed before.
    """
    seen = enqueued = 0
    async with bootstrap.open_database() as engine:
        async for mentors, states in retry.resync(engine, organization_id=session.organization_id):
            seen += mentors
            enqueued += states
        await notify(engine)
    others = f" On the way anyway: {seen - enqueued}." if seen > enqueued else ""
    session.report(
        {"mentors": seen, "enqueued": enqueued},
        f"Asserting {many(enqueued, 'mentor')} again.{others}",
    )
    return OK


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document, not text.")
def doctor(*, as_json: bool) -> None:
    """
    Look at everything a run depends on; each finding comes with its cure.
    """
    logs.configure("console", level=logging.ERROR)
    sys.exit(asyncio.run(_examine(as_json=as_json)))


async def _examine(*, as_json: bool) -> int:
    findings = []
    async for finding in examine():
        findings.append(finding)
        if not as_json:
            click.echo(f"{finding.verdict:<12}{finding.about}: {finding.says}")
            if finding.cure:
                click.echo(f"{'':<12}→ {finding.cure}")
    verdicts = {finding.verdict for finding in findings}
    if as_json:
        document = {
            "healthy": not verdicts & {"broken", "unreachable"},
            "findings": [asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(document))
    if "broken" in verdicts:
        return CONFIGURATION
    return UNREACHABLE if "unreachable" in verdicts else OK
