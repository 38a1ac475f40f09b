"""
The night run: expire, reconcile, remind, re-drive, drain.

Each part stands alone: what breaks one is said in its outcome, and the next one begins. What
was committed stands, so a run may be killed anywhere, repeated, and run beside others.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from typing_extensions import override

from outbox import Observer
from worker import portal, process, reminding
from worker.certifications.reconciliation import Reconciled
from worker.coordinator import alerts, nights
from worker.database import no_entry, reading, refusal, transaction
from worker.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import date

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Destination, Drained, Settlement
    from worker.certifications.reconciliation import ReconciliationService
    from worker.certifications.reminders import CertificationReminderService
    from worker.certifications.transitions import CertificationManagementService
    from worker.process import Verdict
    from worker.settings import Settings

log = structlog.get_logger(__name__)

BY_EXIT_CODE: dict[int, Verdict] = {69: "unreachable", 75: "work_left", 78: "configuration"}

SENT = ("delivered", "superseded", "skipped", "dead")
"""What is told of a drain."""

TIME_OVER = "The time was over; the next run goes on."


@dataclass(slots=True, kw_only=True)
class Outcome:
    """
    What a part came to; it fills this in as it goes, so that what breaks it hides nothing.

    Args:
        did: how much of what, by kind.
        skipped: mentors of other organisations, for whom nothing is sent.
        left: what waits for the next time.
        failed: what a person has to look at.
        why: one sentence, if there is anything to say.
    """

    part: str
    verdict: Verdict = "done"
    did: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    left: int = 0
    failed: int = 0
    why: str = ""

    def add(self, **did: int) -> None:
        """
        Count what was done.
        """
        for kind, number in did.items():
            self.did[kind] = self.did.get(kind, 0) + number


@dataclass(frozen=True, slots=True, kw_only=True)
class Tonight:
    """
    What the parts of one run work with.

    Args:
        today: the one date that all of them judge by.
        ends_at: on the monotonic clock; None if there is no hurry.
        open_portal, open_reminding: the destinations; opened by the parts that need them, so
            that a wrong set-up of one keeps nobody else from working. Reminders have none
            without an address.
    """

    engine: AsyncEngine
    settings: Settings
    certifications: CertificationManagementService
    reconciliation: ReconciliationService
    reminders: CertificationReminderService
    open_portal: Callable[[], AbstractAsyncContextManager[Destination]]
    open_reminding: Callable[[], AbstractAsyncContextManager[Destination]] | None
    today: date
    ends_at: float | None

    @property
    def seconds_left(self) -> float | None:
        """
        Until the time is over; None if there is no hurry.
        """
        return None if self.ends_at is None else max(0.0, self.ends_at - time.monotonic())

    @property
    def over(self) -> bool:
        """
        Whether the time is over.
        """
        return self.seconds_left == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """
    What a whole run came to.
    """

    today: date
    outcomes: Sequence[Outcome]

    @property
    def verdict(self) -> Verdict:
        """
        The worst of all parts.
        """
        return process.worst(one.verdict for one in self.outcomes)

    @property
    def ok(self) -> bool:
        """
        Whether the run did its work; open failures are shown where a person sees to them.
        """
        return self.verdict in {"done", "needs_a_person"}

    def document(self) -> dict[str, Any]:
        """
        As JSON; the keys are stable.
        """
        return {
            "today": self.today.isoformat(),
            "ok": self.ok,
            "verdict": self.verdict,
            "parts": [asdict(one) for one in self.outcomes],
        }

    def sentences(self) -> list[str]:
        """
        For people: a line for each part.
        """
        return [_sentence(one) for one in self.outcomes]


WORDS = {
    "certifications": ("certification", "certifications"),
    "mentors": ("mentor", "mentors"),
    "reminders": ("reminder", "reminders"),
    "missing": ("mentor nothing was noted about", "mentors nothing was noted about"),
    "visibility": ("to be shown or hidden", "to be shown or hidden"),
    "pauses": ("paused wrongly", "paused wrongly"),
    "unconfirmed": ("never confirmed", "never confirmed"),
}
"""One and many of a kind, for people; the rest is said as it is called."""


def _sentence(outcome: Outcome) -> str:
    did = [
        f"{number} {WORDS.get(kind, (kind, kind))[number != 1]}"
        for kind, number in outcome.did.items()
        if number
    ]
    words = [f"{outcome.part}: {', '.join(did) or 'nothing to do'}."]
    if outcome.skipped:
        words.append(f"Another organisation's: {outcome.skipped}; nothing is sent for them.")
    if outcome.left:
        words.append(f"Left: {outcome.left}.")
    if outcome.failed:
        words.append(f"Failed: {outcome.failed}.")
    if outcome.why:
        words.append(outcome.why)
    return " ".join(words)


async def run(tonight: Tonight) -> Night:
    """
    All parts, one after the other, whatever becomes of each.
    """
    noted = await _note_begin(tonight)
    night = Night(today=tonight.today, outcomes=[await _alone(*part, tonight) for part in PARTS])
    if noted is not None:
        await _note_end(tonight, noted, night)
    return night


async def _alone(
    name: str, part: Callable[[Tonight, Outcome], Awaitable[None]], tonight: Tonight
) -> Outcome:
    outcome = Outcome(part=name)
    if tonight.over:
        outcome.verdict, outcome.why = "work_left", TIME_OVER
        return outcome
    try:
        await part(tonight, outcome)
    except SyncError as error:
        outcome.verdict = BY_EXIT_CODE.get(error.exit_code, "unexpected")
        outcome.why = str(error)
    except (SQLAlchemyError, TimeoutError, OSError) as error:
        if sentence := refusal(error):
            outcome.verdict, outcome.why = "configuration", sentence
        elif not _database_away(error):
            _unexpected(outcome, error)
        else:
            outcome.verdict = "unreachable"
            why = no_entry(error) or "stopped answering"
            outcome.why = f"The database {why}; what was committed stands."
            log.warning("nightly.database_failed", part=name, error=type(error).__name__)
    except Exception as error:  # noqa: BLE001 (no part stops another)
        _unexpected(outcome, error)
    return outcome


def _database_away(error: Exception) -> bool:
    if isinstance(error, DBAPIError):
        away = isinstance(error, OperationalError | InterfaceError)
        return away or error.connection_invalidated
    return isinstance(error, PoolTimeout | TimeoutError | OSError)


def _unexpected(outcome: Outcome, error: Exception) -> None:
    log.error("nightly.part_failed", part=outcome.part, exc_info=error)
    outcome.verdict = "unexpected"
    outcome.why = f"Something unexpected happened ({type(error).__name__}); the log has more."


# -------------------------------------------------------------------------------- parts


async def expire(tonight: Tonight, outcome: Outcome) -> None:
    """
    What has run out.
    """
    outcome.add(certifications=0, mentors=0)
    async for page in tonight.certifications.expire_all(today=tonight.today):
        outcome.add(certifications=page.certifications, mentors=page.mentors)
        outcome.skipped += page.skipped
        if _stopped(tonight, outcome):
            return


async def reconcile(tonight: Tonight, outcome: Outcome) -> None:
    """
    What was changed behind our back.
    """
    total = Reconciled()
    _tell_reconciled(outcome, total)
    async for page in tonight.reconciliation.reconcile_all(today=tonight.today):
        total += page
        _tell_reconciled(outcome, total)
        if _stopped(tonight, outcome):
            return
    if total.failed:
        outcome.verdict = "unexpected"
        outcome.why = f"The database refused {total.failed}; the log says whom."
    elif total.held:
        outcome.why = "Somebody else was at work on them; they are looked at again next time."


def _tell_reconciled(outcome: Outcome, total: Reconciled) -> None:
    counts = asdict(total)
    outcome.skipped, outcome.left = counts.pop("skipped"), counts.pop("held")
    outcome.failed = counts.pop("failed")
    outcome.did = counts


async def remind(tonight: Tonight, outcome: Outcome) -> None:
    """
    Whose certification runs out before long.
    """
    outcome.add(reminders=0)
    async for page in tonight.reminders.remind_all(today=tonight.today):
        outcome.add(reminders=page.enqueued)
        outcome.skipped += page.skipped
        if _stopped(tonight, outcome):
            return


async def redrive(tonight: Tonight, outcome: Outcome) -> None:
    """
    What died of something that passes.
    """
    organization_id = tonight.settings.organization_id
    outcome.add(
        mentors=await portal.redrive_recoverable(tonight.engine, organization_id=organization_id)
    )
    outcome.add(
        reminders=await reminding.redrive_recoverable(
            tonight.engine,
            organization_id=organization_id,
            timezone=tonight.settings.timezone,
        )
    )


async def drain(tonight: Tonight, outcome: Outcome) -> None:
    """
    What the portal has to be told.
    """
    async with tonight.open_portal() as destination:
        drained = await _drained(tonight, outcome, destination)
    async with reading(tonight.engine) as connection:
        after = await alerts.status(connection, organization_id=tonight.settings.organization_id)
    outcome.verdict = process.judge(drained, after)
    outcome.failed = after.failed
    _tell_left(outcome, drained, after.waiting)
    if after.failed and not outcome.why:
        outcome.why = "See `hlf-sync failures`."


async def send_reminders(tonight: Tonight, outcome: Outcome) -> None:
    """
    What the mentors have to be told.
    """
    drained = None
    if tonight.open_reminding is not None:
        async with tonight.open_reminding() as destination:
            drained = await _drained(tonight, outcome, destination)
    async with reading(tonight.engine) as connection:
        after = await alerts.reminders(connection, organization_id=tonight.settings.organization_id)
    outcome.verdict = process.judge_reminders(drained, after)
    _tell_left(outcome, drained, after.waiting)
    if drained is None and after.waiting:
        outcome.why = "HLF_REMINDER_URL is not set: no reminder is sent before it is."


class _Counting(Observer):
    """
    Counts as it goes: what breaks the drain hides nothing.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    @override
    def settled(self, settlements: Sequence[Settlement]) -> None:
        self._outcome.add(delivered=sum(one.ending == "delivered" for one in settlements))


