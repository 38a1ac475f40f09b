"""
For the coordinator: `status`, `failures` and `retry`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from outbox.gate import look
from worker import bootstrap
from worker.certifications.visibility import DESTINATION
from worker.cli.session import NEEDS_A_PERSON, OK, Session, actor, command, many, one_line
from worker.cli.words import (
    gate_sentence,
    reminder_sentences,
    reminders_document,
    status_document,
    status_sentences,
)
from worker.coordinator import alerts
from worker.coordinator import retry as again
from worker.database import reading
from worker.errors import UsageError
from worker.wakeup import notify

if TYPE_CHECKING:
    from uuid import UUID


@click.command()
@command
async def status(session: Session) -> int:
    """
    What the portal still has to be told, and what stands in the way.
    """
    async with bootstrap.open_database() as engine, reading(engine) as connection:
        now = await alerts.status(connection, organization_id=session.organization_id)
        reminders = await alerts.reminders(connection, organization_id=session.organization_id)
    session.report(
        status_document(now) | {"reminders": reminders_document(reminders)},
        *status_sentences(session, now),
        *reminder_sentences(session, reminders),
    )
    return NEEDS_A_PERSON if now.failed else OK


@click.command()
@click.option("--all", "everything", is_flag=True, help="Resolved ones too.")
@command
async def failures(session: Session, everything: bool) -> int:  # noqa: FBT001 (a flag of click)
    """
    Mentors whose state did not get through, the oldest first.
    """
    async with bootstrap.open_database() as engine, reading(engine) as connection:
        found = await alerts.failures(
            connection, organization_id=session.organization_id, resolved_too=everything
        )
    still_open = [failure for failure in found if failure.resolved_at is None]
    cut = len(found) == alerts.MOST_FAILURES
    if session.as_json:
        session.report({"failures": [_failure_document(failure) for failure in found], "cut": cut})
    elif not found:
        click.echo("No failures.")
    else:
        for failure in found:
            click.echo(_told(session, failure))
        if cut:
            click.echo(f"These are the first {len(found)}; there may be more.")
        if still_open:
            click.echo("All of them at once: hlf-sync retry --all")
    return NEEDS_A_PERSON if still_open else OK


def _failure_document(failure: alerts.Failure) -> dict[str, Any]:
    return asdict(failure) | {
        "reason": alerts.reason(failure.error_code),
        "consequence": failure.consequence,
    }


def _told(session: Session, failure: alerts.Failure) -> str:
    """
    A failure in a few lines that fit any terminal, with the command to copy.
    """
    name = one_line(failure.mentor_name) or str(failure.mentor_id)
    why = alerts.reason(failure.error_code)
    if failure.resolved_at:
        return f"{name}: in order since {session.clock(failure.resolved_at)}. It was: {why}."
    if failure.trying_again:
        next_step = "It is being tried again."
    elif failure.recoverable:
        next_step = f"It is tried again when Dynamics is back, or now: hlf-sync retry {failure.id}"
    else:
        next_step = f"It needs you: hlf-sync retry {failure.id}"
    return (
        f"{name}: {failure.consequence}, since {session.clock(failure.created_at)}."
        f"\n  Why: {why}.\n  {next_step}"
    )


@click.command()
@click.argument("failure_ids", metavar="FAILURE…", type=click.UUID, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every open failure.")
@command
async def retry(
    session: Session,
    failure_ids: tuple[UUID, ...],
    everything: bool,  # noqa: FBT001 (a flag of click)
) -> int:
    """
    Make the portal show what it has to show now.
    """
    if bool(failure_ids) == everything:
        raise UsageError("Name failures, or give --all; `hlf-sync failures` lists them.")
    async with bootstrap.open_database() as engine:
        where: dict[str, Any] = {"organization_id": session.organization_id, "actor": actor()}
        if everything:
            done = await again.retry_all(engine, **where)
        else:
            done = await again.retry(engine, failure_ids, **where)
        await notify(engine)
        async with reading(engine) as connection:
            gate = await look(
                connection, destination=DESTINATION, organization_id=session.organization_id
            )
    sentences = [f"Trying again: {many(done.started, 'mentor')}."]
    if done.under_way:
        sentences.append(f"Already being tried again: {done.under_way}.")
    if done.resolved:
        sentences.append(f"Already in order: {done.resolved}.")
    if done.gone:
        sentences.append(
            f"Nothing can be sent for {many(done.gone, 'mentor')}: not in our register any "
            "more. See to it in Dynamics by hand."
        )
    if sentence := gate_sentence(session, gate):
        sentences.append(sentence)
    session.report(asdict(done), *sentences)
    return OK
