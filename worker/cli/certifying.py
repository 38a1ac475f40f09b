"""
What certifications go through: `expire`, `renew` and `remind`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from worker import bootstrap
from worker.cli.session import NEEDS_A_PERSON, OK, WORK_LEFT, Session, command, many
from worker.coordinator import alerts
from worker.errors import DynamicsSyncException

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID


@click.command()
@click.option(
    "--today", type=click.DateTime(["%Y-%m-%d"]), help="Judge by this date instead of today's."
)
@command
async def expire(session: Session, today: datetime | None) -> int:
    """
    Expire every certification that has run out, and enqueue what follows.
    """
    certifications = mentors = skipped = 0
    async with (
        bootstrap.open_database() as engine,
        bootstrap.open_certifications(engine, session.settings) as service,
    ):
        async for page in service.expire_all(today=today.date() if today else None):
            certifications += page.certifications
            mentors += page.mentors
            skipped += page.skipped
    others = f" {skipped} of another organisation: nothing is sent for them." if skipped else ""
    session.report(
        {"certifications": certifications, "mentors": mentors, "skipped": skipped},
        f"Expired {many(certifications, 'certification')} of {many(mentors, 'mentor')}.{others}",
    )
    return OK


@click.command()
@click.option(
    "--today", type=click.DateTime(["%Y-%m-%d"]), help="Count from this date instead of today's."
)
@command
async def remind(session: Session, today: datetime | None) -> int:
    """
    Enqueue a reminder for every certification that runs out soon, once for each threshold.
    """
    enqueued: Counter[int] = Counter()
    skipped = 0
    async with (
        bootstrap.open_database() as engine,
        bootstrap.open_reminders(engine, session.settings) as service,
    ):
        async for page in service.remind_all(today=today.date() if today else None):
            enqueued.update(page.by_threshold)
            skipped += page.skipped
    by_threshold = {days: enqueued[days] for days in session.settings.reminder_days}
    session.report(
        {"enqueued": enqueued.total(), "by_threshold": by_threshold, "skipped": skipped},
        *_reminded_sentences(session, enqueued, skipped),
    )
    return OK


def _reminded_sentences(session: Session, enqueued: Counter[int], skipped: int) -> list[str]:
    each = ", ".join(f"{number} of {days} days" for days, number in sorted(enqueued.items()))
    sentences = [f"Enqueued {many(enqueued.total(), 'reminder')}{f': {each}' if each else ''}."]
    if skipped:
        sentences.append(f"{skipped} of another organisation: nothing is sent for them.")
    if not session.settings.reminder_url:
        sentences.append("HLF_REMINDER_URL is not set: no reminder is sent before it is.")
    return sentences


@click.command()
@click.argument("certification_id", type=click.UUID)
@click.option(
    "--until",
    type=click.DateTime(["%Y-%m-%d"]),
    required=True,
    help="The new last valid day.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0, 15),
    default=0,
    help="Seconds to wait for the portal, at most 15.",
)
@command
async def renew(session: Session, certification_id: UUID, until: datetime, wait: float) -> int:
    """
    Renew a certification, and have the portal show the mentor again.
    """
    document: dict[str, Any] = {
        "certification_id": certification_id,
        "until": until.date(),
        "portal": "pending",
        "warning": None,
        "error_code": None,
    }
    saved = f"Renewed until {until.date()}."
    async with (
        bootstrap.open_database() as engine,
        bootstrap.open_certifications(engine, session.settings) as service,
    ):
        try:
            done = await service.renew(certification_id, until.date(), wait_seconds=wait)
        except DynamicsSyncException as warning:
            document |= {
                "portal": warning.state,
                "warning": str(warning),
                "error_code": warning.error_code,
            }
            session.report(document, saved, f"{warning}: {alerts.reason(warning.error_code)}.")
            return NEEDS_A_PERSON if warning.state == "failed" else WORK_LEFT
    if not done.synchronised:
        document["portal"] = "not synchronised"
        session.report(document, saved, "The mentor is another organisation's: nothing is sent.")
    elif wait:
        document["portal"] = "confirmed"
        session.report(document, saved, "The portal has confirmed.")
    else:
        session.report(document, saved, "The portal will follow.")
    return OK
