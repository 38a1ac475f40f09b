"""
The night run: expire, reconcile, re-drive, drain.

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

from worker import portal, process
from worker.certifications.reconciliation import Reconciled
from worker.coordinator import alerts, nights
from worker.database import reading, transaction
from worker.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import date

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Destination
    from worker.certifications.reconciliation import ReconciliationService
    from worker.certifications.transitions import CertificationManagementService
    from worker.process import Verdict
    from worker.settings import Settings

log = structlog.get_logger(__name__)

WORST_FIRST: Sequence[Verdict] = (
    "configuration",
    "unreachable",
    "work_left",
    "needs_a_person",
    "unexpected",
    "done",
)

BY_EXIT_CODE: dict[int, Verdict] = {69: "unreachable", 75: "work_left", 78: "configuration"}

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
        open_destination: the portal; opened by the part that needs it, so that a wrong
            set-up of Dynamics keeps nobody else from working.
    """

    engine: AsyncEngine
    settings: Settings
    certifications: CertificationManagementService
    reconciliation: ReconciliationService
    open_destination: Callable[[], AbstractAsyncContextManager[Destination]]
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
        return min((one.verdict for one in self.outcomes), key=WORST_FIRST.index)

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


def _sentence(outcome: Outcome) -> str:
    did = [f"{number} {kind}" for kind, number in outcome.did.items() if number]
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
        if not _database_away(error):
            _unexpected(outcome, error)
        else:
            outcome.verdict = "unreachable"
            outcome.why = "The database stopped answering; what was committed stands."
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


async def redrive(tonight: Tonight, outcome: Outcome) -> None:
    """
    What died of something that passes.
    """
    outcome.add(
        mentors=await portal.redrive_recoverable(
            tonight.engine, organization_id=tonight.settings.organization_id
        )
    )


async def drain(tonight: Tonight, outcome: Outcome) -> None:
    """
    What is due.
    """
    organization_id = tonight.settings.organization_id
    async with tonight.open_destination() as destination:
        drained = await process.drain(
            tonight.engine,
            destination,
            tonight.settings,
            max_seconds=tonight.seconds_left,
            on_settled=lambda settled: outcome.add(
                delivered=sum(one.ending == "delivered" for one in settled)
            ),
        )
    outcome.did = {name: drained.tally[name] for name in ("delivered", "superseded", "dead")}
    async with reading(tonight.engine) as connection:
        after = await alerts.status(connection, organization_id=organization_id)
    outcome.verdict = process.judge(drained, after)
    outcome.left, outcome.failed = after.waiting, after.failed
    if drained.ended == "gate":
        outcome.why = "Sending had to stop; `hlf-sync status` says why."
    elif drained.ended == "time" and after.waiting:
        outcome.why = TIME_OVER
    elif after.failed:
        outcome.why = "See `hlf-sync failures`."


PARTS: Sequence[tuple[str, Callable[[Tonight, Outcome], Awaitable[None]]]] = (
    ("expire", expire),
    ("reconcile", reconcile),
    ("redrive", redrive),
    ("drain", drain),
)
"""In this order: what a part finds is sent by the last."""


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