async def _drained(tonight: Tonight, outcome: Outcome, destination: Destination) -> Drained:
    everything = await process.drain(
        tonight.engine,
        [destination],
        tonight.settings,
        max_seconds=tonight.seconds_left,
        observer=_Counting(outcome),
    )
    drained = everything[destination.name]
    outcome.did = {name: drained.tally[name] for name in SENT}
    return drained


def _tell_left(outcome: Outcome, drained: Drained | None, waiting: int) -> None:
    outcome.left = waiting
    if drained is None or not waiting:
        return
    if drained.ended == "gate":
        outcome.why = "Sending had to stop; `hlf-sync status` says why."
    elif drained.ended == "time":
        outcome.why = TIME_OVER


PARTS: Sequence[tuple[str, Callable[[Tonight, Outcome], Awaitable[None]]]] = (
    ("expire", expire),
    ("reconcile", reconcile),
    ("remind", remind),
    ("redrive", redrive),
    ("drain", drain),
    ("reminders", send_reminders),
)
"""In this order: what a part finds is sent by the last two."""


def _stopped(tonight: Tonight, outcome: Outcome) -> bool:
    """
    Between two pages: is the time over?
    """
    if tonight.over:
        outcome.verdict, outcome.why = "work_left", TIME_OVER
    return tonight.over


# -------------------------------------------------------------------------------- notes


async def _note_begin(tonight: Tonight) -> int | None:
    """
    None if it could not be noted, which keeps nobody from working.
    """
    try:
        async with transaction(tonight.engine) as connection:
            return await nights.begin(connection, organization_id=tonight.settings.organization_id)
    except (SQLAlchemyError, TimeoutError, OSError, SyncError) as error:
        log.warning("nightly.not_noted", error=type(error).__name__)
        return None


async def _note_end(tonight: Tonight, noted: int, night: Night) -> None:
    try:
        async with transaction(tonight.engine) as connection:
            await nights.finish(connection, noted, ok=night.ok, summary=night.document())
    except (SQLAlchemyError, TimeoutError, OSError, SyncError) as error:
        log.warning("nightly.not_noted", error=type(error).__name__)
